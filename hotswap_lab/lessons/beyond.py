"""Chapter 07: adapters of other kinds than plain LoRA, and how to read a refusal."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import peft
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

from .. import demo
from ..beyond.base_twin import make_base_twin
from ..engine import resolve_slot
from ..figures import Canvas, Figure
from ..figures.palette import BASE, LESS, MORE, MUTED, WHITE, mix
from ..files.reading import Adapter
from .exercise import Exercise

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]

# --- adapters of every kind ------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """A swap to try: what changes, and the configs of both adapters."""

    what: str
    old: PeftConfig
    new: PeftConfig


def _config(kind: str, *, on: Sequence[str] = ALL, **options: object) -> PeftConfig:
    return getattr(peft, f"{kind}Config")(target_modules=list(on), **options)


def _lora(r: int = 4, **options: object) -> PeftConfig:
    return _config("Lora", r=r, lora_alpha=8, **options)


def _ia3(
    on: Sequence[str] = ("k_proj", "v_proj", "down_proj"), inputs_of: Sequence[str] = ("down_proj",)
) -> PeftConfig:
    return _config("IA3", on=on, feedforward_modules=list(inputs_of))


def _oft(block: int) -> PeftConfig:
    # exact rotations: the fast approximation of them holds near zero only, and random weights are not
    return _config("OFT", oft_block_size=block, use_cayley_neumann=False)


def _prompt(tokens: int) -> PeftConfig:
    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens)


#: by the name of the kind: swaps from one adapter of it to another
PAIRS: dict[str, Pair] = {
    "LoRA": Pair("rank 4 to 16, on fewer layers", _lora(4), _lora(16, on=ATTENTION)),
    "LoRA to rsLoRA": Pair("rank 16 to 4, another scaling", _lora(16), _lora(4, use_rslora=True)),
    "DoRA": Pair("rank 4 to 16, on fewer layers", _lora(4, use_dora=True), _lora(16, on=ATTENTION, use_dora=True)),
    "LoRA with lora_bias": Pair("rank 4 to 16", _lora(4, lora_bias=True), _lora(16, lora_bias=True)),
    "LoRA to DoRA": Pair("a magnitude more on each layer", _lora(4), _lora(4, use_dora=True)),
    "DoRA to LoRA": Pair("a magnitude less on each layer", _lora(4, use_dora=True), _lora(4)),
    "LoRA, modules_to_save": Pair("an lm_head of its own", _lora(4), _lora(4, modules_to_save=["lm_head"])),
    "LoRA, trainable tokens": Pair(
        "four other tokens", _lora(4, trainable_token_indices=[5, 6]), _lora(4, trainable_token_indices=[7, 8, 9, 10])
    ),
    "LoHa": Pair("rank 4 to 6, another scaling", _config("LoHa", r=4, alpha=8), _config("LoHa", r=6, alpha=3)),
    "LoKr": Pair(
        "rank 2 to 4, other factors",
        _config("LoKr", r=2, alpha=4),
        _config("LoKr", r=4, alpha=2, decompose_both=True, decompose_factor=4),
    ),
    "IA3": Pair("on the attention only", _ia3(), _ia3(on=("k_proj", "v_proj"), inputs_of=())),
    "OFT": Pair("blocks of 4 to blocks of 8", _oft(4), _oft(8)),
    "VeRA": Pair(
        "rank 4 to 8, other random matrices",
        _config("Vera", on=ATTENTION, r=4),
        _config("Vera", on=ATTENTION, r=8, projection_prng_key=7),
    ),
    "LayerNorm tuning": Pair(
        "on more layers",
        _config("LNTuning", on=["input_layernorm", "norm"]),
        _config("LNTuning", on=["input_layernorm", "post_attention_layernorm", "norm"]),
    ),
    "Prompt tuning": Pair("4 virtual tokens to 7", _prompt(4), _prompt(7)),
}


@torch.no_grad()
def disturb(model: torch.nn.Module) -> None:
    """Moves all weights that would be trained away from where PEFT puts them, which often means "off"."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.add_(0.2 * torch.randn_like(parameter))


def load(config: PeftConfig, seed: int = 1) -> PeftModel:
    """The embedded base model with a random adapter, as PEFT would load it.

    >>> load(PAIRS["LoHa"].old).peft_config["default"].r
    4
    """
    base = demo.load_base()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(base, copy.deepcopy(config)).eval()
        disturb(model)
    model.peft_config["default"].inference_mode = True
    return model


def adapter(config: PeftConfig, seed: int = 2) -> Adapter:
    """A random adapter for the embedded base model, none of whose tensors means "off".

    >>> len(adapter(PAIRS["IA3"].old).tensors)
    12
    """
    return adapter_of(load(config, seed))


def adapter_of(model: torch.nn.Module) -> Adapter:
    config, tensors = model.peft_config["default"], get_peft_model_state_dict(model, adapter_name="default")
    return Adapter(config, tensors, f"a random {config.peft_type.value} adapter")


def pissa() -> tuple[Adapter, tempfile.TemporaryDirectory[str]]:
    """An adapter made with ``init_lora_weights="pissa"``, and a folder with what it was before training as ``start``.

    The adapter itself lies in that folder, too; ``source`` says where.
    """
    folder = tempfile.TemporaryDirectory()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa")
        model = get_peft_model(demo.load_base(), config)
        # saved as plain LoRA: loading it must not compute the start anew
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(f"{folder.name}/start")
        model.peft_config["default"].init_lora_weights = "pissa"
        disturb(model)
        model.save_pretrained(f"{folder.name}/trained")
    return Adapter.load(f"{folder.name}/trained"), folder


# --- pictures --------------------------------------------------------------------------------------------------------


def dora(row: torch.Tensor, change: torch.Tensor) -> Figure:
    """DoRA in one picture: a row of a weight matrix, what LoRA makes of it, and what DoRA makes of that at first.

    The rows have many numbers, but two of them always lie in one plane: this is that plane, with true lengths and
    a true angle.

    Parameters
    ----------
    row, change:
        A row of ``W`` and the same row of ``scaling * B @ A``.
    """
    row, turned = row.detach().double(), (row + change).detach().double()
    before, after = float(row.norm()), float(turned.norm())
    angle = math.acos(max(-1.0, min(1.0, float(row @ turned) / (before * after))))
    # a small angle begins at a slant, so that the arrows don't lie on the baseline
    tilt = max(0.0, 0.45 - angle / 2)
    vectors = (
        (before, tilt, BASE, 9, "frozen:  w"),
        (after, tilt + angle, LESS, 9, "LoRA:  v = w + scaling · B A"),
        (before, tilt + angle, MORE, 4, "DoRA:  m · v / ‖v‖"),
    )
    scale = 205 / max(before, after)
    canvas, ends = Canvas(660, 330), []
    canvas.text(330, 26, "One row of a weight matrix, in the plane that it is turned in", size=15)
    for number, (length, at, color, thickness, formula) in enumerate(vectors):
        # rounded: the last digits differ from machine to machine, and tests of notebooks compare pictures
        ends.append((round(70 + length * scale * math.cos(at), 1), round(286 - length * scale * math.sin(at), 1)))
        canvas.line(70, 286, *ends[-1], color, width=thickness)
        top = 92 + number * 62
        canvas.line(400, top - 5, 428, top - 5, color, width=thickness)
        canvas.text(438, top, formula, anchor="start", size=14)
        canvas.text(438, top + 20, f"length {length:.2f}", anchor="start", size=12, color=MUTED)
    (x1, y1), (x2, y2), (x3, y3) = ends
    canvas.line(x1, y1, x2, y2, MUTED, width=1.5, dashed=True)
    canvas.text((x1 + x2) / 2 + 12, (y1 + y2) / 2, "+ scaling · B A", size=12, anchor="start")
    canvas.shapes.append(
        f"<path d='M{x1} {y1} A{before * scale:.1f} {before * scale:.1f} 0 0 0 {x3} {y3}' "
        f"fill='none' stroke='{MORE}' stroke-dasharray='3 4'/>"
    )
    degrees = round(math.degrees(angle))
    canvas.text(438, 278, f"turned by {degrees}°", anchor="start", size=12, color=MUTED)
    note = "The direction comes from W, A and B. The length is m, a number that is trained for each row."
    canvas.text(330, 318, note, color=MUTED)
    return canvas.figure(
        f"DoRA: W' = m (W + scaling B A) / ||W + scaling B A||, row by row. One row: w has the length {before:.2f}; "
        f"LoRA adds to it and makes a row of length {after:.2f}, turned by {degrees} degrees; DoRA takes that "
        f"direction and the length m = {before:.2f}."
    )


#: how many numbers of each vector the picture shows
SHOWN = 14


def ia3(vectors: Mapping[str, torch.Tensor]) -> Figure:
    """IA3 in one picture: three vectors of one block, each a factor for every number that passes.

    Parameters
    ----------
    vectors:
        Those of ``k_proj`` and ``v_proj``, which scale what comes out, and of ``down_proj``, which scales what goes
        in.
    """
    values = {name: vector.detach().flatten() for name, vector in vectors.items()}
    canvas = Canvas(680, 316)
    canvas.text(340, 28, "One block: every number that passes here is multiplied by a factor of its own", size=15)
    largest = max(float((vector - 1).abs().max()) for vector in values.values())
    # from left to right: the layer and then the factors, or the other way round
    scales_outputs = 118, 254, 268, ((88, 112), (522, 582))
    scales_inputs = 430, 384, 128, ((88, 122), (400, 426), (544, 582))
    for number, (name, into, out, (layer, sign, strip, arrows)) in enumerate(
        (
            ("k_proj", "x", "keys", scales_outputs),
            ("v_proj", "x", "values", scales_outputs),
            ("down_proj", "gate · up", "output", scales_inputs),
        )
    ):
        y, vector = 62 + number * 72, values[name]
        canvas.box(layer, y, 110, 38, BASE)
        for x, text in ((52, into), (layer + 55, name), (sign, "⊙"), (strip + SHOWN * 16 + 10, "…"), (622, out)):
            canvas.text(x, y + 24, text, size=14)
        for start, stop in arrows:
            canvas.arrow(start, y + 19, stop, y + 19)
        for column, value in enumerate(vector[:SHOWN].tolist()):
            canvas.box(strip + column * 16, y + 4, 16, 30, _shade(value - 1, largest))
        canvas.text(strip + SHOWN * 8, y + 52, f"{vector.numel()} factors", size=11, color=MUTED)
    for x, color, meaning in ((150, LESS, "below 1"), (270, WHITE, "1: as without it"), (430, MORE, "above 1")):
        canvas.box(x, 284, 16, 16, color)
        canvas.text(x + 24, 297, meaning, size=12, anchor="start", color=MUTED)
    total = sum(vector.numel() for vector in values.values())
    listed = ", ".join(f"{name} {vector.numel()}" for name, vector in values.items())
    return canvas.figure(
        f"IA3: three vectors in each block, {total} factors in all ({listed}). Those of k_proj and v_proj multiply "
        "what comes out of the layer, that of down_proj what goes into it. A factor of 1 changes nothing."
    )


def _shade(value: float, largest: float) -> str:
    """White for zero, up to a full color for the largest; one color below zero, one above."""
    return mix(MORE if value > 0 else LESS, min(abs(value) / largest, 1), WHITE)


# --- exercises -------------------------------------------------------------------------------------------------------


@Exercise
@torch.no_grad()
def turn_off(solution):
    """Write values with which a DoRA or an IA3 layer computes what its base layer does. About 5 lines."""
    for kind in ("DoRA", "IA3"):
        slot = resolve_slot(load(PAIRS[kind].old), "default")
        addresses, equal = slot.data_ptrs(), 0
        for layer in slot.layers:
            solution(layer.module)
            base = layer.module.get_base_layer()
            inputs = torch.randn(2, base.in_features, generator=torch.Generator().manual_seed(0))
            equal += torch.allclose(layer.module(inputs), base(inputs), atol=1e-4)
        yield f"{kind} layers that compute what their base does", equal, len(slot.layers)
        yield f"{kind}: the addresses stay the same", slot.data_ptrs() == addresses, True


def _vera(key: int) -> PeftConfig:
    return _config("Vera", on=ATTENTION, r=4, projection_prng_key=key)


#: by what differs between the two adapters: the old and the new config
SAME_STRUCTURE = {
    "values of parameters": (_ia3(), _ia3()),
    "values of buffers, too": (_vera(0), _vera(7)),
    "numbers, too": (_config("LoHa", r=4, alpha=8), _config("LoHa", r=4, alpha=16)),
}


def fresh_around(model: PeftModel, new: Adapter) -> PeftModel:
    """A fresh load of an adapter around the memory of a model's base.

    >>> model = load(_ia3())
    >>> fresh = fresh_around(model, adapter(_ia3()))
    >>> norms = [each.get_base_model().model.norm for each in (model, fresh)]
    >>> norms[0] is norms[1], norms[0].weight.data_ptr() == norms[1].weight.data_ptr()
    (False, True)
    """
    fresh = PeftModel(make_base_twin(model.get_base_model()).model, copy.deepcopy(new.config), "default").eval()
    set_peft_model_state_dict(fresh, new.tensors, "default")
    return fresh


@Exercise
@torch.no_grad()
def make_equal(solution):
    """Make ``live`` compute what ``fresh`` does, in place, whatever the method is. About 6 lines."""
    for what, (old, new) in SAME_STRUCTURE.items():
        live = load(old)
        inputs = live.get_base_model().dummy_inputs
        fresh, addresses = fresh_around(live, adapter(new)), resolve_slot(live, "default").data_ptrs()
        before = live.get_base_model().model.norm.weight.clone()
        expected = fresh(**inputs).logits
        solution(live, fresh)
        yield f"equal: {what}", torch.allclose(live(**inputs).logits, expected, atol=1e-4), True
        kept = resolve_slot(live, "default").data_ptrs() == addresses and torch.equal(
            live.get_base_model().model.norm.weight, before
        )
        yield f"addresses and base kept: {what}", kept, True
