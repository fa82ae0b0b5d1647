"""Shared set-up: no network, few threads; and chapter 05 is skipped where its model is nowhere."""

import os
import signal
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # two that build the same code at the same time get into each other's way
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), f"inductor-of-{worker}")

import pytest
import torch
from models import KINDS

from hotswap_lab.grafting.guards import compilers_kept

THREADS = 2
torch.set_num_threads(THREADS)


#: the notebook that needs SmolLM2; its solutions do without it
NEEDS_SMOLLM2 = "notebooks/05_real_llm.ipynb"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what can't run, and says why, instead of failing in every cell."""
    items = [item for item in items if item.path.as_posix().endswith(NEEDS_SMOLLM2)]
    if not items:
        return
    from hotswap_lab import HotswapError
    from hotswap_lab.demo import smollm2

    try:
        smollm2.find()
    except HotswapError as error:
        for item in items:
            item.add_marker(pytest.mark.skip(reason=str(error).replace("\n", " ")))


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture(autouse=True)
def _modes_are_given_back():
    """Whatever happens in a call, it must not leave the caller without gradients."""
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    yield
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    torch.set_grad_enabled(True)
    torch.set_num_threads(THREADS)  # programs set their own number of them
    assert modes == (True, False)


@pytest.fixture(autouse=True)
def _compilers_are_given_back():
    """PEFT's BOFT names a C compiler in the environment and leaves it there; all that is compiled later is broken."""
    with compilers_kept():
        yield


@pytest.fixture
def python_sigint():
    """Ctrl-C raises KeyboardInterrupt, as in a notebook's kernel. A process in the background of a shell ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
