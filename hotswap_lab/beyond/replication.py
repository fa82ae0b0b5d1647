"""Layers of the base model that PEFT repeats because an adapter's config says so (``layer_replication`` of LoRA).

They are the base model's own layers in another order and number: no swap of an adapter turns one arrangement into
another. Which one a model has, nothing shows but the config of the adapter that it was loaded with.
"""

from __future__ import annotations

from peft import PeftConfig

from ..core.errors import Refusal


def replication_of(config: PeftConfig) -> list | None:
    """The ranges of layers that a config has the base model made of, as a file has them; None where it says nothing.

    >>> from peft import LoraConfig
    >>> replication_of(LoraConfig(layer_replication=[(0, 2), (1, 2)]))
    [[0, 2], [1, 2]]
    """
    ranges = getattr(config, "layer_replication", None)
    if isinstance(ranges, (list, tuple)):
        return [list(each) if isinstance(each, tuple) else each for each in ranges] or None
    return ranges or None


def other_layers(loaded: PeftConfig, new: PeftConfig) -> Refusal | None:
    """Why a base model that was arranged for one config can't carry the other, or None."""
    if replication_of(loaded) == replication_of(new):
        return None
    return Refusal(
        "The adapter is for other layers of the base model than the model has.",
        found=f"layer_replication={replication_of(new)!r}",
        expected=f"layer_replication={replication_of(loaded)!r}, as the base model was arranged for the loaded adapter",
        next_step="load this adapter with PeftModel.from_pretrained on a fresh base model",
    )
