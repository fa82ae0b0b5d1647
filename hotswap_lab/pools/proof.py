"""A proof by experiment that a model computes each row of a batch by itself, and each with its own adapter.

The shape of a layer's input doesn't tell whether its first axis is the batch: it may be tokens, images, or the tokens
of all rows one after the other. So the proof puts a strong random adapter into some rows, and looks at the outputs of
all rows. Two forwards are the references: all rows have the adapter, or no row has it. Then there is one for each
bit of a row's number. In this one, the rows with this bit set have the adapter. Each row's output must equal the right
reference. A row that got another row's adapter, anywhere, differs in at least one of these forwards. The proof can't
see the order of rows that the caller has repeated, as AABB or as ABAB: both are batches that a model computes row by
row. So the order is an input (:mod:`~hotswap_lab.pools.copies`), and a proof holds for this order alone. In total, the
proof takes ``2 + log2(rows)`` forwards, once for each kind of input; three times as many where the rows may have
different lengths, which are then tried in both orders. A model with outputs whose first axis is not the batch takes
one more, and one for each kind of layer if these outputs depend on the adapter: each layer must change an output that
is compared.
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
#: inputs that are made from the tokens, and have no content of their own
DERIVED = re.compile("embeds|hidden|mask|outputs|position")
#: arguments of a model whose size is the number of rows; these come before all others
TOKENS = ("input_ids", "decoder_input_ids", "inputs_embeds", "decoder_inputs_embeds")
#: inputs whose values may choose another path through a model; a number is rather a size
FLAG = (bool, str, type(None))
Tensors = dict[str, torch.Tensor]


# ---- the inputs of a model


def all_inputs(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call, by their names or positions."""
    return {str(position): value for position, value in enumerate(arguments)} | dict(named)


def tensor_inputs(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Tensors:
    """The tensors among the arguments of a call, by their names or positions."""
    return {name: value for name, value in all_inputs(arguments, named).items() if isinstance(value, torch.Tensor)}


def kind_of(value: Any) -> Any:
    """The kind of an input, which a proof holds for: a tensor's dtype and number of axes, a flag, or the contents."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.ndim
    if isinstance(value, (list, tuple)):
        return tuple(map(kind_of, value))
    if isinstance(value, Mapping):
        return tuple((name, kind_of(item)) for name, item in value.items())
    if isinstance(value, FLAG):
        return value
    is_filled = False
    with contextlib.suppress(Exception):  # not a cache, or one of states only
        is_filled = bool(value.get_seq_length())
    return type(value).__name__, is_filled


def batch_name(tensors: Tensors) -> str:
    """The name of the tensor whose first axis is the batch: tokens, or the first one that has more axes."""
    names = [name for name in TOKENS if name in tensors]
    names += [name for name, tensor in tensors.items() if tensor.ndim > 1]
    return (names or list(tensors))[0]


def size_of(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> int:
    """The number of rows in the inputs of a model; 0 if no tensor shows it."""
    tensors = tensor_inputs(arguments, named)
    if not tensors:
        leaves = enumerate(compat.tree_leaves((arguments, named)))
        tensors = {str(number): leaf for number, leaf in leaves if torch.is_tensor(leaf)}
    return next(iter(tensors[batch_name(tensors)].shape), 0) if tensors else 0


# ---- the proof


@dataclass(eq=False)
class Probe:
    """A strong random adapter, in the rows of ``mask`` (``[rows]``, 0 or 1) and on some layers by their numbers."""

    mask: torch.Tensor
    layers: Collection[int]
    #: whether to record the sum of each layer's input
    records_sums: bool = False
    #: the layers that were called, in this order, each with the sum of its input if it is recorded
    called: dict[int, float | None] = field(default_factory=dict)
    #: the model's outputs as ``[rows, ...]``, which the proof compares, and those without an entry for each row
    by_row: list[torch.Tensor] = field(default_factory=list)
    others: list[torch.Tensor] = field(default_factory=list)

    def acts(self, index: int, x: torch.Tensor) -> bool:
        """Whether the adapter is on a layer. Records the call."""
        has_sum = self.records_sums and x.is_floating_point()
        self.called[index] = float(x.detach().double().sum()) if has_sum else None
        return index in self.layers

    def weights(self, variant: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's ``a`` and ``b``, of rank 1, the same for all rows and in all forwards."""
        generator = torch.Generator().manual_seed(zlib.crc32(variant.path.encode()))
        shapes = [weights.shape[2:] for weights in (variant.a, variant.b)]
        drawn = [torch.randn((1, 1, *shape), generator=generator, device="cpu") for shape in shapes]
        if not variant.looks_up:
            drawn[0] /= drawn[0].numel() ** 0.5
        a, b = (weights.to(variant.a).expand(len(self.mask), *weights.shape[1:]) for weights in drawn)
        return a, b


@dataclass(eq=False)
class Proof:
    """One call of a model, which is repeated with probes."""

    batch: Any
    entry: torch.nn.Module
    arguments: tuple[Any, ...]
    named: Mapping[str, Any]
    #: whether to compare outputs with several entries for each row, too, one row after the other
    takes_blocks: bool = False

    def __post_init__(self) -> None:
        self.base: torch.nn.Module = self.batch.room.slot.host.base
        self.total: int = size_of(self.arguments, self.named)
        self.has_tokens: bool = "input_ids" in self.named
        tensors = tensor_inputs(self.arguments, self.named)
        contents = [tensor for name, tensor in tensors.items() if not DERIVED.search(name)]
        #: whether other inputs than tokens, such as images, may feed the layers
        self.has_more: bool = self.has_tokens and any(x.is_floating_point() and x.ndim > 2 for x in contents)

    def forward(
        self, mask: torch.Tensor | float, layers: Collection[int], seed: int = 0, lengths: torch.Tensor | None = None
    ) -> Probe:
        """Call the model with a probe in some rows, or with 1 for ``mask`` in all of them, with 0 in none."""
        local, size = self.batch.local, self.batch.size
        mask = torch.as_tensor(mask, dtype=torch.float64, device="cpu").expand(size)
        probe = Probe(mask, layers, self.has_more)
        arguments = [_copied(value, lengths) for value in self.arguments]
        named = {name: _copied(value, lengths) for name, value in self.named.items()}
        noise = _noise(self.batch, self.base, seed) if self.has_tokens else contextlib.nullcontext()
        with state_kept(self.base), noise:
            local.probe = probe
            try:
                result = self.entry(*arguments, **named)
            finally:
                local.probe = None
        for leaf in compat.tree_leaves(result):
            if torch.is_tensor(leaf) and leaf.is_floating_point() and leaf.ndim:
                count, rest = divmod(leaf.shape[0], self.total)
                if not rest and (count == 1 or (count and self.takes_blocks)):
                    probe.by_row.append(_by_row(leaf, size, local.copies))
                else:
                    probe.others.append(leaf.nan_to_num())
        return probe

    def keeps_apart(self, layers: Collection[int], none: Probe, lengths: torch.Tensor | None = None) -> bool:
        """Whether each row's outputs depend on the adapter in this row alone, on these layers."""
        try:
            all_rows = self.forward(1, layers, lengths=lengths)
            for bit in range((self.batch.size - 1).bit_length()):
                mask = torch.arange(self.batch.size, device="cpu") >> bit & 1
                some = self.forward(mask, layers, lengths=lengths)
                for outputs in zip(some.by_row, none.by_row, all_rows.by_row, strict=True):
                    if not _are_as_expected(*outputs, mask.bool()):
                        return False
        except RuntimeError:  # such as a HotswapError: an input that can't be split
            return False
        return True

    def check_apart(self, layers: Collection[int], none: Probe) -> None:
        """Refuse layers that don't keep the rows apart, the first one of each kind by its path."""
        if self.keeps_apart(layers, none):
            return
        groups: dict[str, list[int]] = {}
        for index in sorted(layers):
            groups.setdefault(self.layer_kind(index), []).append(index)
        mixed = [indices[0] for indices in groups.values() if not self.keeps_apart(indices, none)]
        self.refuse(mixed or sorted(layers)[:1], "rows that get one another's adapter")

    def hidden_layers(self, layers: Collection[int], none: Probe) -> list[int]:
        """The layers that change outputs of the model, but none that is compared: the last one of each kind."""
        if not none.others or _are_equal(self.forward(1, layers).others, none.others):
            return []
        last_of_kind = {self.layer_kind(index): index for index in none.called if index in layers}
        alone = {index: self.forward(1, [index]) for index in last_of_kind.values()}
        unseen = {index: probe for index, probe in alone.items() if _are_equal(probe.by_row, none.by_row)}
        return [index for index, probe in unseen.items() if not _are_equal(probe.others, none.others)]

    def holds_for_others(self, layers: Collection[int], none: Probe) -> bool:
        """Whether the proof holds for other inputs of this kind: other lengths of the rows, and other contents."""
        lengths = [_longest(leaf, self.total) for leaf in compat.tree_leaves((self.arguments, self.named))]
        if 1 in lengths:
            return False
        # a sort by length moves rows in one of both orders at least
        shares = torch.linspace(0, 1, self.total, device="cpu")
        for order in (shares, shares.flip(0)) if any(lengths) else ():
            try:
                none_at = self.forward(0, (), lengths=order)
            except Exception:  # of any kind: the model doesn't take such lengths, which shows nothing
                return False
            if not self.keeps_apart(layers, none_at, order):
                return False
        if not self.has_more:
            return True
        sums = self.forward(0, (), seed=1).called
        # where other tokens change nothing, other inputs feed the layer
        return all(none.called.get(index) is None or none.called[index] != sums.get(index) for index in layers)

    def layer_kind(self, index: int) -> str:
        return name_of_like(self.batch.room.slot.layers[index].path)

    def refuse(self, layers: Collection[int], reason: str) -> None:
        paths = listing([self.batch.room.slot.layers[index].path for index in layers], 4)
        raise refused("rows_not_in_layer", paths=paths, found=reason)


def prove(
    batch: Any, entry: torch.nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any], layers: frozenset[int]
) -> tuple[frozenset[int], bool]:
    """Show that these layers keep the rows apart for these inputs.

    ``batch`` is the :class:`~hotswap_lab.pools.batch.Batch` of the rows, ``entry`` the module that is called. Returns
    the layers that this call has run, and whether the proof holds for all such inputs. It doesn't if other inputs than
    tokens feed one of the layers, as images may: their number for each row is not the same in each batch. Nor does it
    if the rows are not kept apart where they have different lengths, as in a model that sorts them by length.

    Raises
    ------
    HotswapError
        If they are not kept apart. It names the layers whose input is not one block for each row.
    """
    proof = Proof(batch, entry, arguments, named)
    with random_numbers_kept(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        none = proof.forward(0, ())
        if not none.by_row:
            raise refused("rows_not_in_layer", paths="of the output", found="no output whose first axis is the batch")
        proof.check_apart(layers, none)
        if proof.hidden_layers(layers, none):
            proof.takes_blocks = True
            none = proof.forward(0, ())
            if hidden := proof.hidden_layers(layers, none):
                proof.refuse(hidden, "an effect on outputs alone that have no entry for each row")
            proof.check_apart(layers, none)
        return layers & none.called.keys(), proof.holds_for_others(layers, none)


def name_of_like(path: str) -> str:
    """A layer's path without numbers, which is the same for similar layers in a stack."""
    return re.sub(r"\.\d+", "", path)


def _by_row(output: torch.Tensor, size: int, copies: Copies) -> torch.Tensor:
    """``output`` as ``[rows, ...]``, with all entries of each row."""
    return output.unflatten(0, (copies.tiles, size, -1)).transpose(0, 1).flatten(1).nan_to_num()


def _are_equal(ones: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(ones) == len(others) and all(map(torch.equal, ones, others))


def _are_as_expected(found: torch.Tensor, none: torch.Tensor, all_rows: torch.Tensor, mask: torch.Tensor) -> bool:
    expected = torch.where(mask.to(none.device)[:, None], all_rows, none)
    return bool(((found - expected).abs() <= TOLERANCE.get(found.dtype, 1e-4) * (all_rows - none).abs().max()).all())


def _copied(value: Any, lengths: torch.Tensor | None = None) -> Any:
    """A copy of an input, because a forward may write to it: to a cache, or to a list of states.

    With ``lengths``, each row's share of the longest (``[total]``, from 0 to 1), rows get other numbers of tokens.
    """
    if isinstance(value, torch.Tensor):
        longest = 0 if lengths is None else _longest(value, len(lengths))
        if not longest:
            return value.clone()
        counts = 1 + lengths.to(value.device) * (longest - 1)
        if value.ndim > 1:  # a mask
            return (torch.arange(longest, device=value.device) < counts[:, None]).to(value.dtype)
        return counts.to(value.dtype)
    if isinstance(value, dict):
        return type(value)({key: _copied(item, lengths) for key, item in value.items()})
    return [_copied(item, lengths) for item in value] if type(value) is list else copy.deepcopy(value)


def _longest(value: object, total: int) -> int:
    """The largest length of a row that an input can give: a mask of its tokens, or their number; 0 if it is neither."""
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
