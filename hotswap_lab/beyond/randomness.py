"""Random numbers while PEFT builds layers whose weights are overwritten anyway: none that somebody else would draw.

PyTorch's default generator is the process's. To draw from it and put it back would have every thread that samples
meanwhile draw the same numbers twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from peft import PeftConfig
from torch.overrides import TorchFunctionMode

#: methods for which PEFT seeds the default generator, since what it builds then is not in the file
SEEDING = ("ADAMSS", "PSOFT")


class OwnRandomness(TorchFunctionMode):
    """What this thread draws without saying from where comes from generators of the block's own.

    No ``TorchDispatchMode``, which would see more: entering one sets flags of the process that ``torch.compile`` reads.

    Examples
    --------
    >>> before = torch.get_rng_state()
    >>> with OwnRandomness():
    ...     linear = torch.nn.Linear(2, 2)
    >>> torch.equal(torch.get_rng_state(), before), bool(linear.weight.any())
    (True, True)
    """

    #: names of functions that take a generator; by name, since transformers puts others in the place of torch's
    DRAWING = frozenset(
        {
            *("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson", "binomial"),
            *("uniform_", "normal_", "random_", "bernoulli_", "exponential_", "geometric_", "cauchy_", "log_normal_"),
            # what distributions draw by
            *("_standard_gamma", "_sample_dirichlet"),
            # of torch.nn.init, whatever is seen as a whole
            "kaiming_uniform_",
        }
    )
    #: and the form of others that takes one
    LIKE = {torch.rand_like: torch.rand, torch.randn_like: torch.randn}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.is_over = False
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.is_over:
            return function(*args, **kwargs)
        if function in self.LIKE:
            like = args[0]
            kwargs = {"dtype": like.dtype, "device": like.device, **kwargs}
            function, args = self.LIKE[function], (like.shape,)
        if getattr(function, "__name__", None) in self.DRAWING and kwargs.get("generator") is None:
            device = torch.device(self._device(args, kwargs))
            if device.type != "meta":
                kwargs = {**kwargs, "generator": self._generator(device)}
        return function(*args, **kwargs)

    @staticmethod
    def _device(args: tuple, kwargs: dict) -> torch.device | str:
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
        return kwargs.get("device") or (tensors[0].device if tensors else torch.get_default_device())

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            # the same numbers for whoever has set a seed
            self._generators[device] = torch.Generator(device).manual_seed(torch.initial_seed())
        return self._generators[device]


def seeds_itself(config: PeftConfig) -> bool:
    """Whether PEFT uses the default generator itself when it loads an adapter with this config."""
    return getattr(config.peft_type, "value", config.peft_type) in SEEDING


@contextlib.contextmanager
def random_numbers_kept(config: PeftConfig) -> Iterator[None]:
    """While PEFT builds an adapter with this config, the user's random numbers don't move on.

    Where it seeds the default generator, nobody should compute meanwhile.
    """
    if seeds_itself(config):
        with torch.random.fork_rng():
            yield
        return
    own = OwnRandomness()
    try:
        with own:
            yield
    finally:
        own.is_over = True  # Ctrl-C just before or after the block leaves the mode behind
