"""Chapter 06: pictures of pictures, and exercises."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..demo import digits
from ..figures import Canvas, Figure
from ..figures.palette import BLACK, WHITE, mix
from ..figures.png import address, png
from ..swap import prepare_model_for_compiled_hotswap, resolve_slot
from ..verify import verify_hotswap
from .exercise import Exercise

# --- pictures --------------------------------------------------------------------------------------------------------

#: the side of a drawn digit on the page, in pixels
CELL = 52


def grid(rows: Mapping[str, torch.Tensor], columns: Sequence[str] = ()) -> Figure:
    """Show rows of drawn digits, one row for each label.

    Parameters
    ----------
    rows:
        Pictures of shape ``(count, height, width)``, 0 for black to 1 for white, by their labels.
    columns:
        Labels above the columns.

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
        place = f"x='{left}' y='{y}' width='{len(images) * CELL}' height='{CELL}' preserveAspectRatio='none'"
        canvas.shapes.append(f"<image {place} href='{address(_png(images))}'/>")
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
    """Encode pictures side by side as one small file, which the reader's browser enlarges."""
    # 16 shades of gray, as in scikit-learn's digits, take half the bytes of 256
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
        a, b = module.lora_A["default"].weight.clone(), module.lora_B["default"].weight.clone()
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
