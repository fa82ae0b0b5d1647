"""A Python of its own that runs what it is sent, with huggingface_hub set up for a stand-in Hub.

huggingface_hub reads its environment variables once, when it is imported, so a test can't set them in its own process;
and importing takes so long that tests share a worker. Run as a script, this file is the worker's end.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Answer:
    #: what the body left in ``result``
    result: object
    #: what it wrote to the terminal
    terminal: str


class Worker:
    """Use as a context manager. ``environment`` is added to this process' own; None removes a variable."""

    def __init__(self, environment: Mapping[str, str | None]):
        merged = {**os.environ, **environment}
        command = [sys.executable, "-u", __file__]
        self._process = subprocess.Popen(
            command,
            env={key: value for key, value in merged.items() if value is not None},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # it has nothing to tidy up, and torch takes seconds to end
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def run(self, body: str, **given: object) -> Answer:
        """Runs ``body`` in the worker, with what :func:`names` gives it and what is ``given``."""
        self._process.stdin.write(json.dumps([textwrap.dedent(body), given]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the worker has ended"
        error, result, terminal = json.loads(line)
        assert error is None, error
        return Answer(result, terminal)


class Terminal(io.StringIO):
    """Progress bars are shown on terminals only."""

    def isatty(self) -> bool:
        return True


#: what one body leaves for the next one
KEPT: dict[str, object] = {}


def names(given: Mapping[str, object]) -> dict[str, object]:
    """What a body finds: the public functions, the oracle, a fresh model."""
    import oracle
    from models import KINDS, load

    import hotswap_lab

    kind = KINDS["linear"]
    model = load(kind, given["old"])

    def refusal(*arguments: object, model: object = model, **kwargs: object) -> str:
        before = oracle.snapshot(model)
        try:
            hotswap_lab.hotswap_adapter(model, *arguments, adapter_name="default", **kwargs)
        except hotswap_lab.HotswapError as error:
            oracle.assert_untouched(model, before)
            return str(error)
        return "not refused"

    def assert_is(folder: str, **kwargs: object) -> None:
        oracle.assert_equals_fresh_load(model, kind, folder, **kwargs)

    public = {name: getattr(hotswap_lab, name) for name in dir(hotswap_lab) if name[0] != "_"}
    tools = dict(kept=KEPT, kind=kind, load=load, model=model, oracle=oracle, refusal=refusal, assert_is=assert_is)
    return {**public, **given, **tools}


def main() -> None:
    import warnings

    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        body, given = json.loads(line)
        terminal, error, result = Terminal(), None, None
        with contextlib.redirect_stderr(terminal):
            try:
                scope = names(given)
                exec(compile(body, "<test>", "exec"), scope)
                result = scope.get("result")
            except BaseException:
                error = traceback.format_exc()
        print(json.dumps([error, result, terminal.getvalue()]), file=answers, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
