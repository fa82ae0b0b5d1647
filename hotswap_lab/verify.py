"""The oracle: is the live model what a fresh load of the adapter would be?

Nothing of the swap engine decides here. The reference is made by PEFT alone, and everything that a user could
observe is compared: outputs, config, scalars of each layer, and the tensors that would be saved.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter

import torch
from peft import PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict

from .beyond.base_values import ORIGINALS
from .beyond.guards import compilers_kept
from .beyond.randomness import random_numbers_kept
from .beyond.stand_in import make_stand_in
from .beyond.wrappers import WRAPPERS, inside, wrappers_in
from .core.adapter import Adapter, find_folder
from .core.compiled import unwrap_compiled
from .core.errors import refuse
from .core.host import PEFT_PREFIX, Host, canonical_path
from .core.interrupts import interruptible, interrupts_held
from .core.slot import Slot, resolve_slot
from .files.saving import LoadedAlone, saved_tensors, write_adapter
from .threads import in_use

#: config fields that say where an adapter comes from; PEFT fills them in when it saves, and nothing depends on them
PROVENANCE = {"base_model_name_or_path", "revision", "auto_mapping", "peft_version"}

#: how far outputs may differ, relative to the largest output, by the precision they were computed in
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
#: and how many times that the adapter's effect must be; half precision leaves no room for more
MARGIN = {torch.float16: 10, torch.bfloat16: 5}

#: how many mismatches a verdict shows
SHOWN = 10


@dataclass(frozen=True)
class Verification:
    """The verdict of :func:`verify_hotswap`. True in a condition if the live model equals the fresh one.

    Parameters
    ----------
    difference:
        The largest difference between an output of the live and of the fresh model.
    change:
        The largest difference that the new adapter makes to the base model's outputs. A comparison is worth
        something only if this is far above the tolerance.
    tolerance:
        The largest difference that is let through, absolute.
    mismatches:
        What else differs: config, scalars or tensors, in words.
    margin:
        How many times the tolerance the adapter's effect must be for the verdict to mean anything.

    Examples
    --------
    >>> from hotswap_lab import demo, verify_hotswap
    >>> model, _ = demo.load("sort")
    >>> verdict = verify_hotswap(model, demo.adapter_path("sort"))
    >>> bool(verdict), verdict.conclusive, verdict.mismatches
    (True, True, ())
    """

    difference: float
    change: float
    tolerance: float
    mismatches: tuple[str, ...] = ()
    margin: float = 100

    @property
    def conclusive(self) -> bool:
        """Whether the adapter changes the base model's outputs enough for a comparison to mean anything."""
        return self.change > self.margin * self.tolerance

    def __bool__(self) -> bool:
        return self.conclusive and self.difference <= self.tolerance and not self.mismatches

    def __str__(self) -> str:
        lines = [f"matches a fresh load: {bool(self)}"]
        if not self.conclusive:
            lines.append("inconclusive: on these inputs the adapter hardly changes the base model's outputs")
        if not self.difference <= self.tolerance:
            lines.append(f"outputs differ by up to {self.difference:.3g} (tolerance {self.tolerance:.3g})")
        lines += self.mismatches[:SHOWN]
        if (more := len(self.mismatches) - SHOWN) > 0:
            lines.append(f"and {more} more, see `mismatches`")
        return "\n".join(lines)

    __repr__ = __str__


def verify_hotswap(
    model: torch.nn.Module,
    adapter: str | os.PathLike | Adapter,
    adapter_name: str = "default",
    *,
    inputs: Mapping[str, torch.Tensor] | tuple | torch.Tensor | None = None,
    base: Callable[[], torch.nn.Module] | None = None,
    tolerance: float | None = None,
) -> Verification:
    """Compares the live model with ``PeftModel.from_pretrained(base, adapter)``.

    Parameters
    ----------
    model:
        The model after a swap, compiled or not. ``adapter_name`` must be its only active adapter.
    adapter:
        The adapter that was swapped in: a folder, a Hub id, or an :class:`Adapter` with the keys of a file, that
        is, without the adapter's name in them.
    adapter_name:
        Its name in the model.
    inputs:
        What to call the models with: a dict of keyword arguments, a tuple of arguments, or one tensor. Default:
        the ``dummy_inputs`` that transformers models bring.
    base:
        Makes a fresh base model, ``lambda: AutoModelForCausalLM.from_pretrained(...)``. Default: a copy of the
        model's own base without adapters, which takes as much memory as the model.
    tolerance:
        The allowed difference relative to the largest output. Default: 2e-5 in float32, more in half precision.

    Returns
    -------
    Verification
        True in a condition if the two can't be told apart.

    Raises
    ------
    HotswapError
        If there is no such adapter, here or at ``adapter``, if it isn't the active one, or if inputs are missing.

    Examples
    --------
    >>> from hotswap_lab import demo, hotswap_adapter, verify_hotswap
    >>> model, _ = demo.load("reverse")
    >>> hotswap_adapter(model, demo.adapter_path("sort"), "default")
    >>> verify_hotswap(model, demo.adapter_path("sort"))
    matches a fresh load: True
    >>> bool(verify_hotswap(model, demo.adapter_path("shout")))
    False
    """
    slot = resolve_slot(model, adapter_name)
    _check_active(slot)
    if inputs is None:
        inputs = getattr(slot.host.base, "dummy_inputs", None)
    if inputs is None:
        raise refuse(
            "The model can't be verified without inputs.",
            found=f"a {type(slot.host.base).__name__}, which brings no example inputs",
            expected="inputs to call the model with",
            next_step="pass inputs=... (a dict, a tuple or a tensor)",
        )
    make_base = base or (lambda: bare_base(slot.host))
    with (
        interrupts_held(),
        _as_folder(adapter) as folder,
        torch.no_grad(),
        in_use(model),
        _eval_mode(model),
    ):
        slot = resolve_slot(model, adapter_name)  # as it is now: a swap may have been waited for
        live_outputs = _call(model, inputs)
        with interruptible():
            fresh = make_base().eval()
        base_outputs = _call(fresh, inputs)
        trainable = not slot.config.inference_mode
        with compilers_kept(), random_numbers_kept(slot.config):
            fresh = PeftModel.from_pretrained(fresh, folder, adapter_name, is_trainable=trainable).eval()
        fresh_outputs = _call(fresh, inputs)
    largest = max(float(output.abs().max()) for output in fresh_outputs)
    relative = TOLERANCE[fresh_outputs[0].dtype] if tolerance is None else tolerance
    return Verification(
        difference=_difference(live_outputs, fresh_outputs),
        change=_difference(base_outputs, fresh_outputs),
        tolerance=relative * largest,
        mismatches=tuple(_mismatches(slot, fresh)),
        margin=MARGIN.get(fresh_outputs[0].dtype, 100),
    )


def bare_base(host: Host) -> torch.nn.Module:
    """A copy of the base model without any adapter."""
    base = unwrap_compiled(host.base)
    if not any("forward" in module.__dict__ for module in base.modules()):
        base = make_stand_in(base).model  # so that nothing but the base is copied
    base = unwrap_compiled(copy.deepcopy(base))
    base.__dict__.pop("peft_config", None)
    for module in list(base.modules()):
        for name, child in module._modules.items():
            while isinstance(child, WRAPPERS):
                child = module._modules[name] = inside(child)
    tensors = dict((*base.named_parameters(), *base.named_buffers()))
    for originals in base.__dict__.pop(ORIGINALS, {}).values():
        for name, original in originals.items():
            tensors[name].data.copy_(original)
    return base


def _check_active(slot: Slot) -> None:
    if not slot.layers:
        carrier = slot.host.carrier
        if list(carrier.active_adapters) == [slot.adapter_name] and not getattr(carrier, "_adapters_disabled", False):
            return
        raise refuse(
            f"The adapter {slot.adapter_name!r} is not what the model computes with now.",
            found=f"active adapters {list(carrier.active_adapters)}",
            expected=f"[{slot.adapter_name!r}] alone, enabled",
            next_step=f"call model.set_adapter({slot.adapter_name!r}) first",
        )
    layer = slot.layers[0].module
    if layer.disable_adapters or list(layer.active_adapters) != [slot.adapter_name] or layer.merged:
        raise refuse(
            f"The adapter {slot.adapter_name!r} is not what the model computes with now.",
            found=f"active adapters {list(layer.active_adapters)}, disabled: {layer.disable_adapters}, "
            f"merged: {layer.merged_adapters}",
            expected=f"[{slot.adapter_name!r}] alone, enabled and not merged",
            next_step=f"call model.set_adapter({slot.adapter_name!r}) first",
        )


@contextlib.contextmanager
def _as_folder(adapter: str | os.PathLike | Adapter) -> Iterator[str]:
    if not isinstance(adapter, Adapter):
        with interruptible():
            folder = find_folder(adapter)
        yield folder  # the very files: it is PEFT that reads them here
        return
    tensors = {_file_key(adapter, key): tensor.contiguous() for key, tensor in adapter.tensors.items()}
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(folder, adapter.config, tensors)
        yield folder


def _file_key(adapter: Adapter, key: str) -> str:
    if adapter.config.is_prompt_learning or key.startswith("base_model."):
        return key
    return PEFT_PREFIX + canonical_path(key)


@contextlib.contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        _back_to_training(training)


def _back_to_training(modules: list[torch.nn.Module]) -> None:
    for module in modules:
        module.training = True


def _call(model: torch.nn.Module, inputs: object) -> list[torch.Tensor]:
    with interruptible():
        if isinstance(inputs, Mapping):
            outputs = model(**inputs)
        elif isinstance(inputs, torch.Tensor):
            outputs = model(inputs)
        else:
            outputs = model(*inputs)
    tensors = list(_float_tensors(outputs))
    return [tensor.detach().clone() for tensor in tensors]


def _float_tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _float_tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _float_tensors(part)


def _difference(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    if [each.shape for each in first] != [each.shape for each in second]:
        return math.inf  # prompts make sequences longer
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(first, second, strict=True))


def _mismatches(slot: Slot, fresh: PeftModel) -> Iterator[str]:
    name = slot.adapter_name
    live_config, fresh_config = (_comparable(each) for each in (slot.config, fresh.peft_config[name]))
    for key in sorted((live_config.keys() | fresh_config.keys()) - PROVENANCE):
        if live_config.get(key) != fresh_config.get(key):
            yield f"config.{key} is {live_config.get(key)!r}, fresh {fresh_config.get(key)!r}"
    yield from _table_mismatches(slot, fresh)
    saved = {canonical_path(key): tensor for key, tensor in saved_tensors(slot).items()}
    expected = get_peft_model_state_dict(fresh, adapter_name=name, save_embedding_layers=False)
    expected = {canonical_path(key): tensor for key, tensor in expected.items()}
    if missing := sorted(expected.keys() - saved.keys()):
        yield f"{len(missing)} tensors of a fresh load are missing, such as {missing[0]}"
    if extra := sorted(saved.keys() - expected.keys()):
        yield f"{len(extra)} tensors that a fresh load lacks, such as {extra[0]}"
    different = [
        key
        for key in sorted(saved.keys() & expected.keys())
        if saved[key].dtype != expected[key].dtype or not torch.equal(saved[key], expected[key].cpu())
    ]
    if different:
        yield f"{len(different)} tensors differ from a fresh load, such as {different[0]}"


def _comparable(config: PeftConfig) -> dict:
    """For some architectures PEFT makes sets of what a file has as lists of names, empty ones among them."""
    return {
        key: set(value) if isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value) else value
        for key, value in config.to_dict().items()
    }


def _table_mismatches(slot: Slot, fresh: PeftModel) -> Iterator[str]:
    """What the tables that PEFT keeps on each layer say of the adapter, if that differs."""
    name = slot.adapter_name
    # several may be around each other; then the one that has the adapter comes last under its name
    live_wrappers = {canonical_path(path): module for path, module in LoadedAlone(slot.host, name).named_modules()}
    for path, module in wrappers_in(fresh.get_base_model()):
        live = live_wrappers.get(path)
        for table in getattr(module, "other_param_names", ()):
            expected = _entry(module, table, name)
            if expected is not None and not _are_equal(found := _entry(live, table, name), expected):
                found = float(found) if isinstance(found, torch.Tensor) and found.ndim == 0 else found
                yield f"{path}: {table} is {found!r}, fresh {expected!r}"


def _entry(module: torch.nn.Module | None, table_name: str, adapter_name: str) -> object | None:
    try:
        table = attrgetter(table_name)(module)
    except AttributeError:
        return None
    return table[adapter_name] if hasattr(table, "keys") and adapter_name in table else None


def _are_equal(first: object, second: object) -> bool:
    if isinstance(second, torch.nn.Module):
        # a dropout: a prepared one has another class, and the same p
        return getattr(first, "p", 0.0) == getattr(second, "p", 0.0)
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.shape == second.shape and torch.equal(first.detach().cpu(), second.detach().cpu())
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_are_equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(_are_equal, first, second))
    return bool(first == second)
