"""Shared set-up: quiet libraries, no network, few threads."""

import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch
from models import KINDS

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _quiet():
    """PEFT's and transformers' notes on deprecations are not what is tested here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        yield


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]
