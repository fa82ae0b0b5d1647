"""Guards around PEFT while it loads an adapter: limits on what it reads and allocates, and no side effects."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from peft import PeftConfig
from torch.overrides import TorchFunctionMode

#: values of ``prompt_tuning_init`` that make PEFT read a tokenizer or file named by the config
INITS_THAT_READ = ("TEXT", "AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")
#: environment variables that name the compilers, which ``torch.compile`` reads, too
COMPILERS = ("CC", "CXX")

#: bytes that any method may allocate
SMALL = 32 * 2**20
#: how many times the size of its own tensors a method may allocate
FACTOR = 4
#: bytes that a method may allocate for each weight of the base model; WaveFT needs the most, 12
PER_WEIGHT = 64
#: bytes of the Python objects around a tensor
OVERHEAD = 4096


def take_out(config: PeftConfig) -> dict[str, object]:
    """Remove fields from a config that would make PEFT repeat work. Return them, to be restored later.

    Raises
    ------
    ValueError
        If building the adapter requires reading a model that the config names.
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
    """Restore the environment variables that name the compilers.

    If PEFT's BOFT can't build its extension, it leaves ``CXX=gcc`` behind. Code that ``torch.compile`` then builds
    can't be loaded, because it is linked without the C++ library.
    """
    before = {name: os.environ[name] for name in COMPILERS if name in os.environ}
    try:
        yield
    finally:
        for name in COMPILERS:
            os.environ.pop(name, None)
        os.environ.update(before)


def device_with_values() -> contextlib.AbstractContextManager[Any]:
    """Replace a default device without values in a block: PEFT makes tensors without naming a device."""
    is_meta = torch.get_default_device().type == "meta"
    return torch.device("cpu") if is_meta else contextlib.nullcontext()


def random_numbers_kept() -> contextlib.AbstractContextManager[None]:
    """Restore the state of the random number generators, because PEFT draws initial weights that aren't kept.

    A thread that samples meanwhile, outside of ``in_use(model)``, may draw the same numbers twice.
    """
    # reading a GPU's state initializes CUDA, so it is skipped in processes that don't use one
    return torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ())


@contextlib.contextmanager
def state_kept(module: torch.nn.Module) -> Iterator[None]:
    """Restore the values of a module's buffers, and random numbers, after a block that runs it."""
    values = [(buffer, buffer.clone()) for buffer in module.buffers() if not buffer.is_meta]
    try:
        with random_numbers_kept():
            yield
    finally:
        for buffer, value in values:
            if not torch.equal(buffer, value):
                buffer.copy_(value)


class TooLargeError(ValueError):
    """The error for an adapter whose config asks for far more memory than its tensors fill."""


class MemoryGuard(TorchFunctionMode):
    """Count the bytes of all tensors that are created, and raise before they exceed a limit.

    Parameters
    ----------
    limit:
        The limit in bytes.

    Examples
    --------
    >>> with MemoryGuard(1_000_000):
    ...     torch.nn.Linear(1_000_000, 1_000_000)
    Traceback (most recent call last):
    ...
    hotswap_lab.beyond.guards.TooLargeError: its config asks for too many tensors, such as one of (1000000, 1000000)
    """

    #: functions that make tensors of a new size
    FACTORIES = (
        *("empty", "zeros", "ones", "full", "rand", "randn", "randint", "randperm", "normal", "eye", "arange"),
        *("linspace", "tril_indices", "triu_indices", "tensor", "empty_strided", "repeat", "tile"),
        *("repeat_interleave", "new_empty", "new_zeros", "new_ones", "new_full"),
    )

    def __init__(self, limit: int):
        super().__init__()
        self.limit = limit
        self.allocated: int = 0

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in self.FACTORIES and str(kwargs.get("device")) != "meta":
            self._count(function, args, kwargs)
        return function(*args, **kwargs)

    def _count(self, function, args: tuple, kwargs: dict) -> None:
        options = {key: kwargs[key] for key in kwargs.keys() - {"generator", "pin_memory", "out", "device"}}
        try:
            # the same call on the meta device takes no memory and shows the size
            meta_args = [value.to("meta") if isinstance(value, torch.Tensor) else value for value in args]
            if not any(isinstance(value, torch.Tensor) for value in args):
                options["device"] = "meta"
            result = function(*meta_args, **options)
        except Exception:
            return  # the call itself will fail, or the meta device doesn't support it
        self.allocated += result.numel() * result.itemsize + OVERHEAD
        if self.allocated > self.limit:
            raise TooLargeError(f"its config asks for too many tensors, such as one of {tuple(result.shape)}")


def memory_guard(model: torch.nn.Module, tensors: Iterable[torch.Tensor]) -> MemoryGuard:
    """A guard whose limit is enough for any adapter with these tensors on this model."""
    own = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    base = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    # some methods build temporary matrices and permutations of a layer's size, for each layer
    return MemoryGuard(SMALL + FACTOR * own + PER_WEIGHT * base)
