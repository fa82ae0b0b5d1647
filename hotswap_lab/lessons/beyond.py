"""Chapter 07: adapters of other kinds than plain LoRA, and how to read a refusal."""

from __future__ import annotations

import copy
import math
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import peft
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict

from .. import demo
from ..core.adapter import Adapter
from ..core.hotswap import plan_hotswap
from ..core.plan import Plan
from ..core.report import html_table
from ..core.slot import resolve_slot
from .exercise import Exercise, Result
from .figures import FROZEN, MUTED, NEW, OLD, Canvas, Figure

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
ALL = [*ATTENTION, *MLP]

# --- adapters of every kind ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A swap to try: what changes, and the configs of both adapters."""

    what: str
    old: PeftConfig
    new: PeftConfig


def _lora(r: int = 4, *, on: Sequence[str] = ALL, **options: object) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=8, target_modules=list(on), **options)


def _other(kind: str, *, on: Sequence[str] | None = ALL, **options: object) -> PeftConfig:
    if on is not None:
        options["target_modules"] = list(on)
    return getattr(peft, f"{kind}Config")(**options)


def _ia3(*, on: Sequence[str] = ("k_proj", "v_proj", "down_proj"), **options: object) -> PeftConfig:
    return _other("IA3", on=on, **{"feedforward_modules": ["down_proj"], **options})


def _prompt(tokens: int) -> PeftConfig:
    return _other("PromptTuning", on=None, task_type="CAUSAL_LM", num_virtual_tokens=tokens)


def _oft(block: int) -> PeftConfig:
    # exact rotations: the fast approximation of them holds near zero only, and random weights are not
    return _other("OFT", oft_block_size=block, use_cayley_neumann=False)


def _vera(r: int, **options: object) -> PeftConfig:
    # the random matrices are not in the file: each load draws them anew from their seed, and PEFT remarks on it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _other("Vera", on=ATTENTION, r=r, save_projection=False, **options)


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
    "LoHa": Pair("rank 4 to 6, another scaling", _other("LoHa", r=4, alpha=8), _other("LoHa", r=6, alpha=3)),
    "LoKr": Pair(
        "rank 2 to 4, other factors",
        _other("LoKr", r=2, alpha=4),
        _other("LoKr", r=4, alpha=2, decompose_both=True, decompose_factor=4),
    ),
    "IA3": Pair("on the attention only", _ia3(), _ia3(on=("k_proj", "v_proj"), feedforward_modules=[])),
    "OFT": Pair("blocks of 4 to blocks of 8", _oft(4), _oft(8)),
    "VeRA": Pair(
        "rank 4 to 8, other random matrices",
        _vera(4),
        _vera(8, projection_prng_key=7),
    ),
    "LayerNorm tuning": Pair(
        "on more layers",
        _other("LNTuning", on=["input_layernorm", "norm"]),
        _other("LNTuning", on=["input_layernorm", "post_attention_layernorm", "norm"]),
    ),
    "Prompt tuning": Pair("4 virtual tokens to 7", _prompt(4), _prompt(7)),
}


def _randomised(base: torch.nn.Module, config: PeftConfig, seed: int) -> PeftModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(base, copy.deepcopy(config))
        _disturb(model)
    return model


@torch.no_grad()
def _disturb(model: torch.nn.Module) -> None:
    """Moves all weights that would be trained away from where PEFT puts them, which often means "off"."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.add_(0.2 * torch.randn_like(parameter))


def load(config: PeftConfig, seed: int = 1) -> PeftModel:
    """The embedded base model with a random adapter, loaded by PEFT from a folder as any other.

    >>> load(PAIRS["LoHa"].old).peft_config["default"].r
    4
    """
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        _randomised(demo.load_base(), config, seed).save_pretrained(folder)
        return PeftModel.from_pretrained(demo.load_base(), folder)


def adapter(config: PeftConfig, seed: int = 2) -> Adapter:
    """A random adapter for the embedded base model, none of whose tensors means "off".

    It is read back from a file that PEFT wrote, so config and keys are those of any other adapter.

    >>> len(adapter(PAIRS["IA3"].old).tensors)
    12
    """
    with tempfile.TemporaryDirectory() as folder:
        _randomised(demo.load_base(), config, seed).save_pretrained(folder)
        read = Adapter.load(folder)
        tensors = {key: tensor.clone() for key, tensor in read.tensors.items()}
        return Adapter(read.config, tensors, f"a random {read.config.peft_type.value} adapter")


def pissa() -> tuple[Adapter, tempfile.TemporaryDirectory]:
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
        _disturb(model)
        model.save_pretrained(f"{folder.name}/trained")
    return Adapter.load(f"{folder.name}/trained"), folder


# --- the table -------------------------------------------------------------------------------------------------------


def way(plan: Plan) -> str:
    """Which way a swap goes: the library knows the method itself, or PEFT loads the adapter onto a stand-in.

    >>> way(plan_hotswap(load(PAIRS["LoRA"].old), adapter(PAIRS["LoRA"].new)))
    'direct'
    """
    return "direct" if plan.grafting is None else "stand-in"


@dataclass(frozen=True)
class Table:
    """Rows under a header; shows itself in a notebook and as text.

    >>> print(Table("Two", ("a", "b"), ((1, 22), (333, 4))))
    a    b
    1    22
    333  4
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple, ...]

    def __str__(self) -> str:
        lines = [tuple(map(str, row)) for row in (self.header, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(self.title, self.header, self.rows, caption=f"{len(self.rows)} swaps")


def table(rows: Iterable[Sequence[object]]) -> Table:
    """The table of the chapter. A row is the kind, what changes, the way of the swap and the oracle's verdict."""
    header = ("kind", "what changes", "way", "matches a fresh load")
    return Table("One swap of each kind", header, tuple((*row[:3], bool(row[3])) for row in rows))


# --- pictures --------------------------------------------------------------------------------------------------------


#: where the arc of all directions ends
ARC = math.radians(82)


def dora(row: torch.Tensor, change: torch.Tensor, magnitude: float | None = None) -> Figure:
    """DoRA in one picture: a row of a weight matrix, what LoRA makes of it, and what DoRA makes of that.

    The rows have many numbers, but two of them always lie in one plane: this is that plane, with true lengths and
    a true angle.

    Parameters
    ----------
    row, change:
        A row of ``W`` and the same row of ``scaling * B @ A``.
    magnitude:
        The length that DoRA gives it. Default: that of ``row``, with which DoRA's training begins.
    """
    row, turned = row.detach().double(), (row + change).detach().double()
    before, after = float(row.norm()), float(turned.norm())
    length = before if magnitude is None else float(magnitude)
    angle = math.acos(max(-1.0, min(1.0, float(row @ turned) / (before * after))))
    canvas = Canvas(660, 330)
    x, y = 70, 286
    # a small angle begins at a slant, so that the arrows don't lie on the baseline
    tilt = max(0.0, 0.45 - angle / 2)
    ends = [(before, tilt), (after, tilt + angle), (length, tilt), (length, ARC)]
    width, height = (max(size * abs(part(at)) for size, at in ends) for part in (math.cos, math.sin))
    scale = min(240 / width, 205 / height)

    def point(size: float, at: float) -> tuple[float, float]:
        return x + size * scale * math.cos(at), y - size * scale * math.sin(at)

    _arc(canvas, point(length, tilt), point(length, ARC), length * scale)
    head, lora, whole = point(before, tilt), point(after, tilt + angle), point(length, tilt + angle)
    _thick(canvas, (x, y), head, FROZEN, 9)
    _thick(canvas, (x, y), lora, OLD, 9)
    _thick(canvas, (x, y), whole, NEW, 4)
    _thick(canvas, head, lora, MUTED, 1.5, dashed=True)
    canvas.text((head[0] + lora[0]) / 2 + 12, (head[1] + lora[1]) / 2, "+ scaling · B A", size=12, anchor="start")
    degrees = round(math.degrees(angle))
    canvas.text(330, 26, "One row of a weight matrix, in the plane that it is turned in", size=15)
    for number, (color, name, value, formula) in enumerate(
        (
            (FROZEN, "frozen", before, "w"),
            (OLD, "LoRA", after, "v = w + scaling · B A"),
            (NEW, "DoRA", length, "m · v / ‖v‖"),
        )
    ):
        top = 92 + number * 62
        _thick(canvas, (400, top - 5), (428, top - 5), color, 9 if color != NEW else 4)
        canvas.text(438, top, f"{name}:  {formula}", anchor="start", size=14)
        canvas.text(438, top + 20, f"length {value:.2f}", anchor="start", size=12, color=MUTED)
    canvas.text(438, 92 + 3 * 62, f"turned by {degrees}°", anchor="start", size=12, color=MUTED)
    canvas.text(
        330,
        318,
        "The direction comes from W, A and B. The length is m, a number that is trained for each row.",
        color=MUTED,
    )
    return canvas.figure(
        f"DoRA: W' = m (W + scaling B A) / ||W + scaling B A||, row by row. One row: w has the length {before:.2f}; "
        f"LoRA adds to it and makes a row of length {after:.2f}, turned by {degrees} degrees; DoRA takes that "
        f"direction and the length m = {length:.2f}."
    )


def _arc(canvas: Canvas, start: tuple[float, float], stop: tuple[float, float], radius: float) -> None:
    canvas.shapes.append(
        f"<path d='M{start[0]:.1f} {start[1]:.1f} A{radius:.1f} {radius:.1f} 0 0 0 {stop[0]:.1f} {stop[1]:.1f}' "
        f"fill='none' stroke='{NEW}' stroke-dasharray='3 4'/>"
    )
    canvas.text(stop[0], stop[1] - 8, "length m", size=11, color=MUTED)


def _thick(
    canvas: Canvas,
    start: tuple[float, float],
    stop: tuple[float, float],
    color: str,
    width: float,
    *,
    dashed: bool = False,
) -> None:
    dash = " stroke-dasharray='4 3'" if dashed else ""
    canvas.shapes.append(
        f"<line x1='{start[0]:.1f}' y1='{start[1]:.1f}' x2='{stop[0]:.1f}' y2='{stop[1]:.1f}' stroke='{color}' "
        f"stroke-width='{width:g}' stroke-linecap='round'{dash}/>"
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
    for number, (name, into, out) in enumerate(
        (("k_proj", "x", "keys"), ("v_proj", "x", "values"), ("down_proj", "gate · up", "output"))
    ):
        y, vector = 62 + number * 72, values[name]
        feeds = name == "down_proj"
        canvas.text(52, y + 24, into, size=14)
        box, strip = (430, 128) if feeds else (118, 268)
        canvas.arrow(88, y + 19, (strip if feeds else box) - 6, y + 19)
        canvas.box(box, y, 110, 38, FROZEN)
        canvas.text(box + 55, y + 24, name, size=14)
        _strip(canvas, strip, y + 4, vector[:SHOWN].tolist(), largest)
        sign = strip + SHOWN * 16 + 32 if feeds else strip - 14
        canvas.text(sign, y + 24, "⊙", size=17)
        if feeds:
            canvas.arrow(sign + 16, y + 19, box - 4, y + 19)
            canvas.arrow(box + 114, y + 19, 582, y + 19)
        else:
            canvas.arrow(strip + SHOWN * 16 + 30, y + 19, 582, y + 19)
        canvas.text(strip + SHOWN * 8, y + 52, f"{vector.numel()} factors", size=11, color=MUTED)
        canvas.text(622, y + 24, out, size=14)
    for x, color, meaning in ((150, OLD, "below 1"), (270, "#ffffff", "1: as without it"), (430, NEW, "above 1")):
        _cell(canvas, x, 284, color)
        canvas.text(x + 24, 297, meaning, size=12, anchor="start", color=MUTED)
    total = sum(vector.numel() for vector in values.values())
    listed = ", ".join(f"{name} {vector.numel()}" for name, vector in values.items())
    return canvas.figure(
        f"IA3: three vectors in each block, {total} factors in all ({listed}). Those of k_proj and v_proj multiply "
        "what comes out of the layer, that of down_proj what goes into it. A factor of 1 changes nothing."
    )


def _strip(canvas: Canvas, x: float, y: float, values: Sequence[float], largest: float) -> None:
    for number, value in enumerate(values):
        _cell(canvas, x + number * 16, y, _shade(value - 1, largest), height=30)
    canvas.text(x + len(values) * 16 + 10, y + 20, "…", size=15, color=MUTED)


def _cell(canvas: Canvas, x: float, y: float, fill: str, *, height: float = 16) -> None:
    canvas.shapes.append(f"<rect x='{x:g}' y='{y:g}' width='16' height='{height:g}' fill='{fill}' stroke='{MUTED}'/>")


def _shade(value: float, largest: float) -> str:
    """White for zero, up to a full colour for the largest; one colour below zero, one above."""
    share = min(abs(value) / largest, 1)
    full = [int((NEW if value > 0 else OLD)[start : start + 2], 16) for start in (1, 3, 5)]
    return "#" + "".join(f"{round(255 + share * (each - 255)):02x}" for each in full)


# --- exercise: off ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def _turn_off(solution: Callable) -> list[Result]:
    results = []
    for kind, config in (("DoRA", PAIRS["DoRA"].old), ("IA3", PAIRS["IA3"].old)):
        model = load(config)
        slot = resolve_slot(model, "default")
        addresses = slot.data_ptrs()
        equal = 0
        for layer in slot.layers:
            solution(layer.module)
            base = layer.module.get_base_layer()
            inputs = torch.randn(2, base.in_features, generator=torch.Generator().manual_seed(0))
            equal += torch.allclose(layer.module(inputs), base(inputs), atol=1e-4)
        count = len(slot.layers)
        results.append(Result(f"{kind} layers that compute what their base does", equal, count))
        results.append(Result(f"{kind}: the addresses stay the same", slot.data_ptrs() == addresses, True))
    return results


turn_off = Exercise(
    "`layer` has an adapter called 'default', either DoRA or IA3. Write values, in place, with which it computes what\n"
    "its base layer does. About 5 lines. Gradients are off.\n"
    '  IA3:  layer.ia3_l["default"]. A DoRA layer has no attribute ia3_l.\n'
    '  DoRA: layer.lora_B["default"].weight and layer.lora_magnitude_vector["default"].weight\n'
    "  both: layer.get_base_layer().weight, of shape (outputs, inputs)",
    _turn_off,
)


# --- exercise: values only? ------------------------------------------------------------------------------------------

#: by what is swapped: the old and the new config
CONSTANTS = {
    "IA3 to IA3, just alike": (_ia3(), _ia3()),
    "IA3 to IA3 with down_proj scaled at its outputs": (_ia3(), _ia3(feedforward_modules=[])),
    "LoHa to LoHa of another alpha": (_other("LoHa", r=4, alpha=8), _other("LoHa", r=4, alpha=16)),
    "LoHa to LoHa of another rank": (_other("LoHa", r=4, alpha=8), _other("LoHa", r=8, alpha=16)),
    "IA3 to IA3 on fewer layers": (_ia3(), _ia3(on=("k_proj", "down_proj"))),
    "VeRA to VeRA of another rank": (_vera(4), _vera(8)),
    "VeRA to VeRA with another d_initial": (_vera(4), _vera(4, d_initial=0.3)),
    "prompt of 4 tokens to one of 7": (_prompt(4), _prompt(7)),
}


def writes_values_only(old: PeftConfig, new: PeftConfig) -> bool:
    """Whether a swap changes nothing but values of tensors, by planning it on the embedded model.

    >>> writes_values_only(*CONSTANTS["IA3 to IA3, just alike"])
    True
    """
    return plan_hotswap(load(old), adapter(new)).writes_values_only


def _values_only(solution: Callable) -> list[Result]:
    return [
        Result(what, solution(copy.deepcopy(old), copy.deepcopy(new)), writes_values_only(old, new))
        for what, (old, new) in CONSTANTS.items()
    ]


values_only = Exercise(
    "`old` and `new` are configs of the same PEFT type, not LoRA. Return whether a swap from one to the other writes\n"
    "values only, so that a compiled model could take it: True or False. The model is not prepared. About 3 lines.\n"
    "All fields: vars(config). VeRA's d_initial says which values its training begins with.",
    _values_only,
)


# --- a diffusers model -----------------------------------------------------------------------------------------------

UNET_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]

#: adapters for :func:`unet`; ``conv1`` is a convolution
UNET_CONFIGS: dict[str, PeftConfig] = {
    "style": LoraConfig(r=4, lora_alpha=6, target_modules=[*UNET_ATTENTION, "conv1"]),
    "face": LoraConfig(r=8, lora_alpha=5, target_modules=UNET_ATTENTION, use_rslora=True),
    "line art": LoraConfig(r=2, lora_alpha=9, target_modules=["conv1"], use_dora=True),
}


def unet(config: PeftConfig | None = None, seed: int = 1) -> torch.nn.Module:
    """A tiny UNet with random weights, as in an image model, and with a random adapter if a config is given.

    Raises ``ImportError`` where diffusers is not installed.
    """
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=8,
            attention_head_dim=4,
        ).eval()
        if config is not None:
            torch.manual_seed(seed)
            model.add_adapter(copy.deepcopy(config), "default")
            _disturb(model)
    return model


def unet_adapter(config: PeftConfig, seed: int = 1) -> Adapter:
    """A random adapter for :func:`unet`."""
    tensors = get_peft_model_state_dict(unet(config, seed), adapter_name="default")
    tensors = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    return Adapter.from_state_dict(tensors, copy.deepcopy(config))


def unet_inputs() -> dict[str, torch.Tensor]:
    """A noisy picture, a time step and an encoded prompt, all of them random."""
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(1, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([3]),
        "encoder_hidden_states": torch.randn(1, 5, 8, generator=generator),
    }
