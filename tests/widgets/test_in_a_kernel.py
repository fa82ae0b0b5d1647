"""SwapPanel in a real Jupyter kernel: interrupts, as by a notebook's stop button, and the messages of clicks."""

from __future__ import annotations

import json
import os
import queue
import random
import time
from datetime import datetime, timedelta, timezone

import pytest

jupyter_client = pytest.importorskip("jupyter_client")

SOON = 120
SETUP = """
import itertools, time, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from hotswap_lab import demo, in_use, verify_hotswap
from hotswap_lab.widgets import SwapPanel

panel = SwapPanel.demo(run_on_swap=False)
panel.box, panel._refresh()
model, answer = panel._switch.model, panel.generate

def slow(prompt):
    yield "so far"
    print("begun", flush=True)
    for number in itertools.count():
        time.sleep(0.01)
        yield f"step {number}"

def check(*allowed):
    "Exactly one adapter is in the model, one of these; the panel knows which one, and goes on working."
    found = [name for name in allowed if verify_hotswap(model, demo.adapter_path(name))]
    assert len(found) == 1, found
    assert panel.active == found[0] and not panel.busy
    assert panel.after is None or panel.after.state != "running"
    panel.generate = answer
    for name in ("pig_latin", "reverse"):
        panel.active = name
        assert panel.run() == demo.TASKS[name]("hotswap")
    print("right")
"""


BEGIN = datetime(2030, 1, 1, tzinfo=timezone.utc)
COMMS = """
import json
panel.wait()
controls = [*panel._buttons.children, panel._slider, panel._stop_button, panel._run_button, panel._box]
print(json.dumps([each.comm.comm_id for each in controls]))
"""


class Kernel:
    """A kernel, and what to do with it."""

    def __init__(self):
        self.manager, self.client = jupyter_client.manager.start_new_kernel(
            env={**os.environ, "HF_HUB_OFFLINE": "1"}, startup_timeout=SOON
        )

    def run(self, code: str, begun=None) -> tuple[str, str]:
        """Runs a cell. Calls ``begun`` when it has printed something. Returns what it printed, and its error's name."""
        message, printed, error = self.client.execute(code), "", ""
        while True:
            reply = self.client.get_iopub_msg(timeout=SOON)
            if reply["parent_header"].get("msg_id") != message:
                continue
            if reply["msg_type"] == "stream":
                printed += reply["content"]["text"]
                if begun is not None:
                    begun, _ = None, begun()
            if reply["msg_type"] == "error":
                printed, error = printed + "\n".join(reply["content"]["traceback"]), reply["content"]["ename"]
            if reply["msg_type"] == "status" and reply["content"]["execution_state"] == "idle":
                return printed, error

    def send(self, comm: str, data: dict, *, made: float = 0.0, session: str = "page", subshell: str | None = None):
        """Sends what a control on a page would send. ``made``: when that was, in seconds after ``BEGIN``."""
        message = self.client.session.msg("comm_msg", {"comm_id": comm, "data": data})
        message["header"].update(session=session, date=BEGIN + timedelta(seconds=made))
        if subshell is not None:
            message["header"]["subshell_id"] = subshell
        self.client.shell_channel.send(message)

    def click(self, comm: str, **how):
        self.send(comm, {"method": "custom", "content": {"event": "click"}}, **how)

    def new_subshell(self) -> str | None:
        """A thread beside the cells, for messages; None if the kernel has no such thing."""
        message = self.client.session.msg("create_subshell_request", {})
        self.client.control_channel.send(message)
        while True:
            try:
                reply = self.client.get_control_msg(timeout=10)
            except queue.Empty:
                return None
            if reply["parent_header"].get("msg_id") == message["header"]["msg_id"]:
                return reply["content"].get("subshell_id")


pytestmark = pytest.mark.long  # each of them talks to a kernel of its own


@pytest.fixture(scope="module")
def kernel():
    kernel = Kernel()
    try:
        printed, error = kernel.run(SETUP)
        assert error == "", printed
        yield kernel
    finally:
        kernel.client.stop_channels()
        kernel.manager.shutdown_kernel(now=True)


def test_interrupts_during_swaps(kernel):
    moments = random.Random(0)
    for way in ("panel.active = name", "panel.choose(name)", "panel.strength = 0.5; panel.active = name"):
        for _ in range(3):
            loop = f"print('begun', flush=True)\nfor name in itertools.cycle(['sort', 'shout', 'double']):\n    {way}"

            def interrupt():
                time.sleep(moments.uniform(0, 0.1))
                kernel.manager.interrupt_kernel()

            # the text: an interrupt in some places is more than IPython's formatting of tracebacks can take
            assert "KeyboardInterrupt" in kernel.run(loop, interrupt)[0]
            printed, _ = kernel.run(
                "panel.active = panel.active or 'sort'\ncheck('sort', 'shout', 'double', 'reverse')"
            )
            assert printed.endswith("right\n"), printed


def test_an_interrupt_during_a_run(kernel):
    kernel.run("panel.active = 'sort'\npanel.generate = slow")
    assert "KeyboardInterrupt" in kernel.run("panel.run()", kernel.manager.interrupt_kernel)[0]
    printed, _ = kernel.run("print(panel.after.state, '|', panel.after.where, '|', panel._status.value[:5])")
    assert printed == "stopped | sort | ready\n"
    assert kernel.run("check('sort')")[0].endswith("right\n")


def test_an_interrupt_while_a_swap_waits(kernel):
    kernel.run("panel.active = 'sort'\npanel.generate = slow\npanel.start()")  # as a click: it runs beside the cells
    # a swap before that would not have to wait
    kernel.run("while getattr(panel.after, 'state', '') != 'running': time.sleep(0.01)")
    waiting = "print('begun', flush=True)\npanel._switch.swap('shout')"

    def interrupt():
        time.sleep(0.3)
        kernel.manager.interrupt_kernel()

    assert "KeyboardInterrupt" in kernel.run(waiting, interrupt)[0]
    assert kernel.run("print(panel.busy, panel.active)")[0] == "True sort\n"  # the interrupt was not for the run
    kernel.run("panel.stop(); panel.wait()")
    assert kernel.run("check('sort')")[0].endswith("right\n")


def test_clicks_in_cells(kernel):
    """A cell that computes, and clicks meanwhile from another thread: none tears what the cell computes."""
    printed, _ = kernel.run(
        """
import threading
panel.active = "reverse"
def clicks():
    for number in range(6):
        panel._buttons.children[number].click()
        time.sleep(0.02)
clicking = threading.Thread(target=clicks)
answers = []
for number in range(8):
    with in_use(model):
        answers.append(list(answer("hotswap"))[-1])
    if number == 0:
        clicking.start()
clicking.join()
panel.wait()
assert set(answers) <= {demo.TASKS[name]("hotswap") for name in panel.names}, answers
print(panel.active == panel.names[5])
check(panel.active)
"""
    )
    assert printed == "True\nright\n", printed


@pytest.fixture
def comms(kernel) -> dict[str, str]:
    """The address of each control: that of an adapter's button under the adapter's name."""
    names = json.loads(kernel.run("import json; print(json.dumps(panel.names))")[0])
    names += ["off", "strength", "stop", "run", "prompt"]
    return dict(zip(names, json.loads(kernel.run(COMMS)[0]), strict=True))


def test_a_click_that_comes_late_does_not_count(kernel, comms):
    """ipykernel 7.4 may hand over a click at the end of a cell, and later ones to other buttons before that."""

    def active() -> str:
        return kernel.run("panel.wait(); print(panel.active, panel.strength)")[0]

    kernel.run("panel.active = 'reverse'")
    kernel.click(comms["shout"], made=1)
    assert active() == "shout 1.0\n"
    kernel.click(comms["sort"], made=3)
    kernel.click(comms["double"], made=2)
    assert active() == "sort 1.0\n"
    kernel.send(comms["strength"], {"method": "update", "state": {"value": 0.5}, "buffer_paths": []}, made=2)
    assert active() == "sort 1.0\n"
    assert kernel.run("print(panel._slider.value)")[0] == "1.0\n"
    kernel.click(comms["caesar"], made=3)  # in the same millisecond
    assert active() == "caesar 1.0\n"
    kernel.click(comms["double"], made=-3600, session="a page with another clock")
    assert active() == "double 1.0\n"
    kernel.run("panel.active = 'reverse'; panel.generate = slow")
    kernel.click(comms["run"], made=4)
    kernel.click(comms["stop"], made=2)  # was for an earlier run
    assert kernel.run("print(panel.wait(0.5))")[0] == "False\n"
    kernel.click(comms["stop"], made=5)
    assert active() == "reverse 1.0\n"
    # clicks from Python, in a cell that began before
    kernel.run("panel._buttons.children[panel.names.index('sort')].click()")
    assert active() == "sort 1.0\n"


def test_clicks_act_while_a_cell_computes(kernel, comms):
    """Also those on controls that cells have changed since: ipykernel 7.4 would keep these for the end of the cell."""
    subshell = kernel.new_subshell()
    if subshell is None:
        pytest.skip("this kernel has no thread beside the cells")
    kernel.run("panel.generate = answer; panel.active = 'reverse'; panel.prompt = 'hotswap'")
    kernel.click(comms["shout"], made=10, subshell=subshell)  # while no cell computes
    kernel.run("panel.wait()")
    waiting = """
print('begun', flush=True)
end = time.monotonic() + 60
while (panel.active, panel.prompt) != ('sort', 'other') and time.monotonic() < end:
    time.sleep(0.01)
print(panel.active, panel.prompt)
"""

    def clicks():
        kernel.send(
            comms["prompt"],
            {"method": "update", "state": {"value": "other"}, "buffer_paths": []},
            made=11,
            subshell=subshell,
        )
        kernel.click(comms["pig_latin"], made=12, subshell=subshell)
        kernel.click(comms["sort"], made=13, subshell=subshell)

    assert kernel.run(waiting, clicks)[0] == "begun\nsort other\n"
