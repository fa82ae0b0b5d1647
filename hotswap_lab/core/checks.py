"""Passes for rare cases of plain LoRA: they check, note and correct what other passes have planned."""

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from . import lora
from .errors import listing
from .host import PEFT_PREFIX, Config
from .loaded import FITS, other_base
from .plan import Action, Plan
from .slot import Slot

#: layers that differ in ``fan_in_fan_out``: PEFT knows two ways to store their weights
STORED = (nn.Linear, Conv1D)
#: modules that PEFT puts LoRA on, including subclasses that have child modules
ADAPTABLE = (*STORED, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)


def check_containers(plan: Plan) -> None:
    """Refuse a config that targets a module with children: PEFT can't load it, so saved adapters couldn't be loaded."""
    if plan.check_targets and (container := plan.slot.once_for(plan.config, _container_named)):
        path, kind = container
        plan.refuse("targets_a_container", path=path, target_modules=plan.config.target_modules, kind=kind)


def _container_named(slot: Slot, config: Config) -> tuple[str, str] | None:
    """The path and the class of the first module with children that a config targets; None if there is none."""
    adaptable = (BaseTunerLayer, AuxiliaryTrainingWrapper, *ADAPTABLE)
    for path, module in slot.walk:
        if path and module._modules and not isinstance(module, adaptable) and lora.is_targeted(config, path):
            return path, type(module).__name__
    return None


def correct_fan_in_fan_out(plan: Plan) -> None:
    """Set ``fan_in_fan_out`` as PEFT leaves it: true if the last layer that it puts LoRA on is a ``Conv1D``."""
    layers = plan.layers
    if plan.slot.once(_has_conv1d):  # added layers come last, wherever they are in the model
        order = {path: number for number, (path, _) in enumerate(plan.slot.walk)}
        layers = sorted(layers, key=lambda layer: order[layer.path])
    for layer in reversed(layers):
        if layer.settings is not None and isinstance(base := layer.layer.module.get_base_layer(), STORED):
            plan.config.fan_in_fan_out = isinstance(base, Conv1D)
            return


def _has_conv1d(slot: Slot) -> bool:
    return any(isinstance(module, Conv1D) for module in slot.modules)


def note_missing_targets(plan: Plan) -> None:
    """Add a note on the layers that an adapter's config targets but that its file has no tensors for."""
    off = [layer for layer in plan.layers if layer.action is Action.OFF] if plan.check_targets else []
    if named := [layer.path for layer in off if layer.is_targeted]:
        lacking = f"{len(named)} layers that the file has no tensors for ({listing(named, 2)})"
        plan.notes.append(f"the config targets {lacking}; they are turned off")


def note_other_base(plan: Plan) -> None:
    """Add a note if the adapter's config names another base model than the live one.

    It is not a refusal, because a fine-tune or a copy may fit, too. It is also a warning if both names are ids of Hub
    repositories.
    """
    if bases := plan.slot.once_for(plan.adapter.config, other_base):
        both, on_hub = bases
        plan.notes.append(both + FITS)
        if on_hub:
            plan.warnings.append(both + FITS)


def check_prefixes(plan: Plan) -> None:
    """Refuse a file with keys that lack PEFT's prefix: a fresh load ignores them. From memory, both forms are taken."""
    adapter = plan.adapter
    is_file = adapter.is_folder or adapter.revision is not None
    if not is_file or not plan.slot.host.is_peft_model or adapter.config.is_prompt_learning:
        return
    if bare := [key for key in adapter.tensors if not key.startswith("base_model.")]:
        plan.refuse("keys_without_prefix", keys=listing(bare, 4), count=len(bare), prefix=PEFT_PREFIX)
