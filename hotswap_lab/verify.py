"""The oracle: compares a live model with a fresh load of its adapter.

PEFT makes the reference: a base model, and ``PeftModel.from_pretrained`` on it. The comparison covers everything that a
user can observe: outputs, config, the scalars of each layer, the tensors that PEFT would save and, with ``base=``, all
weights and buffers of the base model.

No code that plans or writes a swap runs here. The parts of the package that this module uses find the adapter in the
model and on the disk, and give the live model's tensors the names of a fresh load's
(:class:`~hotswap_lab.files.saving.LoadedAlone`). A tensor with a wrong name is a mismatch. Layers that a fresh load
lacks are left out if their weights are zero. Any other effect of such layers shows in the outputs.
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
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict

from . import compat
from .beyond.base_twin import base_tensors, make_base_twin
from .beyond.base_values import ORIGINALS
from .beyond.guards import compilers_kept, device_with_values, random_numbers_kept
from .core.adapter import Adapter
from .core.compiled import compiled_in
from .core.errors import HotswapError, refusal, refused
from .core.host import Host, canonical_path, find_host, key_in_file, name_in
from .core.journal import Journal
from .core.settings import PROVENANCE
from .core.slot import Slot
from .core.wrappers import has_adapter, inside, is_wrapper
from .figures.equality import Figure, Layer, equality
from .files.reading import find_source
from .files.saving import LoadedAlone, saved_tensors, write_adapter
from .swap import resolve_slot
from .threads import in_use

#: how far outputs may differ, relative to the largest output, by the precision they were computed in
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
HALF = (torch.float16, torch.bfloat16)
#: the least ratio of the adapter's effect to the tolerance, if not 100: half precision leaves no room for more
MARGIN = {torch.float16: 10, torch.bfloat16: 5}

#: tolerance and margin for a model that is not deterministic, in multiples of the difference between two calls
NOISE_TOLERANCE, NOISE_MARGIN = 2, 5

#: Rounding depends on the processor and on the model. Where float32 or float64 exceeds its tolerance, the limit is
#: measured: this many times the effect of changing the last bit of each weight. A float64 model may compute parts of it
#: in float32, which compiled code rounds in a different way, so there it is float32's last bit.
ROUNDINGS = 8
#: with a measured limit, the adapter's effect must show a scaling that is off by 1e-3
ROUNDING_MARGIN = 1000
#: for each precision an integer type of its size, its last bit, and float32's last bit
LAST_BITS = {torch.float32: (torch.int32, 1, 1), torch.float64: (torch.int64, 1, 1 << 29)}

#: how many mismatches a verdict shows
SHOWN = 10
#: the start of the names of config fields and of base weights, and the separator of a layer's path and its table's
CONFIG, BASE, TABLE = "config.", "the base model's ", ": "
TRAINED = f"{TABLE}requires_grad in "


#: the shape of an image or a sound from the model's config, by the name of the argument
SHAPES: dict[Any, Callable[[Any], tuple[int, ...]]] = {
    "pixel_values": lambda config: (2, config.num_channels, *[getattr(config, "image_size", 224)] * 2),
    "input_features": lambda config: (2, config.num_mel_bins, 2 * config.max_source_positions),
    "input_values": lambda config: (2, 16_000),
}


class InputsError(HotswapError):
    """The model can't be called without inputs of the caller's."""


@dataclass(frozen=True)
class Verification:
    """The verdict of :func:`verify_hotswap`. True in a condition if the live model equals the fresh one.

    Parameters
    ----------
    difference:
        The largest difference between an output of the live and of the fresh model.
    change:
        The largest difference that the new adapter makes to the base model's outputs. A comparison means something only
        if this is far above the tolerance.
    tolerance:
        The largest absolute difference that is accepted.
    mismatches:
        Other differences, as text: of the config, the scalars or the tensors.
    margin:
        The least ratio of `change` to `tolerance` for a conclusive verdict.
    noise:
        The largest difference between two calls of the fresh model; 0 if the model is deterministic.
    layers:
        For each layer with the adapter: its path, the relative difference of its tensors from a fresh load's (0 to 1),
        and the differences of its scalars, as text.

    Examples
    --------
    >>> from hotswap_lab import demo, verify_hotswap
    >>> model, _ = demo.load("sort")
    >>> verdict = verify_hotswap(model, demo.adapter_path("sort"))
    >>> bool(verdict), verdict.conclusive, verdict.mismatches
    (True, True, ())

    A notebook shows the verdict, and if it is False, a picture: gray is equal, red is not. :meth:`figure` always draws.
    """

    difference: float
    change: float
    tolerance: float
    mismatches: tuple[str, ...] = ()
    margin: float = 100
    noise: float = 0.0
    layers: tuple[Layer, ...] = ()

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
        if self.noise > 0:
            lines.append(f"the model is not deterministic: two calls of the fresh one differ by up to {self.noise:.3g}")
        if not self.difference <= self.tolerance:
            lines.append(f"outputs differ by up to {self.difference:.3g} (tolerance {self.tolerance:.3g})")
        lines += self.mismatches[:SHOWN]
        if (more := len(self.mismatches) - SHOWN) > 0:
            lines.append(f"and {more} more, see `mismatches`")
        return "\n".join(lines)

    __repr__ = __str__

    def figure(self) -> Figure:
        """A tile for each layer, gray if it is equal, and the differences in the config and in scalars."""
        return equality({"": self})

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {"text/plain": str(self)} if self or not self.layers else self.figure()._repr_mimebundle_()


def verify_hotswap(
    model: torch.nn.Module,
    adapter: str | os.PathLike[str] | Adapter,
    adapter_name: str | None = None,
    *,
    inputs: Mapping[str, torch.Tensor] | tuple[object, ...] | torch.Tensor | None = None,
    base: Callable[[], torch.nn.Module] | None = None,
    tolerance: float | None = None,
) -> Verification:
    """Compare the live model with ``PeftModel.from_pretrained(base, adapter)``.

    With ``base=``, the verdict is about the whole model. Without it, the reference is made on a copy of the live base
    model, so the verdict is about the adapter alone: if something has changed the base weights, both models have the
    change. If the live adapter has weights in half precision, the reference is loaded with
    ``autocast_adapter_dtype=False``, as the live one was.

    Parameters
    ----------
    model:
        The model after a swap, compiled or not. ``adapter_name`` must be its only active adapter.
    adapter:
        The adapter that was swapped in: a folder, a Hub id, or an :class:`Adapter` whose keys are those of a file,
        without the adapter's name.
    adapter_name:
        Its name in the model. Default: the only adapter in the model.
    inputs:
        The inputs for both models: a dict of keyword arguments, a tuple of arguments, or one tensor. Default, for
        transformers models: numbers of the shape that the config gives to images and sounds, or the ``dummy_inputs``. A
        compiled model recompiles for a new shape, so pass inputs that it was called with before.
    base:
        Makes a fresh base model, ``lambda: AutoModelForCausalLM.from_pretrained(...)``. Its weights and buffers are
        compared, too, up to rounding, except for those that are offloaded. Default: a copy of the model's own base
        without adapters, which takes as much memory as the model.
    tolerance:
        The allowed difference relative to the largest output. Default: 2e-5 in float32, more in half precision. If the
        outputs of a deterministic model differ by more, rounding is measured: the limit is then 8 times the effect of
        changing the last bit of each weight, if that is more.

    Returns
    -------
    Verification
        True in a condition if the two models are equal.

    Raises
    ------
    HotswapError
        If the adapter is missing, in the model or at ``adapter``; if it isn't the active one; or if inputs are missing.

    Examples
    --------
    >>> from hotswap_lab import demo, hotswap_adapter, verify_hotswap
    >>> model, _ = demo.load("reverse")
    >>> hotswap_adapter(model, demo.adapter_path("sort"), "default")
    >>> verify_hotswap(model, demo.adapter_path("sort"), base=demo.load_base)
    matches a fresh load: True
    >>> bool(verify_hotswap(model, demo.adapter_path("shout")))
    False
    """
    with _as_folder(adapter) as folder, in_use(model), torch.no_grad(), _eval_mode(model):
        slot = resolve_slot(model, name := name_in(model, adapter_name))
        host = slot.host
        _check_active(host, name)
        if is_example := inputs is None:
            inputs = _example_inputs(host.base)
        try:
            live_outputs = _call(model, inputs)
        except (AttributeError, TypeError, ValueError) as error:  # the model needs other inputs, such as Whisper
            if not is_example:
                raise
            raise InputsError(refusal("no_inputs", name=type(host.base).__name__, error=error)) from error
        fresh = (bare_base(host) if base is None else base()).eval()
        base_outputs = _call(fresh, inputs)
        how = dict(is_trainable=not host.configs[name].inference_mode)
        how["autocast_adapter_dtype"] = not any(tensor.parameter.dtype in HALF for tensor in slot.tensors)
        with compilers_kept(), random_numbers_kept(), device_with_values():
            fresh = PeftModel.from_pretrained(fresh, folder, name, **how).eval()
        fresh_outputs = _call(fresh, inputs)
        noise = _difference(fresh_outputs, _call(fresh, inputs))
        mismatches, layers = _compared(slot, fresh, with_base=base is not None)
        difference, change = (_difference(outputs, fresh_outputs) for outputs in (live_outputs, base_outputs))
        dtype, largest = fresh_outputs[0].dtype, max(float(output.abs().max()) for output in fresh_outputs)
        allowed = (TOLERANCE[dtype] if tolerance is None else tolerance) * largest
        margin = MARGIN.get(dtype, 100)
        if NOISE_TOLERANCE * noise > allowed:
            allowed, margin = NOISE_TOLERANCE * noise, NOISE_MARGIN
        elif tolerance is None and not noise and dtype in LAST_BITS and difference > allowed:
            measured = ROUNDINGS * _rounding(fresh, inputs, fresh_outputs, bool(compiled_in(model)))
            if measured > allowed:
                allowed, margin = measured, ROUNDING_MARGIN
    return Verification(difference, change, allowed, mismatches, margin, noise, layers)


def bare_base(host: Host) -> torch.nn.Module:
    """A copy of the base model without any adapter."""
    base = host.base
    if not any("forward" in module.__dict__ for module in base.modules()):
        base = make_base_twin(base).model  # to copy nothing but the base
    base = copy.deepcopy(base)
    base.__dict__.pop("peft_config", None)
    for module in list(base.modules()):
        for name, child in module._modules.items():
            while is_wrapper(child):
                child = module._modules[name] = inside(child)
    tensors = dict((*base.named_parameters(), *base.named_buffers()))
    for originals in base.__dict__.pop(ORIGINALS, {}).values():
        for name, original in originals.items():
            tensors[name].data.copy_(original)
    return base


def _check_active(host: Host, name: str) -> None:
    tuned = [module for module in host.base.modules() if isinstance(module, BaseTunerLayer)]
    layers = [layer for layer in tuned if has_adapter(layer, name)]
    for module in layers or [host.carrier]:
        active, merged = list(module.active_adapters), module.merged_adapters if layers else []
        disabled = module.disable_adapters if layers else getattr(module, "_adapters_disabled", False)
        if active != [name] or disabled or merged:
            raise refused("not_in_effect", adapter_name=name, active=active, disabled=disabled, merged=merged)


@contextlib.contextmanager
def _as_folder(adapter: str | os.PathLike[str] | Adapter) -> Iterator[str]:
    if not isinstance(adapter, Adapter):
        source = find_source(adapter, {})
        source.folder_with_config()  # first: it decides the version of the weights
        yield source.folder_with_weights()  # PEFT reads the files themselves
        return
    named = str if adapter.config.is_prompt_learning else key_in_file
    tensors = {named(key): tensor.contiguous() for key, tensor in adapter.tensors.items()}
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(folder, adapter.config, tensors)
        yield folder


@contextlib.contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    journal = Journal()
    try:
        for module in model.modules():
            if module.training:
                journal.set_attribute(module, "training", False)
        yield
        journal.roll_back()
    except BaseException:  # also for Ctrl-C during the line above
        journal.roll_back()
        raise


def _example_inputs(base: Any) -> Any:
    """Inputs for a transformers model: an image or a sound of the shape in its config, or its ``dummy_inputs``."""
    name, config = getattr(base, "main_input_name", None), getattr(base, "config", None)
    with contextlib.suppress(AttributeError, KeyError, TypeError):
        shape = SHAPES[name](config)
        numbers = torch.linspace(-1, 1, math.prod(shape), device=base.device).reshape(shape).to(base.dtype)
        start = getattr(config, "decoder_start_token_id", None)
        decoder = {} if start is None else {"decoder_input_ids": torch.full((2, 1), start, device=base.device)}
        return {name: numbers} | decoder
    with torch.device(getattr(base, "device", "cpu")):  # transformers' dummy_inputs don't name a device
        return getattr(base, "dummy_inputs", ())


def _call(model: torch.nn.Module, inputs: object) -> list[torch.Tensor]:
    inputs = (inputs,) if isinstance(inputs, torch.Tensor) else inputs
    outputs = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    tensors = [leaf for leaf in compat.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    return [tensor.detach().clone() for tensor in tensors if tensor.is_floating_point()]


def _difference(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    if [tensor.shape for tensor in first] != [tensor.shape for tensor in second]:
        return math.inf  # prompts make sequences longer
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(first, second, strict=True))


def _rounding(fresh: torch.nn.Module, inputs: object, outputs: list[torch.Tensor], is_compiled: bool) -> float:
    """How far outputs move if the last bit of each weight changes, which is about as far as rounding moves them."""

    def flip_bits() -> None:
        with torch.inference_mode():  # allows writing to tensors of either mode
            for parameter in fresh.parameters():
                if type(parameter.data) is torch.Tensor and parameter.dtype in LAST_BITS and not parameter.is_meta:
                    integer, last, last_of_float32 = LAST_BITS[parameter.dtype]
                    bits = parameter.data.view(integer)
                    bits.bitwise_xor_(last_of_float32 if is_compiled else last)

    flip_bits()
    try:
        return _difference(_call(fresh, inputs), outputs)
    finally:
        flip_bits()  # restores each bit, because `base` may have returned a model that is in use


def _compared(slot: Slot, fresh: PeftModel, with_base: bool) -> tuple[tuple[str, ...], tuple[Layer, ...]]:
    """The differences, as text and by layer."""
    host, name = slot.host, slot.adapter_name
    live = _facts(slot.config, LoadedAlone(slot), saved_tensors(slot), name)
    tensors = get_peft_model_state_dict(fresh, adapter_name=name, save_embedding_layers=False)
    expected = _facts(fresh.peft_config[name], fresh, tensors, name)
    # for an adapter that is frozen as a whole, as for inference, requires_grad is not compared
    if not any(True in value for key, value in live.items() if TRAINED in key):
        live, expected = ({k: v for k, v in facts.items() if TRAINED not in k} for facts in (live, expected))
    if with_base:
        live |= {f"{BASE}{key}": tensor for key, tensor in base_tensors(host.base).items()}
        expected |= {f"{BASE}{key}": tensor for key, tensor in base_tensors(find_host(fresh, name).base).items()}
    wrong = {}
    for key in sorted(expected.keys() | {key for key in live if TABLE not in key}):  # layers that are off have tables
        pair = live.get(key), expected.get(key)
        if not (_are_equal(*pair) or (key.startswith(BASE) and _differ_by_rounding(*pair))):
            wrong[key] = pair
    paths = dict.fromkeys(key.partition(TABLE)[0] for key in (*live, *expected) if TABLE in key)
    return tuple(_in_words(wrong)), tuple(_layer(path, wrong) for path in paths)


def _in_words(differences: Mapping[str, tuple]) -> Iterator[str]:
    wrong: dict[str, list[str]] = {}
    for key, (live, loaded) in differences.items():
        if TABLE in key or key.startswith(CONFIG):
            live = float(live) if isinstance(live, torch.Tensor) and live.ndim == 0 else live
            yield f"{key} is {live!r}, fresh {loaded!r}"
        else:
            problem = "differ from a fresh load"
            if live is None:
                problem = "of a fresh load are missing"
            elif loaded is None:
                problem = "that a fresh load lacks"
            wrong.setdefault(problem, []).append(key)
    yield from (f"{len(keys)} tensors {problem}, such as {keys[0]}" for problem, keys in wrong.items())


def _layer(path: str, differences: Mapping[str, tuple]) -> Layer:
    own = {key: pair for key, pair in differences.items() if key.startswith((f"{path}.", f"{path}{TABLE}"))}
    shares = [_share(*pair) for key, pair in own.items() if TABLE not in key]
    texts = [text.partition(TABLE)[2] for text in _in_words(own) if TABLE in text]
    if shares and not any(shares):
        texts.append("zeros on one side only, or another dtype")
    return path, max([0.0, *shares]), texts


def _share(live: torch.Tensor | None, loaded: torch.Tensor | None) -> float:
    """The norm of the difference of two tensors, relative to the larger one, 1 at most. None counts as zero."""
    zero = torch.zeros((), device="cpu")
    live, loaded = (zero if tensor is None else tensor.cpu().double() for tensor in (live, loaded))
    if live.ndim == loaded.ndim and live.shape != loaded.shape:
        return 1.0
    return min(float((live - loaded).norm() / max(live.norm(), loaded.norm(), 1e-30)), 1.0)


def _facts(config: PeftConfig, carrier: PeftModel | LoadedAlone, tensors: Mapping, adapter_name: str) -> dict:
    """The config fields, PEFT's values for each layer, ``requires_grad``, and the tensors of an adapter, by name."""
    facts = {f"{CONFIG}{key}": _comparable(value) for key, value in config.to_dict().items() if key not in PROVENANCE}
    for path, module in carrier.named_modules():
        for table in getattr(module, "other_param_names", ()):
            with contextlib.suppress(
                AttributeError, LookupError, TypeError
            ):  # a layer may lack the table or the adapter
                facts[f"{canonical_path(path)}{TABLE}{table}"] = attrgetter(table)(module)[adapter_name]
        for table in getattr(module, "adapter_layer_names", ()) if not config.inference_mode else ():
            with contextlib.suppress(AttributeError, LookupError, TypeError):
                weights = attrgetter(table)(module)[adapter_name]
                parameters = weights.parameters() if isinstance(weights, torch.nn.Module) else [weights]
                facts[f"{canonical_path(path)}{TRAINED}{table}"] = [parameter.requires_grad for parameter in parameters]
    return facts | {canonical_path(key): tensor for key, tensor in tensors.items()}


def _comparable(value: object) -> object:
    """A list of names as a set, even an empty one, because PEFT makes sets of these for some architectures."""
    return set(value) if isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value) else value


def _are_equal(first: object, second: object) -> bool:
    if isinstance(second, torch.nn.Module):
        # a dropout: a prepared one has a different class, and the same p
        return getattr(first, "p", 0.0) == getattr(second, "p", 0.0)
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.dtype == second.dtype and first.shape == second.shape and _have_same_bits(first, second)
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_are_equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(_are_equal, first, second))
    return bool(first == second)


def _differ_by_rounding(live: torch.Tensor | None, fresh: torch.Tensor | None) -> bool:
    """Whether weights differ only by rounding, as after merge and unmerge, or a forward of PEFT's attention layers."""
    if live is None or fresh is None or type(fresh.data) is not torch.Tensor or live.dtype != fresh.dtype:
        return False
    tolerance = TOLERANCE.get(fresh.dtype, 0.0) * float(fresh.double().abs().max())
    return _difference([live.cpu()], [fresh.cpu()]) <= tolerance


def _have_same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors are equal, including NaNs. An offloaded one can't be compared, and counts as equal."""
    if hasattr(first, "__tensor_flatten__") and type(first.data) is type(second.data):  # quantized, or sharded
        names = first.__tensor_flatten__()[0]
        return all(_have_same_bits(getattr(first, name), getattr(second, name)) for name in names)
    if first.is_meta or second.is_meta:
        return True
    return torch.equal(*(tensor.data.cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)))
