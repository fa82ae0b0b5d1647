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
