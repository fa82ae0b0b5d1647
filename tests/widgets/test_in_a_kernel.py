"""SwapPanel in a real Jupyter kernel that is interrupted, as by the stop button of a notebook."""

from __future__ import annotations

import os
import random
import time

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
    waiting = "print('begun', flush=True)\npanel._switch.pool.swap('shout')"

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
