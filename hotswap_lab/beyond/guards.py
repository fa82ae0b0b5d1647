"""Guards around PEFT while it loads an adapter: what it may not read, how much memory it may take, what it leaves."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from peft import PeftConfig
from torch.overrides import TorchFunctionMode

#: the values of ``prompt_tuning_init`` for which PEFT reads a tokenizer or a file that the config names
INITS_THAT_READ = ("TEXT", "AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")
#: what names the compilers to whatever builds code later, ``torch.compile`` among it
COMPILERS = ("CC", "CXX")

#: bytes that any method may take
SMALL = 32 * 2**20
#: how many times the size of its own tensors a method may take
FACTOR = 4
#: and for each weight of the base model, all in all: WaveFT, the most, takes 12
PER_WEIGHT = 64
#: bytes that a tensor takes at least, with the objects that are around it
OVERHEAD = 4096


def take_out(config: PeftConfig) -> dict[str, object]:
    """Takes out of a config what PEFT need not do again when it builds the adapter. Returns it, to be put back.

    Raises
    ------
    ValueError
        If the adapter can't be built without reading what the config names.
    """
    if (model := getattr(config, "shadow_model", "mirror")) != "mirror":
        raise ValueError(f"its config names a model to read, shadow_model={model!r}")
    out = {}
    if getattr(config, "prompt_tuning_init", None) in INITS_THAT_READ:  # the adapter's tensors overwrite it anyway
        out["prompt_tuning_init"], config.prompt_tuning_init = config.prompt_tuning_init, "RANDOM"
    if getattr(config, "layer_replication", None):  # the live base model has its layers repeated already
        out["layer_replication"], config.layer_replication = config.layer_replication, None
    return out


@contextlib.contextmanager
def compilers_kept() -> Iterator[None]:
    """Puts the environment variables that name the compilers back.

    Where PEFT's BOFT can't build its extension, it leaves ``CXX=gcc`` behind: nothing that ``torch.compile`` builds
    with that can be loaded, since it is linked without the C++ library.
    """
    before = {name: os.environ[name] for name in COMPILERS if name in os.environ}
    try:
        yield
    finally:
        for name in COMPILERS:
            os.environ.pop(name, None)
        os.environ.update(before)


def random_numbers_kept() -> contextlib.AbstractContextManager[None]:
    """While PEFT builds an adapter, whose weights are overwritten anyway, the user's random numbers don't move on.

    A thread that samples meanwhile, and not inside ``in_use(model)``, may draw the same numbers twice.
    """
    # asking for the state of a GPU that nobody uses would start it
    return torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ())


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
    hotswap_lab.beyond.guards.TooLargeError: its config asks for too many tensors, such as one of (1000000, 1000000)
    """

    #: functions that make tensors of a size that is not that of others
    FACTORIES = frozenset(
        {
            *("empty", "zeros", "ones", "full", "rand", "randn", "randint", "randperm", "normal", "eye", "arange"),
            *("linspace", "tril_indices", "triu_indices", "tensor", "empty_strided", "repeat", "tile"),
            *("repeat_interleave", "new_empty", "new_zeros", "new_ones", "new_full"),
        }
    )

    def __init__(self, limit: int):
        super().__init__()
        self.limit = limit
        self.taken: int = 0

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in self.FACTORIES and str(kwargs.get("device")) != "meta":
            self._count(function, args, kwargs)
        return function(*args, **kwargs)

    def _count(self, function, args: tuple, kwargs: dict) -> None:
        elsewhere = {key: kwargs[key] for key in kwargs.keys() - {"generator", "pin_memory", "out", "device"}}
        try:
            # made where it takes no memory, to see what it will be
            meta = [each.to("meta") if isinstance(each, torch.Tensor) else each for each in args]
            if not any(isinstance(each, torch.Tensor) for each in args):
                elsewhere["device"] = "meta"
            shape = function(*meta, **elsewhere)
        except Exception:
            return  # it will fail, or is of a kind that the meta device does not know
        self.taken += shape.numel() * shape.itemsize + OVERHEAD
        if self.taken > self.limit:
            raise TooLargeError(f"its config asks for too many tensors, such as one of {tuple(shape.shape)}")


def memory_guard(model: torch.nn.Module, tensors: Iterable[torch.Tensor]) -> MemoryGuard:
    """A guard that lets through whatever an adapter with these tensors can need on this model."""
    own = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    base = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    # some methods build matrices and orders of a layer's size, one for each layer, and throw them away
    return MemoryGuard(SMALL + FACTOR * own + PER_WEIGHT * base)
