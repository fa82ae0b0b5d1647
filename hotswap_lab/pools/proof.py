"""A proof by experiment that a model computes each row of a batch by itself, and each with its own adapter.

The shape of a layer's input doesn't tell whether its first axis is the batch: it may be tokens, images, or the tokens
of all rows one after the other. So the proof puts a strong random adapter into some rows, and looks at the outputs of
all rows. Two forwards are the references: all rows have the adapter, or no row has it. Then there is one for each
bit of a row's number, in which the rows with this bit set have it. Each row's output must equal the right reference. A
row that got another row's adapter, anywhere, differs in at least one of these forwards. What the proof can't see is in
which order the caller has repeated the rows, as AABB or as ABAB: both are batches that a model computes row by row. So
it is told (:mod:`~hotswap_lab.pools.copies`), and a proof holds for this order alone. In total, the proof takes
``2 + log2(rows)`` forwards, once for each kind of input; three times as many where the rows may have other lengths,
which are then tried in both orders.
"""

import contextlib
import copy
import re
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import compat
from ..beyond.guards import random_numbers_kept, state_kept
from ..core.errors import listing, refused
from ..core.wrappers import embeddings_of
from .copies import Copies

#: how far off a row may be, relative to the adapter's largest effect on an output, by the precision of the output
TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 5e-2}
#: inputs that are made from the tokens, and are no content of their own
DERIVED = re.compile("embeds|hidden|mask|outputs|position")
#: arguments of a model whose size is the number of rows; these come before all others
TOKENS = ("input_ids", "decoder_input_ids", "inputs_embeds", "decoder_inputs_embeds")
#: inputs whose values may choose another path through a model; a number is rather a size
FLAG = (bool, str, type(None))
Given = dict[str, torch.Tensor]


# ---- what a model is called with


def given_inputs(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that a model is called with, by its name or position."""
    return {str(position): each for position, each in enumerate(arguments)} | dict(named)


def given_tensors(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Given:
    """The tensors that a model is called with, by their names or positions."""
    return {name: each for name, each in given_inputs(arguments, named).items() if isinstance(each, torch.Tensor)}


def kind_of(value: Any) -> Any:
    """The kind of an input, which a proof holds for: a tensor's dtype and number of axes, a flag, or the contents."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.ndim
    if isinstance(value, (list, tuple)):
        return tuple(map(kind_of, value))
    if isinstance(value, Mapping):
        return tuple((name, kind_of(each)) for name, each in value.items())
    if isinstance(value, FLAG):
        return value
    filled = False
    with contextlib.suppress(Exception):  # not a cache, or one of states only
        filled = bool(value.get_seq_length())
    return type(value).__name__, filled


def batch_name(given: Given) -> str:
    """The name of the tensor whose first axis is the batch: tokens, or the first one that has more axes."""
    first = [name for name in TOKENS if name in given] or [name for name, each in given.items() if each.ndim > 1]
    return (first or list(given))[0]


def size_of(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> int:
    """The number of rows that a model is called with; 0 if no tensor shows it."""
    given = given_tensors(arguments, named) or {
        str(number): each for number, each in enumerate(compat.tree_leaves((arguments, named))) if torch.is_tensor(each)
    }
    return next(iter(given[batch_name(given)].shape), 0) if given else 0


# ---- the proof


@dataclass(eq=False)
class Probe:
    """A strong random adapter, in the rows of ``mask`` (``[rows]``, 0 or 1) and on some layers by their numbers."""

    mask: torch.Tensor
    layers: Collection[int]
    #: whether it notes the sum of each layer's input
    notes: bool = False
    seen: dict[int, float] = field(default_factory=dict)

    def acts(self, index: int, x: torch.Tensor) -> bool:
        """Whether the adapter is on a layer."""
        if self.notes and x.is_floating_point():
            self.seen[index] = float(x.detach().double().sum())
        return index in self.layers

    def weights(self, variant: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's ``a`` and ``b``, of rank 1, the same for all rows and in all forwards."""
        generator = torch.Generator().manual_seed(zlib.crc32(variant.path.encode()))
        shapes = [(1, 1, *each.shape[2:]) for each in (variant.a, variant.b)]
        drawn = [torch.randn(each, generator=generator, device="cpu") for each in shapes]
        if not variant.looks_up:
            drawn[0] /= drawn[0].numel() ** 0.5
        a, b = (each.to(variant.a.device, variant.a.dtype).expand(len(self.mask), *each.shape[1:]) for each in drawn)
        return a, b


def prove(
    batch: Any, entry: torch.nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any], layers: frozenset[int]
) -> bool:
    """Show that these layers keep the rows apart for these inputs. Returns whether it holds for all such inputs.

    It doesn't if other inputs than tokens feed one of the layers, as images may: the number of these for each row is
    not the same in each batch. Nor does it if the rows are not kept apart where they have other lengths, as in a model
    that sorts them by length. ``batch`` is the :class:`~hotswap_lab.pools.batch.Batch` of the rows, ``entry`` the
    module that is called.

    Raises
    ------
    HotswapError
        If they are not kept apart. It names the layers whose input is not one block for each row.
    """
    base, total = batch.room.slot.host.base, size_of(arguments, named)
    noise = "input_ids" in named
    contents = (each for name, each in given_tensors(arguments, named).items() if not DERIVED.search(name))
    has_more = noise and any(each.is_floating_point() and each.ndim > 2 for each in contents)

    def outputs(
        mask: torch.Tensor, layers: Collection[int], seed: int = 0, lengths: torch.Tensor | None = None
    ) -> tuple[Probe, list[torch.Tensor]]:
        probe = Probe(mask, layers, has_more)
        own = [_own(each, lengths) for each in arguments], {name: _own(each, lengths) for name, each in named.items()}
        with state_kept(base), _noise(batch, base, seed) if noise else contextlib.nullcontext():
            batch.local.probe = probe
            try:
                result = entry(*own[0], **own[1])
            finally:
                batch.local.probe = None
        found = [each for each in compat.tree_leaves(result) if torch.is_tensor(each) and each.is_floating_point()]
        size, copies = batch.size, batch.local.copies
        return probe, [_by_row(each, size, copies) for each in found if each.ndim and each.shape[0] == total]

    def are_apart(layers: Collection[int], none: list[torch.Tensor], lengths: torch.Tensor | None = None) -> bool:
        try:
            _, all_rows = outputs(torch.ones(batch.size, device="cpu"), layers, lengths=lengths)
            for bit in range((batch.size - 1).bit_length()):
                mask = torch.arange(batch.size, device="cpu") >> bit & 1
                _, found = outputs(mask.double(), layers, lengths=lengths)
                if not all(map(_are_as_expected, found, none, all_rows, [mask.bool()] * len(none))):
                    return False
        except RuntimeError:  # such as a HotswapError: an input that can't be split
            return False
        return True

    def are_apart_at(lengths: torch.Tensor) -> bool:
        try:
            _, none = outputs(torch.zeros(batch.size, device="cpu"), (), lengths=lengths)
        except Exception:  # of any kind: the model doesn't take such lengths, which shows nothing
            return False
        return are_apart(layers, none, lengths)

    with random_numbers_kept(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        first, none = outputs(torch.zeros(batch.size, device="cpu"), ())
        if not none:
            raise refused("rows_not_in_layer", paths="of the output", found="no output whose first axis is the batch")
        if not are_apart(layers, none):
            groups: dict[str, list[int]] = {}
            for index in sorted(layers):
                groups.setdefault(name_of_like(batch.room.slot.layers[index].path), []).append(index)
            wrong = [indices[0] for indices in groups.values() if not are_apart(indices, none)] or sorted(layers)[:1]
            paths = listing([batch.room.slot.layers[index].path for index in wrong], 4)
            raise refused("rows_not_in_layer", paths=paths, found="rows that get one another's adapter")
        most = [_most_tokens(each, total) for each in compat.tree_leaves((arguments, named))]
        if any(most):
            # a sort by length moves rows in one of both orders at least
            shares = torch.linspace(0, 1, total, device="cpu")
            if 1 in most or not all(map(are_apart_at, (shares, shares.flip(0)))):
                return False
        if not has_more:
            return True
        second, _ = outputs(torch.zeros(batch.size, device="cpu"), (), seed=1)
        return not any(first.seen[index] == second.seen.get(index) for index in layers & first.seen.keys())


def name_of_like(path: str) -> str:
    """A layer's path without numbers, which is the same for similar layers in a stack."""
    return re.sub(r"\.\d+", "", path)


def _by_row(output: torch.Tensor, size: int, copies: Copies) -> torch.Tensor:
    """``output`` as ``[rows, ...]``, one entry for each row."""
    return output.unflatten(0, (copies.all, size, copies.each)).transpose(0, 1).flatten(1).nan_to_num()


def _are_as_expected(found: torch.Tensor, none: torch.Tensor, all_rows: torch.Tensor, mask: torch.Tensor) -> bool:
    expected = torch.where(mask.to(none.device)[:, None], all_rows, none)
    return bool(((found - expected).abs() <= TOLERANCE.get(found.dtype, 1e-4) * (all_rows - none).abs().max()).all())


def _own(value: Any, lengths: torch.Tensor | None = None) -> Any:
    """A copy of an input, because a forward may write to it: to a cache, or to a list of states.

    With ``lengths``, each row's share of the longest (``[total]``, from 0 to 1), rows get other numbers of tokens.
    """
    if isinstance(value, torch.Tensor):
        if lengths is None or not (most := _most_tokens(value, len(lengths))):
            return value.clone()
        tokens = 1 + lengths.to(value.device) * (most - 1)
        own = tokens if value.ndim == 1 else torch.arange(most, device=value.device) < tokens[:, None]
        return own.to(value.dtype)
    if isinstance(value, dict):
        return type(value)({key: _own(each, lengths) for key, each in value.items()})
    return [_own(each, lengths) for each in value] if type(value) is list else copy.deepcopy(value)


def _most_tokens(value: object, total: int) -> int:
    """The largest length of a row that an input can say: a mask of its tokens, or their number; 0 if it is neither."""
    if not isinstance(value, torch.Tensor) or value.shape[:1] != (total,):
        return 0
    if value.ndim == 1:
        return 0 if value.is_floating_point() or value.dtype == torch.bool else max(int(value.max()), 0)
    is_mask = value.ndim == 2 and (value.dtype == torch.bool or bool((value == value.bool()).all() and value.any()))
    return value.shape[1] if is_mask else 0


@contextlib.contextmanager
def _noise(batch: Any, base: torch.nn.Module, seed: int) -> Iterator[None]:
    """Add noise to the output of the token embedding, so that rows with the same tokens differ."""
    embedding: Any = next(iter(embeddings_of(base)), None)
    if not isinstance(getattr(embedding, "weight", None), torch.Tensor):
        yield
        return
    scale = float(embedding.weight.detach().double().std())

    def add(module: torch.nn.Module, arguments: object, output: torch.Tensor) -> torch.Tensor | None:
        if batch.local.probe is None:  # another thread's forward
            return None
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(output.shape, generator=generator, device="cpu")
        return output + scale * noise.to(output.device, output.dtype)

    with embedding.register_forward_hook(add):
        yield
