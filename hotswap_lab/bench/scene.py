"""What the ways of one rank share: a base model, two adapters, and the outputs that are right."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import prepare_model_for_compiled_hotswap as peft_prepare

from ..core.adapter import Adapter
from ..core.pool import AdapterPool
from ..core.prepare import prepare_model_for_compiled_hotswap
from .models import randomize
from .rounds import Way
from .rows import Size
from .settings import Settings

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

#: how far an output may be from a fresh load's, as a part of the largest one: layouts differ, and so does rounding
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


class Scene:
    """A base model, two adapters for it in folders, and what a fresh load of each gives.

    >>> import tempfile
    >>> from hotswap_lab.bench import make_base
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     scene = Scene(make_base(Settings(model="tiny")), Settings(model="tiny"), rank=4, folder=folder)
    >>> scene.size.tensors, len(scene.expected)
    (28, 2)
    """

    def __init__(self, base: torch.nn.Module, settings: Settings, rank: int, folder: str):
        self.base, self.settings, self.rank = base, settings, rank
        self.target_rank = settings.target_rank or rank
        self.inputs = self.make_inputs(16)
        # other alphas, so that a swap has to change the scalings too
        self.folders = [self._save(f"{folder}/{number}", number, alpha=rank * (number + 1)) for number in (0, 1)]
        self.expected = [self.outputs(self.load(number)) for number in (0, 1)]
        self.tolerance = TOLERANCE[settings.dtype] * self.expected[0].abs().max().item()
        if (self.expected[0] - self.expected[1]).abs().max() < 10 * self.tolerance:
            raise RuntimeError("the two adapters give nearly the same outputs, so no check could tell them apart")
        adapters = [Adapter.load(folder) for folder in self.folders]
        self.adapters = adapters
        packed = self.pool()
        self.size = Size(rank, len(adapters[0].tensors), adapters[0].nbytes, packed.nbytes // len(packed))

    def make_inputs(self, tokens: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.base.config.vocab_size, (1, tokens), generator=generator)
        return ids.to(self.settings.device)

    def copy_of_base(self) -> torch.nn.Module:
        """Modules of its own, on the same weights: nothing here writes to those."""
        shared = {id(tensor): tensor for tensor in (*self.base.parameters(), *self.base.buffers())}
        return copy.deepcopy(self.base, shared)

    def _save(self, folder: str, seed: int, alpha: int) -> str:
        config = LoraConfig(r=self.rank, lora_alpha=alpha, target_modules=list(MODULES))
        model = get_peft_model(self.copy_of_base(), config, autocast_adapter_dtype=False)
        randomize(model, seed)
        model.save_pretrained(folder, save_embedding_layers=False)
        return folder

    def load(self, number: int = 0) -> PeftModel:
        """A fresh load of one of the adapters, by PEFT alone."""
        return PeftModel.from_pretrained(
            self.copy_of_base(),
            self.folders[number],
            torch_device=self.settings.device,
            autocast_adapter_dtype=False,  # half precision stays half precision
        ).eval()

    def load_prepared(self) -> PeftModel:
        model = self.load()
        prepare_model_for_compiled_hotswap(model, target_rank=self.target_rank)
        return model

    def load_prepared_by_peft(self) -> PeftModel:
        model = self.load()
        peft_prepare(model, target_rank=self.target_rank)
        return model

    def pool(self) -> AdapterPool:
        """A pool of both adapters, called ``"0"`` and ``"1"``, for a model of its own."""
        adapters = dict(zip("01", self.folders, strict=True))
        return AdapterPool(self.load(), adapters=adapters, target_rank=self.target_rank, progress=False)

    @torch.no_grad()
    def outputs(self, model: torch.nn.Module, inputs: torch.Tensor | None = None) -> torch.Tensor:
        return model(input_ids=self.inputs if inputs is None else inputs, use_cache=False).logits

    def matches(self, outputs: torch.Tensor, number: int) -> bool:
        return torch.allclose(outputs, self.expected[number], rtol=0, atol=self.tolerance)

    def way(self, name: str, model: torch.nn.Module, swap: Callable[[int], object]) -> Way:
        return Way(name, swap, lambda number: self.matches(self.outputs(model), number))
