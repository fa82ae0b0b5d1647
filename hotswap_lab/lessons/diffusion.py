"""Chapter 06: pictures of pictures, an adapter written by hand, and a large pipeline."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model

from ..core.slot import SlotLayer
from ..demo import digits
from ..engine import hotswap_pipeline, plan_pipeline_hotswap, prepare_pipeline_for_compiled_hotswap, resolve_slot
from ..figures import Canvas, Figure
from ..figures.palette import BLACK, WHITE, mix
from ..figures.png import address, png
from ..files.reading import Adapter
from ..pipelines.lora_files import read_pipeline_lora
from ..watch import RecompileWatch
from .beyond import adapter_of, disturb
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


@dataclass(frozen=True)
class Drawn:
    """Drawn digits side by side, as an image that Jupyter and a panel show."""

    images: torch.Tensor

    def _repr_png_(self) -> bytes:
        return _png(self.images, scale=3)


def _png(images: torch.Tensor, scale: int = 1) -> bytes:
    """Pictures side by side as one small file: the reader's browser enlarges it, and the notebook stays small."""
    # 16 shades of gray are what scikit-learn's digits have, and take half the bytes of 256
    shades = (torch.cat(list(images), dim=1) * 15).round().int()
    shades = shades.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    return png(shades.tolist(), [mix(WHITE, shade / 15, BLACK) for shade in range(16)])


# --- exercise: the negative, by hand ---------------------------------------------------------------------------------


def blank(*layers: str) -> torch.nn.Module:
    """The model with an adapter of rank 9 on these layers, that does nothing yet.

    >>> from hotswap_lab.demo import digits
    >>> layer = blank("conv_in").get_base_model().conv_in
    >>> tuple(layer.lora_A["default"].weight.shape), tuple(layer.lora_B["default"].weight.shape)
    ((9, 1, 3, 3), (16, 9, 1, 1))
    """
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
    bias = base.bias.view(-1, 1, 1)
    its = base(picture) - bias
    solution(layer)
    yours = layer(picture) - bias
    yield "how many times the base's output (bias aside)", round(float((yours / its).median()), 2), -1.0
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


# --- a diffusers model -----------------------------------------------------------------------------------------------

UNET_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]

#: adapters for :func:`unet`; ``conv1`` is a convolution
UNET_CONFIGS: dict[str, PeftConfig] = {
    "style": LoraConfig(r=4, lora_alpha=6, target_modules=[*UNET_ATTENTION, "conv1"]),
    "face": LoraConfig(r=8, lora_alpha=5, target_modules=UNET_ATTENTION, use_rslora=True),
    "line art": LoraConfig(r=2, lora_alpha=9, target_modules=["conv1"], use_dora=True),
}


def unet(config: PeftConfig, seed: int = 1) -> torch.nn.Module:
    """A tiny UNet as at the heart of Stable Diffusion, with random weights and a random adapter."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UNet2DConditionModel(
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=8,
            attention_head_dim=4,
        ).eval()
        torch.manual_seed(seed)
        model.add_adapter(copy.deepcopy(config), "default")
        disturb(model)
    return model


def unet_adapter(config: PeftConfig, seed: int = 1) -> Adapter:
    """A random adapter for :func:`unet`."""
    return adapter_of(unet(config, seed))


def unet_inputs() -> dict[str, torch.Tensor]:
    """A noisy picture, a time step and an encoded prompt, all of them random."""
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(1, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([3]),
        "encoder_hidden_states": torch.randn(1, 5, 8, generator=generator),
    }


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
