"""What each row of a batch must be: by PEFT alone, whose adapters are active together where they are mixed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from models import Kind, call, load, save_random_adapter
from oracle import assert_close
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from hotswap_lab import demo

#: of the largest output, how far the adapters must be from the base model and each other
MARGIN = 1e-3


def family(kind: Kind, folder: Path) -> dict[str, str]:
    """Adapters of other ranks, scalings, patterns, and such that lack layers; none has a rank above 7."""
    first, last = kind.modules[0], kind.modules[-1]
    settings = {
        "a": dict(r=4, lora_alpha=6),
        "b": dict(r=7, lora_alpha=5, use_rslora=True, lora_dropout=0.3),
        "c": dict(r=2, lora_alpha=6, target_modules=[first]),
        "d": dict(r=3, lora_alpha=4, rank_pattern={last: 5}, alpha_pattern={first: 9}),
        "e": dict(r=1, lora_alpha=3, target_modules=[last]),
    }
    return {
        name: save_random_adapter(kind, folder / name, seed=number, **lora)
        for number, (name, lora) in enumerate(settings.items())
    }


def together(folders: Mapping[str, str], weights: Mapping[str, float]) -> PeftModel:
    """The embedded model with all of these adapters active, each times its weight."""
    # a module of PyTorch can't be called "double"
    weights = {f"own_{name}": weight for name, weight in weights.items()}
    first, *others = weights
    model = PeftModel.from_pretrained(
        demo.load_base().double(), folders[first.removeprefix("own_")], adapter_name=first
    )
    for name in others:
        model.load_adapter(folders[name.removeprefix("own_")], name)
    model.base_model.set_adapter(list(weights))
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.scaling.update({name: weights[name] * own for name, own in layer.scaling.items()})
    return model.eval()


Wanted = str | Mapping[str, float] | None


class Truth:
    """A batch as fresh loads compute it, each with one adapter, or one mix, for all rows."""

    def __init__(self, kind: Kind, folders: Mapping[str, str], inputs: object, call: Callable = call, **options):
        self.kind, self.folders, self.inputs, self.call, self.options = kind, folders, inputs, call, options
        self.base: torch.Tensor = call(kind.base(), inputs)
        outputs = [self.base, *(self.of(name) for name in folders)]
        for number, one in enumerate(outputs):
            for other in outputs[:number]:
                # a test that passes whatever a row has is worth nothing
                assert all(each.abs().max() > MARGIN * self.scale for each in one - other)

    @property
    def scale(self) -> float:
        return self.base.abs().max().item()

    def of(self, wanted: Wanted, strength: float = 1.0) -> torch.Tensor:
        """The whole batch with this in each row."""
        weights = {} if wanted is None else {wanted: 1.0} if isinstance(wanted, str) else wanted
        return self._of(tuple(weights.items()), strength) if weights else self.base

    @functools.cache  # noqa: B019
    def _of(self, weights: tuple[tuple[str, float], ...], strength: float) -> torch.Tensor:
        return self.call(self.model(weights, strength), self.inputs)

    def model(self, weights: tuple[tuple[str, float], ...], strength: float = 1.0) -> torch.nn.Module:
        """A fresh load of these adapters, active together."""
        (first, _), *others = weights
        model = load(self.kind, self.folders[first], first, **self.options)
        for name, _ in others:
            model.load_adapter(self.folders[name], name, **self.options)
        model.base_model.set_adapter([name for name, _ in weights])
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                for name, weight in weights:
                    if name in layer.scaling:
                        layer.scaling[name] *= weight * strength
        return model.eval()

    def rows(self, wanted: Sequence[Wanted], strengths: Sequence[float] | None = None) -> torch.Tensor:
        """The first rows of the batch, each with its own."""
        strengths = strengths or [1.0] * len(wanted)
        return torch.stack([self.of(each, by)[n] for n, (each, by) in enumerate(zip(wanted, strengths, strict=True))])

    def check(
        self,
        actual: torch.Tensor,
        wanted: Sequence[Wanted],
        strengths: Sequence[float] | None = None,
        tolerance: float | None = None,
    ) -> None:
        assert_close(actual, self.rows(wanted, strengths), tolerance)
