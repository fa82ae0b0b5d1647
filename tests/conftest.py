"""Shared set-up: no network, few threads."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch
from models import KINDS

torch.set_num_threads(2)


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
    assert modes == (True, False)
