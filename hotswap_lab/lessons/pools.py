"""Chapter 04: many adapters in memory, and from a loop over all tensors to one copy."""

from __future__ import annotations

import copy
import itertools
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

from .. import demo
from ..bench.timing import Timing, measure
from ..core.pool import AdapterPool
from ..core.slot import resolve_slot, room_of
from ..files.saving import save_adapter
from .exercise import Exercise, Result
from .figures import INK, MUTED, NEW, OFF, OLD, Canvas, Figure

# --- a model with as many tensors as a real one ------------------------------------------------------------------


def smol(layers: int = 30, rank: int = 8) -> PeftModel:
    """A model with the layers of SmolLM2-135M, and a LoRA adapter on all of them, in little memory.

    A swap doesn't look at the base weights, so they are random, and all layers share those of the first one. The
    adapter's tensors have the sizes of the real model's, and every layer has its own.

    >>> model = smol(layers=2)
    >>> [tuple(tensor.parameter.shape) for tensor in resolve_slot(model, "default").layers[-1].tensors]
    [(8, 1536), (576, 8)]
    """
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=1,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=64,
    )
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = LlamaForCausalLM(config)
        first = base.model.layers[0]
        for number in range(1, layers):
            shared = {id(parameter): parameter for parameter in first.parameters()}
            layer = copy.deepcopy(first, memo=shared)
            layer.self_attn.layer_idx = number
            base.model.layers.append(layer)
        config.num_hidden_layers = layers
        return get_peft_model(base, lora).eval()


def random_adapters(model: torch.nn.Module, names: Sequence[str], folder: str) -> dict[str, str]:
    """Saves adapters with the shapes of the one in ``model`` and random values; returns their folders by name.

    The model ends up with the last of them.
    """
    folders = {name: os.path.join(folder, name) for name in names}
    slot = resolve_slot(model, "default")
    for number, path in enumerate(folders.values()):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for tensor in slot.tensors:
                tensor.parameter.normal_(std=0.02, generator=generator)
        save_adapter(model, path)
    return folders


# --- the steps from a file to a memcpy ---------------------------------------------------------------------------


def measure_steps(steps: Mapping[str, tuple[Callable, Iterable]], rounds: int = 3) -> dict[str, Timing]:
    """Times every step; each is a function and the arguments that it is called with in turn.

    The steps take turns, so that something else that the machine does in between hits all of them alike. A turn is
    long enough to be about the step and not about the caches that the one before has left.
    """
    turns: dict[str, list[Timing]] = {label: [] for label in steps}
    for _ in range(rounds):
        for label, (function, arguments) in steps.items():
            following = itertools.cycle(arguments)
            timing = measure(lambda function=function, following=following: function(next(following)), n=15)
            turns[label].append(timing)
    return {label: _pooled(each) for label, each in turns.items()}


def _pooled(turns: list[Timing]) -> Timing:
    return Timing(
        statistics.median(turn.median for turn in turns),
        min(turn.minimum for turn in turns),
        sum(turn.n for turn in turns),
    )


def steps_plot(title: str, timings: Mapping[str, Timing], *, enlarged: int = 4) -> Figure:
    """Bars for the steps, in order; the last one is the limit, and is marked in every other bar.

    The last ``enlarged`` are drawn once more on a scale of their own, if there are any.
    """
    left, right, row, top, gap = 220, 90, 32, 58, 46
    labels = list(timings)
    panels = [("", labels)]
    if enlarged:
        panels.append((f"the last {enlarged}, enlarged", labels[-enlarged:]))
    canvas = Canvas(660, top + row * (len(labels) + enlarged) + (gap if enlarged else 0) + 42)
    canvas.text(330, 28, title, size=15)
    limit = timings[labels[-1]].median
    y = top
    for name, shown in panels:
        if name:
            y += gap
            canvas.text(left, y - 12, name, anchor="start", color=MUTED)
        scale = (canvas.width - left - right) / max(timings[label].median for label in shown)
        for label in shown:
            seconds = timings[label].median
            canvas.text(left - 10, y + 18, label, anchor="end")
            _bar(canvas, left, y + 3, seconds * scale, OLD)
            _bar(canvas, left, y + 3, min(limit, seconds) * scale, NEW)
            canvas.text(left + seconds * scale + 8, y + 18, _microseconds(seconds), anchor="start")
            y += row
    for x, color, meaning in ((left, NEW, "as long as the plain copy"), (left + 200, OLD, "everything else")):
        _bar(canvas, x, canvas.height - 28, 14, color, height=14)
        canvas.text(x + 22, canvas.height - 16, meaning, size=12, anchor="start", color=MUTED)
    listed = ", ".join(f"{label} {_microseconds(timing.median)}" for label, timing in timings.items())
    return canvas.figure(f"{title}: {listed}. The last one is the limit.")


def _bar(canvas: Canvas, x: float, y: float, width: float, fill: str, *, height: float = 22) -> None:
    # without rounded corners: some of these are only a few pixels wide
    canvas.shapes.append(
        f"<rect x='{x:g}' y='{y:g}' width='{width:.1f}' height='{height:g}' fill='{fill}' stroke='{INK}'/>"
    )


def _microseconds(seconds: float) -> str:
    return f"{float(f'{seconds * 1e6:.3g}'):,.0f} µs"


# --- the picture of the layout -----------------------------------------------------------------------------------


def rank_major(rank: int = 2, before: int = 4, rows: int = 6) -> Figure:
    """The memory of all layers as one matrix, when an adapter of ``rank`` takes the place of one of rank ``before``."""
    cell, left, top, apart = 30, 76, 92, 12
    layers = [("q_proj", 5, 4), ("v_proj", 5, 2)]
    canvas = Canvas(720, top + rows * cell + 66)
    x = left
    for layer, inputs, outputs in layers:
        start = x
        for name, share in (("A", inputs), ("B", outputs)):
            canvas.text(x + share * cell / 2, top - 12, name, size=15)
            for row in range(rows):
                fill = NEW if row < rank else OLD if row < before else OFF
                for column in range(share):
                    _cell(canvas, x + column * cell, top + row * cell, cell, fill)
            x += share * cell + apart
        canvas.text((start + x - apart) / 2, top - 36, layer, color=MUTED)
    canvas.text((left + x) / 2, 26, "One matrix for all layers, one row for each rank component", size=15)
    for row in range(rows):
        canvas.text(left - 12, top + row * cell + 20, f"row {row}", size=12, anchor="end", color=MUTED)
    for first, stop, what in ((0, rank, "copied"), (rank, before, "zeroed"), (before, rows, "zero already")):
        if first < stop:
            canvas.text(x + 2, top + (first + stop) * cell / 2 + 5, what, anchor="start")
    bottom = top + rows * cell
    canvas.text((left + x) / 2, bottom + 28, "The model reads A along the rows, B down the columns.", color=MUTED)
    canvas.text(
        (left + x) / 2,
        bottom + 50,
        f"What a swap writes: an adapter of rank {rank} after one of rank {before}, with room for rank {rows}.",
        color=MUTED,
    )
    listed = ", ".join(f"A and B of {layer}" for layer, _, _ in layers)
    return canvas.figure(
        f"The memory of all layers as one matrix of {rows} rows. Row j holds rank component j of {listed}, side by "
        f"side. In a swap from rank {before} to rank {rank}, the first {rank} rows are copied, the next "
        f"{before - rank} are zeroed, and the others are zero already."
    )


def _cell(canvas: Canvas, x: float, y: float, size: float, fill: str) -> None:
    canvas.shapes.append(
        f"<rect x='{x:g}' y='{y:g}' width='{size:g}' height='{size:g}' fill='{fill}' stroke='{MUTED}'/>"
    )


# --- exercise: pack an adapter -----------------------------------------------------------------------------------


def _pack(solution: Callable) -> list[Result]:
    results = []
    # inputs, outputs and rank of each layer
    for what, layers in (("one layer", [(3, 2, 2)]), ("two layers", [(3, 2, 1), (2, 4, 3)])):
        pairs = _small_layers(layers)
        rows = solution([(a.clone(), b.clone()) for a, b in pairs])
        rank, width = max(rank for _, _, rank in layers), sum(inputs + outputs for inputs, outputs, _ in layers)
        results.append(Result(f"the shape for {what}", tuple(rows.shape), (rank, width)))
        if not results[-1].right:
            continue
        for name, read, own in zip("AB", _read(rows.contiguous(), layers), zip(*pairs, strict=True), strict=True):
            expected = [_filled(each, like) for each, like in zip(own, read, strict=True)]
            yours = [each.tolist() for each in read]
            results.append(Result(f"each {name} of {what}", yours, [each.tolist() for each in expected]))
    return results


def _read(rows: torch.Tensor, layers: Sequence[tuple[int, int, int]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Every A and every B, read from the rows as a model reads them: through strides."""
    (rank, width), start = rows.shape, 0
    all_a, all_b = [], []
    for inputs, outputs, _ in layers:
        all_a.append(rows.as_strided((rank, inputs), (width, 1), start))
        all_b.append(rows.as_strided((outputs, rank), (1, width), start + inputs))
        start += inputs + outputs
    return all_a, all_b


def _filled(own: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``own``, with zeros up to the shape of ``like``."""
    filled = torch.zeros_like(like)
    filled[: own.shape[0], : own.shape[1]] = own
    return filled


def _small_layers(layers: Sequence[tuple[int, int, int]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    number = itertools.count(1)

    def numbered(rows: int, columns: int) -> torch.Tensor:
        return torch.tensor([[next(number) for _ in range(columns)] for _ in range(rows)])

    return [(numbered(rank, inputs), numbered(outputs, rank)) for inputs, outputs, rank in layers]


pack = Exercise(
    "`pairs` is a list of (A, B), one pair for each layer, of shapes (rank, inputs) and (outputs, rank). Return the\n"
    "rows of the whole adapter: row j holds row j of the first A, column j of the first B, then those of the next\n"
    "layer. There are as many rows as the highest rank; a layer of lower rank has zeros in the others. About 5 lines.",
    _pack,
)


# --- exercise: the bytes of a swap -------------------------------------------------------------------------------


class _Two(torch.nn.Module):
    """Two layers whose sizes are not those of cache lines."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(10, 20), torch.nn.Linear(20, 40)


def _two(rank: int) -> tuple[torch.nn.Module, LoraConfig]:
    config = LoraConfig(r=rank, target_modules=["first", "second"], init_lora_weights=False)
    return inject_adapter_in_model(config, _Two()), config


def _two_pool() -> AdapterPool:
    adapters = {}
    for name, rank in (("low", 3), ("high", 5)):
        module, config = _two(rank)
        adapters[name] = get_peft_model_state_dict(module), config
    return AdapterPool(_two(3)[0], adapters=adapters, progress=False)


def _demo_pool() -> AdapterPool:
    # both adapt the attention only, so all layers have room for rank 32
    adapters = {name: demo.adapter_path(name) for name in ("double", "pig_latin")}
    return AdapterPool(demo.load("double")[0], adapters=adapters, progress=False)


def written(pool: AdapterPool, old: str, new: str) -> tuple[int, int]:
    """The bytes of the model's memory that a swap from ``old`` to ``new`` fills with weights and with zeros.

    Found out by marking all of it: what isn't marked afterwards was written.

    >>> written(_two_pool(), "high", "low")
    (1728, 1152)
    """
    pool.swap(old)
    room = room_of(resolve_slot(pool.model, "default").host.base, "default")
    memories = [band.memory for arena in room.arenas for band in arena.bands]
    with torch.no_grad():
        for memory in memories:
            memory.fill_(torch.nan)
    pool.swap(new)
    total = sum(int((~memory.isnan()).sum()) * memory.element_size() for memory in memories)
    copied = sum(part.nbytes for part in room.take().parts)
    return copied, total - copied


def _swap_bytes(solution: Callable) -> list[Result]:
    results = []
    for pool, ranks in ((_demo_pool(), {"double": 2, "pig_latin": 32}), (_two_pool(), {"low": 3, "high": 5})):
        widths = []
        for tensor in resolve_slot(pool.model, "default").tensors:
            widths.append(tensor.parameter.shape[1 - tensor.rank_axis])
        for old, new in (tuple(ranks), tuple(ranks)[::-1]):
            yours = solution(list(widths), ranks[new], ranks[old])
            results.append(Result(f"bytes from {old} to {new}", yours, written(pool, old, new)))
    return results


swap_bytes = Exercise(
    "`widths` says how many float32 numbers each tensor has in one row: the inputs of an A, the outputs of a B.\n"
    "An adapter of rank `new` takes the place of one of rank `old`. Return two numbers: the bytes that are copied,\n"
    "and the bytes that are zeroed. About 4 lines.\n"
    "A tensor's share is rounded up to whole cache lines of 64 bytes. A row must have an odd number of lines: if it\n"
    "would be even, it gets one more.",
    _swap_bytes,
)
