"""Chapter 06: pictures of pictures, exercises, and a large pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..core.slot import SlotLayer
from ..demo import digits
from ..figures import Canvas, Figure
from ..figures.palette import BLACK, WHITE, mix
from ..figures.png import address, png
from ..pipelines.lora_files import read_pipeline_lora
from ..pipelines.pipeline import hotswap_pipeline, plan_pipeline_hotswap, prepare_pipeline_for_compiled_hotswap
from ..swap import prepare_model_for_compiled_hotswap, resolve_slot
from ..verify import verify_hotswap
from ..watch import RecompileWatch
from .exercise import Exercise

# --- pictures --------------------------------------------------------------------------------------------------------

#: the side of a drawn digit on the page, in pixels
CELL = 52


def grid(rows: Mapping[str, torch.Tensor], columns: Sequence[str] = ()) -> Figure:
    """Rows of drawn digits, one row for each label.

    Parameters
    ----------
    rows:
        By their labels, pictures of shape ``(count, height, width)``, 0 for black to 1 for white.
    columns:
        What to write above the columns.

    Examples
    --------
    >>> print(grid({"black": torch.zeros(2, 16, 16), "white": torch.ones(2, 16, 16)}))
    2 pictures in each row: black, white
    """
    count, left = max(map(len, rows.values())), 96
    top = 30 if columns else 12
    canvas = Canvas(left + count * CELL + 12, top + len(rows) * (CELL + 4) + 8)
    for number, text in enumerate(columns):
        canvas.text(left + (number + 0.5) * CELL, 20, text, size=12)
    for number, (label, images) in enumerate(rows.items()):
        y = top + number * (CELL + 4)
        canvas.text(left - 10, y + CELL / 2 + 4, label, anchor="end")
        canvas.shapes.append(
            f"<image x='{left}' y='{y}' width='{len(images) * CELL}' height='{CELL}' preserveAspectRatio='none' "
            f"href='{address(_png(images))}'/>"
        )
    above = f", from left to right {', '.join(columns)}" if columns else ""
    return canvas.figure(f"{count} pictures in each row: {', '.join(rows)}{above}")


@dataclass(frozen=True, repr=False)
class Drawn:
    """Drawn digits side by side, as an image that Jupyter and a panel show."""

    images: torch.Tensor

    def __repr__(self) -> str:
        return f"{len(self.images)} drawn digits"

    def _repr_png_(self) -> bytes:
        return _png(self.images, scale=3)


def _png(images: torch.Tensor, scale: int = 1) -> bytes:
    """Pictures side by side as one small file: the reader's browser enlarges it, and the notebook stays small."""
    # 16 shades of gray are what scikit-learn's digits have, and take half the bytes of 256
    shades = (torch.cat(list(images), dim=1) * 15).round().int()
    shades = shades.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    return png(shades.tolist(), [mix(WHITE, shade / 15, BLACK) for shade in range(16)])


# --- exercises -------------------------------------------------------------------------------------------------------


@Exercise
@torch.no_grad()
def one_filter(solution):
    """Return the weight of the one convolution that does what A, B and the scaling do together. About 2 lines."""
    layers = resolve_slot(digits.load("slanted"), "default").layers
    modules = [layer.module for layer in layers if isinstance(layer.module.get_base_layer(), torch.nn.Conv2d)]
    equal = 0
    for module in modules:
        base = module.get_base_layer()
        a, b = (each["default"].weight.clone() for each in (module.lora_A, module.lora_B))
        yours = torch.as_tensor(solution(a, b, module.scaling["default"]))
        if module is modules[0]:
            yield "the shape of the first filter", tuple(yours.shape), tuple(base.weight.shape)
        if yours.shape == base.weight.shape:
            picture = torch.randn(1, base.in_channels, 6, 6, generator=torch.Generator().manual_seed(0))
            added = F.conv2d(picture, yours, None, base.stride, base.padding, base.dilation, base.groups)
            equal += torch.allclose(module(picture), base(picture) + added, atol=1e-4)
    yield "layers that one filter computes", equal, len(modules)


@Exercise
@torch.no_grad()
def halfway(solution):
    """Draw the first ``at`` steps with one adapter and the other steps with another. About 4 lines."""
    model, scheduler = digits.load("only_3"), digits.load_scheduler()
    prepare_model_for_compiled_hotswap(model, adapters=[digits.path(name) for name in digits.names()])
    scheduler.set_timesteps(digits.STEPS)
    for first, second, at in (("only_7", "bold", 0), ("bold", "only_0", digits.STEPS), ("only_3", "slanted", 4)):
        expected, yours = digits.noise(2), solution(model, scheduler, digits.noise(2), first, second, at)
        fresh = [digits.load(first)] * at + [digits.load(second)] * (digits.STEPS - at)
        for drawing, when in zip(fresh, scheduler.timesteps, strict=True):
            expected = scheduler.step(drawing(expected, when).sample, when, expected).prev_sample
        yield f"{first}, from step {at} on {second}", torch.allclose(yours, expected, atol=1e-3), True
    verdict = verify_hotswap(model, digits.path("slanted"), inputs=digits.inputs(), base=digits.load_base)
    yield "the last adapter is in the model afterwards", bool(verdict), True


# --- what is in the model --------------------------------------------------------------------------------------------


def shapes(layer: SlotLayer) -> str:
    """The tensors that an adapter has on one layer, and the rank there is room for.

    >>> from hotswap_lab.demo import digits
    >>> print(shapes(resolve_slot(digits.load("inverted"), "default").layers[0]))
    conv_in: A (9, 1, 3, 3), B (16, 9, 1, 1), room for rank 9
    """
    a, b = (tuple(tensor.parameter.shape) for tensor in layer.tensors)
    return f"{layer.path}: A {a}, B {b}, room for rank {layer.tensors[0].capacity}"


# --- a large pipeline ------------------------------------------------------------------------------------------------

#: a pipeline on the Hub, and two adapters for it: what `load_lora_weights` takes
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
PIXELS = ("nerijs/pixel-art-xl", "pixel-art-xl.safetensors")
CEREAL = ("ostris/super-cereal-sdxl-lora", "cereal_box_sdxl_v1.safetensors")


def swap_in_pipeline(pipe: Any, first: tuple[str, str], second: tuple[str, str], **call: Any) -> tuple[Any, Any]:
    """Two pictures of the same noise, with one adapter and with the other, from a compiled pipeline."""
    family = [read_pipeline_lora(pipe, folder, weight_name=file) for folder, file in (first, second)]

    pipe.load_lora_weights(first[0], weight_name=first[1], adapter_name="style")
    prepare_pipeline_for_compiled_hotswap(pipe, family, adapter_name="style")  # before compiling
    pipe.unet.compile()
    before = pipe(generator=torch.Generator().manual_seed(0), **call).images

    print(plan_pipeline_hotswap(pipe, family[1], "style"))  # a table for each component
    with RecompileWatch(allow=0):
        hotswap_pipeline(pipe, family[1], "style")
        after = pipe(generator=torch.Generator().manual_seed(0), **call).images
    return before, after


def sdxl(prompt: str = "a lighthouse in a storm, pixel art") -> tuple[Any, Any]:
    """:func:`swap_in_pipeline` with Stable Diffusion XL. Needs a GPU and the Hub."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(SDXL, torch_dtype=torch.float16).to("cuda")
    return swap_in_pipeline(pipe, PIXELS, CEREAL, prompt=prompt, num_inference_steps=25)


def why_not_here(gigabytes: float = 12) -> str | None:
    """Why a large pipeline can't be run on this machine, in a few words; None if it can.

    >>> why_not_here(gigabytes=1e9)
    'no GPU with 1000000000 GB'
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < gigabytes * 1e9:
        return f"no GPU with {gigabytes:.0f} GB"
    try:
        from huggingface_hub import HfApi

        HfApi().model_info(SDXL, timeout=5)
    except Exception:
        return "the Hub is out of reach"
    return None
