"""Guards around PEFT while it loads an adapter: what it may not read, how much memory it may take, what it leaves."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from peft import PeftConfig
from torch.overrides import TorchFunctionMode

#: what a prompt starts from where its config would have PEFT read something; the adapter's tensors overwrite it anyway
HARMLESS_INIT = "RANDOM"
#: the values of ``prompt_tuning_init`` for which PEFT reads a tokenizer or a file that the config names
INITS_THAT_READ = ("TEXT", "AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")

#: what names the compilers to whatever builds code later, ``torch.compile`` among it
COMPILERS = ("CC", "CXX")

#: bytes that any method may take
SMALL = 32 * 2**20
#: bytes that a tensor takes at least, with the objects that are around it
OVERHEAD = 4096
#: how many times the size of its own tensors a method may take
FACTOR = 4
#: and for each weight of the base model, all in all: WaveFT, the most, takes 12
PER_WEIGHT = 64


@contextlib.contextmanager
def nothing_read(config: PeftConfig) -> Iterator[None]:
    """While an adapter is built, its config names no tokenizer and no file to begin with: its weights are here.

    Raises
    ------
    ValueError
        If it can't be built without reading what the config names.
    """
    model = getattr(config, "shadow_model", "mirror")
    if model != "mirror":
        raise ValueError(f"its config names a model to read, shadow_model={model!r}")
    init = getattr(config, "prompt_tuning_init", None)
    if init not in INITS_THAT_READ:
        yield
        return
    config.prompt_tuning_init = HARMLESS_INIT
    try:
        yield
    finally:
        config.prompt_tuning_init = init


@contextlib.contextmanager
def compilers_kept() -> Iterator[None]:
    """Puts the environment variables that name the compilers back.

    Where PEFT's BOFT can't build its extension, it leaves ``CXX=gcc`` behind: nothing that ``torch.compile`` builds
    with that can be loaded, since it is linked without the C++ library.
    """
    before = {name: os.environ.get(name) for name in COMPILERS}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class TooLargeError(ValueError):
    """An adapter whose config asks for far more memory than its tensors fill."""


class MemoryGuard(TorchFunctionMode):
    """Counts the bytes of all tensors that are made, and refuses too many before they are.

    Parameters
    ----------
    limit:
        Bytes.

    Examples
    --------
    >>> with MemoryGuard(1_000_000):
    ...     torch.nn.Linear(1_000_000, 1_000_000)
    Traceback (most recent call last):
    ...
    hotswap_lab.grafting.guards.TooLargeError: its config asks for too many tensors, such as one of (1000000, 1000000)
    """

    #: functions that make tensors of a size that is not that of others
    FACTORIES = (
        *(torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.randint, torch.randperm),
        *(torch.normal, torch.eye, torch.arange, torch.linspace, torch.tril_indices, torch.triu_indices),
        *(torch.empty_strided, torch.tensor, torch.Tensor.repeat, torch.tile, torch.repeat_interleave),
        *(torch.Tensor.new_empty, torch.Tensor.new_zeros, torch.Tensor.new_ones, torch.Tensor.new_full),
    )

    def __init__(self, limit: int):
        super().__init__()
        self.limit, self.taken = limit, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in self.FACTORIES and str(kwargs.get("device")) != "meta":
            self._count(function, args, kwargs)
        return function(*args, **kwargs)

    def _count(self, function, args: tuple, kwargs: dict) -> None:
        elsewhere = {key: value for key, value in kwargs.items() if key not in ("generator", "pin_memory", "out")}
        try:
            # made where it takes no memory, to see what it will be
            if function in (torch.Tensor.repeat, torch.tile, torch.repeat_interleave):
                shape = function(torch.empty_like(args[0], device="meta"), *args[1:], **elsewhere)
            else:
                shape = function(*args, **{**elsewhere, "device": "meta"})
        except Exception:
            return  # it will fail, or is of a kind that the meta device does not know
        self.taken += shape.numel() * shape.itemsize + OVERHEAD
        if self.taken > self.limit:
            raise TooLargeError(f"its config asks for too many tensors, such as one of {tuple(shape.shape)}")


def memory_guard(model: torch.nn.Module, tensors) -> MemoryGuard:
    """A guard that lets through whatever an adapter with these tensors can need on this model."""
    own = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    base = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    # some methods build matrices and orders of a layer's size, one for each layer, and throw them away
    return MemoryGuard(SMALL + FACTOR * own + PER_WEIGHT * base)
