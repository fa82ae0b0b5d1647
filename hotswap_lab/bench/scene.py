"""The setting that all ways of one rank share: a base model, two adapters, and the expected outputs."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from ..engine import AdapterPool, prepare_model_for_compiled_hotswap
from ..files.reading import Adapter
from .report import Size
from .settings import SHAPES, Settings

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

#: largest error against a fresh load, relative to the largest output: rounding depends on the memory layout
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


def make_base(settings: Settings) -> torch.nn.Module:
    """A base model of a real shape with random weights, the same every time.

    >>> base = make_base(Settings(model="tiny", layers=3))
    >>> len(base.model.layers), base.config.hidden_size
    (3, 32)
    """
    hidden, intermediate, layers, heads, kv_heads = SHAPES[settings.model]
    config = LlamaConfig(
        vocab_size=1000,  # doesn't affect a swap
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=settings.layers or layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval().to(settings.device, getattr(torch, settings.dtype))


def waiting(run: Callable[[], object], device: str) -> Callable[[], object]:
    """The same function on a CPU; on an accelerator, a function that also waits until its work there is done."""
    if torch.device(device).type == "cpu":
        return run
    return lambda: (run(), torch.accelerator.synchronize())


@dataclass(frozen=True)
class Way:
    """One way of swapping one adapter for another.

    Parameters
    ----------
    name:
        The name in the table.
    swap:
        A function that swaps in one of the two adapters, by its number, 0 or 1.
    is_right:
        A function that tells whether the result equals a fresh load of that adapter.
    model:
        The model that it swaps in, if there is one.
    """

    name: str
    swap: Callable[[int], object]
    is_right: Callable[[int], bool]
    model: torch.nn.Module | None = None

    def check(self) -> tuple[str, str]:
        """Swap to each adapter once. Returns the state, and the error if it was refused."""
        try:
            states = []
            for number in (1, 0):
                self.swap(number)
                states.append(self.is_right(number))
        except Exception as error:
            # any error is the result of this way, so that the others are still measured
            return "refused", (str(error).strip() or type(error).__name__).splitlines()[0]
        return ("right" if all(states) else "wrong"), ""

    def alternating(self, device: str) -> Callable[[], object]:
        """A function that swaps to the other adapter, and waits until the swap is done."""
        numbers = itertools.cycle((1, 0))  # after the check, number 0 is in the model
        return waiting(lambda: self.swap(next(numbers)), device)


class Scene:
    """A base model, two adapters for it in folders, and the outputs of a fresh load of each.

    Parameters
    ----------
    base, settings, rank:
        The model, the settings of the run, and the rank of the adapters.
    folder:
        The folder to save two random adapters of that rank in.
    folders:
        The folders of two existing adapters, to use instead.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     scene = Scene(make_base(Settings(model="tiny")), Settings(model="tiny"), rank=4, folder=folder)
    ...     scene.size.tensors, len(scene.expected)
    (28, 2)
    """

    def __init__(
        self, base: torch.nn.Module, settings: Settings, rank: int, folder: str = "", folders: Sequence[str] = ()
    ):
        self.base = base
        self.settings = settings
        self.rank = rank
        self.target_rank: int = settings.target_rank or rank
        self.inputs: torch.Tensor = self.make_inputs(16)
        # adapters of a half-precision model stay in half precision
        self.options: dict[str, Any] = dict(
            torch_device=settings.device, autocast_adapter_dtype=settings.dtype == "float32"
        )
        self.folders: Sequence[str] = folders or [self._save(f"{folder}/{number}", number) for number in (0, 1)]
        self.expected: list[torch.Tensor] = [self.outputs(self.load(number)) for number in (0, 1)]
        self.tolerance: float = TOLERANCE[settings.dtype] * self.expected[0].abs().max().item()

    @functools.cached_property
    def adapters(self) -> list[Adapter]:
        return [Adapter.load(folder) for folder in self.folders]

    @functools.cached_property
    def size(self) -> Size:
        first, packed = self.adapters[0], self.pool()
        return Size(self.rank, len(first.tensors), first.nbytes, packed.nbytes // len(packed))

    def make_inputs(self, tokens: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.base.config.vocab_size, (1, tokens), generator=generator)
        return ids.to(self.settings.device)

    def copy_of_base(self) -> torch.nn.Module:
        """A copy of the base model's modules that shares its weights, which no way of swapping writes to."""
        shared = {id(tensor): tensor for tensor in (*self.base.parameters(), *self.base.buffers())}
        return copy.deepcopy(self.base, shared)

    def _save(self, folder: str, number: int) -> str:
        # B is random, since no output would show a wrong swap if it were 0. The alphas differ, so scalings change, too
        config = LoraConfig(
            r=self.rank, lora_alpha=self.rank * (number + 1), target_modules=list(MODULES), init_lora_weights=False
        )
        with torch.random.fork_rng():
            torch.manual_seed(number)
            model = get_peft_model(self.copy_of_base(), config, autocast_adapter_dtype=False)
        model.save_pretrained(folder, save_embedding_layers=False)
        return folder

    def load(self, number: int = 0) -> PeftModel:
        """A fresh load of one of the adapters, by PEFT alone."""
        return PeftModel.from_pretrained(self.copy_of_base(), self.folders[number], **self.options).eval()

    def load_prepared(self, prepare: Callable[..., object] = prepare_model_for_compiled_hotswap) -> PeftModel:
        """The first adapter in a model prepared for ``target_rank``, by our function or by PEFT's."""
        model = self.load()
        prepare(model, target_rank=self.target_rank)
        return model

    def pool(self) -> AdapterPool:
        """A pool of both adapters, named ``"0"`` and ``"1"``, on a model of its own."""
        adapters = dict(zip("01", self.folders, strict=True))
        return AdapterPool(self.load(), adapters=adapters, target_rank=self.target_rank, progress=False)

    @torch.no_grad()
    def outputs(self, model: torch.nn.Module, inputs: torch.Tensor | None = None) -> torch.Tensor:
        return model(input_ids=self.inputs if inputs is None else inputs, use_cache=False).logits

    def way(self, name: str, model: torch.nn.Module, swap: Callable[[int], object]) -> Way:
        """A way of swapping in ``model``, checked by comparing its outputs with those of a fresh load."""

        def is_right(number: int) -> bool:
            return torch.allclose(self.outputs(model), self.expected[number], rtol=0, atol=self.tolerance)

        return Way(name, swap, is_right, model)
