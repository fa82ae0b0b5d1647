"""Chapter 06: pictures of pictures, an adapter written by hand, and a large pipeline."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..core.slot import SlotLayer, resolve_slot
from ..demo import digits
from ..pipelines.lora_files import read_pipeline_lora
from ..pipelines.pipeline import hotswap_pipeline, plan_pipeline_hotswap, prepare_pipeline_for_compiled_hotswap
from ..watch import RecompileWatch
from .exercise import Exercise
from .figures import Canvas, Figure

if TYPE_CHECKING:
    from collections.abc import Iterable

    from PIL import Image

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
            f"href='data:image/png;base64,{_png(images)}'/>"
        )
    above = f", from left to right {', '.join(columns)}" if columns else ""
    return canvas.figure(f"{count} pictures in each row: {', '.join(rows)}{above}")


def _png(images: torch.Tensor) -> str:
    """Pictures side by side as one small file: the reader's browser enlarges it, and the notebook stays small."""
    from PIL import Image

    pixels = (torch.cat(list(images), dim=1) * 255).round().to(torch.uint8)
    buffer = io.BytesIO()
    # 16 shades of grey are what scikit-learn's digits have, and take half the bytes of 256
    Image.fromarray(pixels.numpy()).quantize(16).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def enlarged(images: Iterable[Image.Image], side: int = 2 * CELL) -> Image.Image:
    """A pipeline's pictures in a row, as one that is large enough to look at.

    >>> from PIL import Image
    >>> enlarged([Image.new("L", (16, 16))] * 2).size
    (208, 104)
    """
    from PIL import Image

    images = list(images)
    row = Image.new("L", (side * len(images), side))
    for number, image in enumerate(images):
        row.paste(image.resize((side, side), Image.Resampling.BICUBIC), (side * number, 0))
    return row.quantize(16)  # stored in notebooks: a third of the bytes


# --- exercise: the negative, by hand ---------------------------------------------------------------------------------


def blank(*layers: str) -> torch.nn.Module:
    """The model with an adapter of rank 9 on these layers, that does nothing yet.

    >>> from hotswap_lab.demo import digits
    >>> layer = blank("conv_in").get_base_model().conv_in
    >>> tuple(layer.lora_A["default"].weight.shape), tuple(layer.lora_B["default"].weight.shape)
    ((9, 1, 3, 3), (16, 9, 1, 1))
    """
    from peft import LoraConfig, get_peft_model

    return get_peft_model(digits.load_base(), LoraConfig(r=9, lora_alpha=18, target_modules=[*layers])).eval()


@Exercise
@torch.no_grad()
def negative(solution):
    """`layer` is a 3 x 3 convolution with one input channel and a LoRA of rank 9 called 'default'. Write values, in
    place, with which layer(x) is what its base layer gives for -x. About 4 lines. Gradients are off.
      layer.get_base_layer().weight  W, of shape (16, 1, 3, 3)
      layer.lora_A["default"].weight  A, of shape (9, 1, 3, 3)
      layer.lora_B["default"].weight  B, of shape (16, 9, 1, 1)
      layer.scaling["default"]        a number: what is added to the output is scaling * B(A(x))
    """
    model = blank("conv_in")
    slot, layer = resolve_slot(model, "default"), model.get_base_model().conv_in
    base, picture = layer.get_base_layer(), digits.noise(2)
    addresses, weight = slot.data_ptrs(), base.weight.clone()
    solution(layer)
    same = torch.allclose(layer(picture), base(-picture), atol=1e-4)
    yield "sees a picture as the base sees its negative", same, True
    yield "the base's weight is untouched", torch.equal(base.weight, weight), True
    yield "the addresses stay the same", slot.data_ptrs() == addresses, True


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

    print(plan_pipeline_hotswap(pipe, family[1], "style"))  # a table for each part
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
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return "HF_HUB_OFFLINE is set"
    try:
        from huggingface_hub import HfApi

        HfApi().model_info(SDXL, timeout=5)
    except Exception:
        return "the Hub is out of reach"
    return None
