"""Kernels for nbval, forked from one process that has imported what every notebook imports: three seconds less each."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from typing import Any

from jupyter_client.provisioning import local_provisioner

start_alone = local_provisioner.launch_kernel


class Forked:
    """What ``subprocess.Popen`` has, as far as jupyter_client asks for it, for a process that isn't our child."""

    stdin = stdout = stderr = returncode = None

    def __init__(self, pid: int):
        self.pid = pid

    def poll(self) -> int | None:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            self.returncode = 0
        return self.returncode

    def wait(self) -> int | None:
        while self.poll() is None:
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, which: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, which)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


@functools.cache
def warm() -> subprocess.Popen:
    """The process with the imports. It ends with this one, because its input does; Ctrl-C is not for it."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, __file__], start_new_session=True, **pipes)


def launch_kernel(command: list[str], **options: Any) -> Any:
    """In place of jupyter_client's function. Kernels other than this environment's plain Python start alone."""
    if command[0] != sys.executable or command[1:3] != ["-m", "ipykernel_launcher"]:
        return start_alone(command, **options)
    where = {"env": dict(options["env"] or os.environ), "cwd": options["cwd"] or os.getcwd()}
    warm().stdin.write(json.dumps({"argv": command[2:], **where}) + "\n")
    warm().stdin.flush()
    return Forked(int(warm().stdout.readline()))


def fork_kernels() -> None:
    """A kernel for each line of the input; its process goes to the output."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that one that has ended is gone
    for line in sys.stdin:
        if child := os.fork():
            while os.getpgid(child) != child:
                time.sleep(0.001)
            print(child, flush=True)
        else:
            return be_kernel(**json.loads(line))


def be_kernel(argv: list[str], env: dict[str, str], cwd: str) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for each in range(3):
        os.dup2(os.open(os.devnull, os.O_RDWR), each)
    os.environ.clear()
    os.environ.update(env, JPY_PARENT_PID=str(os.getppid()))
    os.chdir(cwd)
    os.setsid()
    sys.path[0], sys.argv = cwd, argv
    runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    fork_kernels()
