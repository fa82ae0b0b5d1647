"""Rows are computed only where data has shown that the model keeps them apart."""

from __future__ import annotations

import pytest
import torch
from lengths import long
from models import KINDS, Kind, call, load, randn, save_random_adapter
from refusals import refused
from row_truth import Truth, assert_close
from torch import nn

from hotswap_lab import AdapterPool
from hotswap_lab.pools.proof import size_of

LLAMA = KINDS["llama"]


class Two(nn.Module):
    """Two layers, and what is done between them."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 6)


class Turned(Two):
    """The batch is the second axis inside."""

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)).transpose(0, 1)).transpose(0, 1)


class Flat(Two):
    """The tokens of all rows come in a line, as to OPT's MLP."""

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)).flatten(0, 1)).view(x.shape)


class Moody(Two):
    """Each row is computed in its own place, unless ``how`` is one of a few values, or ``x`` has fewer axes."""

    def forward(self, x, how=None, *, is_mixed=False):
        x = torch.tanh(self.first(x))
        if x.ndim == 2 or is_mixed or how in ("mixed", False):
            x = x.roll(1, 0)
        return self.last(x)


class Sorting(Two):
    """Rows in the order of their lengths inside, as packed sequences are; ``sign`` is the order."""

    def __init__(self, sign):
        super().__init__()
        self.sign = sign

    def forward(self, x, lengths):
        counts = lengths if lengths.ndim == 1 else lengths.sum(1)
        order = (self.sign * counts).argsort(stable=True)
        return self.last(torch.tanh(self.first(x[order])))[order.argsort()]


class ByContent(Two):
    """Rows in an order of what they say inside; those that say the same are at their own places."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 6)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        order = x.sum((1, 2)).argsort(stable=True)
        return self.last(torch.tanh(self.first(x[order])))[order.argsort()]


class Seeing(nn.Module):
    """With images beside the tokens, which feed the first layer; or nothing, if it is ``blind``."""

    def __init__(self, blind=False):
        super().__init__()
        self.embedding, self.first, self.last, self.blind = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 6), blind

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, pixel_values):
        x = self.embedding(input_ids)
        seen = x if self.blind else pixel_values[:, 0]
        return self.last(torch.tanh(x + self.first(seen)))


class Masked(Two):
    """What a row has after its length doesn't count."""

    def forward(self, x, lengths):
        mask = lengths if lengths.ndim == 2 else torch.arange(x.shape[1]) < lengths[:, None]
        return self.last(torch.tanh(self.first(x)) * mask[..., None])


class Noisy(nn.Module):
    """Random numbers, a buffer, and a list that is written to: a forward leaves traces."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 6)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, seen):
        self.calls += 1
        seen.append(x)
        return self.lin(nn.functional.dropout(x, 0.5)) * self.calls


class Telling(Two):
    """Besides its output, integers, and one number for the whole batch."""

    def forward(self, x, unused):
        found = self.last(torch.tanh(self.first(x)))
        return found, found > 0, found.mean()


class Hiding(Two):
    """The first layer's output for each row, and the last one's with tokens before rows, or ``times`` for each row."""

    def __init__(self, times):
        super().__init__()
        self.times = times

    def forward(self, x):
        seen = torch.tanh(self.first(x))
        out = self.last(seen)
        return seen, out.repeat_interleave(self.times, 0) if self.times else out.transpose(0, 1)


def kind_of(make) -> Kind:
    return Kind(make, lambda: torch.randn(4, 4, 6), ("first", "last"))


TURNED, FLAT, MOODY = map(kind_of, (Turned, Flat, Moody))


def pool_for(kind: Kind, folder, rows: int = 4, **lora) -> tuple[AdapterPool, dict[str, str]]:
    folders = {name: save_random_adapter(kind, folder / name, seed=n, r=3, **lora) for n, name in enumerate("ab")}
    return AdapterPool(load(kind, folders["a"]), adapters=folders, rows=rows, progress=False), folders


@pytest.fixture(params=[False, long(True)], ids=["eager", "compiled"])
def ways(request, fresh_compiler):
    """A function of a model: as it is, or compiled."""
    return (lambda call: torch.compile(call, backend="eager", dynamic=True)) if request.param else lambda call: call


def calls_of(model: nn.Module) -> list[int]:
    """One entry for each forward."""
    calls: list[int] = []
    model.get_base_model().register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_a_layer_whose_first_axis_is_not_the_batch_is_refused_by_its_name(tmp_path):
    """Four rows of four tokens: each token would have another row's adapter."""
    pool, folders = pool_for(TURNED, tmp_path)
    pool.assign(["a", "b", None, "a"])
    refused("different adapters at last[.]", call, pool.model, TURNED.inputs())
    refused("different adapters at last[.]", call, pool.model, randn(4, 5, 6))
    # where all rows are equal, nothing can be mixed up
    for equal in (lambda: pool.assign(["b"] * 4), lambda: pool.swap("b")):
        equal()
        assert_close(call(pool.model, TURNED.inputs()), call(load(TURNED, folders["b"]), TURNED.inputs()))


def test_a_layer_on_which_no_row_has_an_adapter_needs_no_proof(tmp_path):
    pool, _ = pool_for(TURNED, tmp_path)
    first = save_random_adapter(TURNED, tmp_path / "first", seed=5, r=2, target_modules=["first"])
    pool.add("first", first)
    pool.assign(["first", None, "first", None])
    truth = Truth(TURNED, {"first": first}, TURNED.inputs())
    truth.check(call(pool.model, truth.inputs), ["first", None, "first", None])
    pool.assign(["first", None, "a", None])
    refused("at last", call, pool.model, truth.inputs)


@pytest.mark.parametrize(
    ("proven", "mixed"),
    [
        ((True,), (False,)),
        (("apart",), ("mixed",)),
        ((None,), ("mixed",)),
        ((), ("mixed",)),
        ((None,), (False,)),
        ((), (torch.zeros(1),)),  # which is equal to False
    ],
)
def test_a_proof_holds_for_one_value_of_a_flag_and_one_number_of_axes(tmp_path, proven, mixed):
    """A flag, a string, None or another input may choose another path through a model."""
    pool, folders = pool_for(MOODY, tmp_path)
    truth, wanted = Truth(MOODY, folders, MOODY.inputs()), ["a", "b", None, "a"]
    pool.assign(wanted)
    with torch.no_grad():
        for _ in range(2):
            truth.check(pool.model(truth.inputs, *proven), wanted)
            truth.check(pool.model(truth.inputs, *proven, is_mixed=False), wanted)
            refused("different adapters at", pool.model, truth.inputs, *mixed)
            refused("different adapters at", pool.model, truth.inputs, *proven, is_mixed=True)
            refused("different adapters at", pool.model, truth.inputs[:, 0], *proven)


@pytest.mark.long
def test_a_graph_knows_the_flags_of_its_proof(tmp_path, fresh_compiler):
    pool, folders = pool_for(MOODY, tmp_path)
    truth, wanted = Truth(MOODY, folders, MOODY.inputs()), ["a", "b", None, "a"]
    pool.assign(wanted)
    compiled = torch.compile(pool.model, backend="eager", fullgraph=True)
    with torch.no_grad():
        refused("different adapters at", compiled, truth.inputs, is_mixed=True)
        truth.check(compiled(truth.inputs, is_mixed=False), wanted)
        truth.check(pool.model(truth.inputs, None), wanted)
        refused("different adapters at", compiled, truth.inputs, "mixed")


def lengths_as(form: str, lengths: list[int], longest: int) -> torch.Tensor:
    counts = torch.tensor(lengths)
    mask = torch.arange(longest) < counts[:, None]
    return {"count": counts, "mask": mask.long(), "bool": mask, "float": mask.float(), "padding": ~mask}[form]


@pytest.mark.parametrize("form", ["count", "mask", "bool", "float", "padding"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("equal", [3, 1])
def test_rows_that_are_sorted_by_length(tmp_path, form, sign, equal):
    """Where they are of one length, or in order already, each is at its own place: this proves nothing for others."""
    kind = Kind(lambda: Sorting(sign), lambda: torch.randn(2, 3, 6), ("first", "last"))
    pool, folders = pool_for(kind, tmp_path, rows=2)
    pool.assign(["a", "b"])
    x = randn(2, 3, 6)
    fresh = [load(kind, folder) for folder in folders.values()]
    with torch.no_grad():
        for lengths, is_right in (([equal] * 2, True), ([1, 3], sign > 0), ([3, 1], sign < 0), ([equal] * 2, True)):
            given = x[:, : max(lengths)], lengths_as(form, lengths, max(lengths))
            if is_right != (form == "padding" and lengths[0] != lengths[1]):
                truth = torch.stack([model(*given)[row] for row, model in enumerate(fresh)])
                assert_close(pool.model(*given), truth)
            else:
                refused("different adapters at first", pool.model, *given)


def test_rows_that_say_the_same_prove_nothing_for_others(tmp_path):
    kind = Kind(ByContent, lambda: {"input_ids": torch.ones(4, 3, dtype=torch.int64)}, ("first", "last"))
    pool, _ = pool_for(kind, tmp_path)
    pool.assign(["a", "b", None, "a"])
    refused("different adapters at first", call, pool.model, kind.inputs())


@pytest.mark.parametrize("blind", [True, False])
def test_images_that_feed_a_layer_are_proven_in_each_batch(tmp_path, blind):
    """How many of them a row has may differ from batch to batch."""
    given = {"input_ids": torch.arange(12).view(4, 3) % 9, "pixel_values": randn(4, 1, 3, 6)}
    kind = Kind(lambda: Seeing(blind), lambda: given, ("first", "last"))
    pool, folders = pool_for(kind, tmp_path)
    given = kind.inputs()
    truth, wanted, calls = Truth(kind, folders, given), ["a", "b", None, "a"], calls_of(pool.model)
    pool.assign(wanted)
    proof = 2 + 2 + 1  # two references, two bits for four rows, and once more with other tokens
    for forwards in (proof + 1, 1 if blind else proof + 1):
        calls.clear()
        truth.check(call(pool.model, given), wanted)
        assert len(calls) == forwards


@pytest.mark.parametrize("form", ["count", "mask", "bool"])
def test_rows_of_other_lengths_are_proven_once(tmp_path, ways, form):
    kind = Kind(Masked, lambda: torch.randn(4, 3, 6), ("first", "last"))
    pool, folders = pool_for(kind, tmp_path)
    pool.assign(["a", "b", None, "a"])
    x, compute = kind.inputs(), ways(pool.model)
    fresh = [load(kind, folders["a"]), load(kind, folders["b"]), kind.base(), load(kind, folders["a"])]
    calls = calls_of(pool.model)
    with torch.no_grad():
        for number, lengths in enumerate(([3, 3, 3, 3], [1, 3, 2, 3], [3, 2, 2, 1])):
            given = x, lengths_as(form, lengths, 3)
            calls.clear()
            assert_close(compute(*given), torch.stack([model(*given)[row] for row, model in enumerate(fresh)]))
            if compute is pool.model:
                assert len(calls) == (1 if number else 1 + 3 * (2 + 2))


def test_what_it_costs(tmp_path):
    pool, _ = pool_for(LLAMA, tmp_path, rows=8)
    calls, inputs = calls_of(pool.model), {"input_ids": torch.randint(0, 40, (5, 7))}
    for wanted, forwards in (
        (["a"] * 5, 1),
        (["a", "b", None, "a", "b"], 1 + 2 + 3),  # two references and three bits for five rows
        (["b", "b", "a", "a", None], 1),
    ):
        pool.assign(wanted, copies=2, order="interleave")
        calls.clear()
        call(pool.model, inputs)
        call(pool.model, {"input_ids": torch.randint(0, 40, (10, 3))})  # each row twice, other lengths
        assert len(calls) == forwards + 1
    calls.clear()
    call(pool.model, inputs | {"attention_mask": torch.ones(5, 7, dtype=torch.int64)})
    assert len(calls) == 1 + 3 * (2 + 3)  # other lengths are tried in both orders


def test_flattened_tokens_are_blocks_of_a_row(tmp_path, ways):
    """And four tokens of one row look like four rows."""
    pool, folders = pool_for(FLAT, tmp_path, rows=4)
    compute = ways(pool.model)
    for tokens, wanted in ((4, ["a", "b", None, {"a": 0.5}]), (6, ["a", None, "b", "b"])):
        truth = Truth(FLAT, folders, randn(4, tokens, 6))
        pool.assign(wanted)
        truth.check(call(compute, truth.inputs), wanted)
        refused(r"a batch of 2(.|\n)*4 rows", call, compute, truth.inputs[:2])
    refused(r"a batch of 1(.|\n)*4 rows", call, compute, randn(1, 4, 6))
    pool.assign(["b"])
    assert_close(call(compute, truth.inputs[:1]), call(load(FLAT, folders["b"]), truth.inputs[:1]))


def test_only_outputs_with_a_number_for_each_row_are_compared(tmp_path):
    given = {"x": randn(4, 4, 6), "unused": torch.tensor([1, torch.inf, -1, 0])}  # which are not lengths of rows
    kind = Kind(Telling, lambda: given, ("first", "last"))
    pool, folders = pool_for(kind, tmp_path)
    truth, wanted = Truth(kind, folders, kind.inputs()), ["a", "b", None, "a"]
    pool.assign(wanted)
    truth.check(call(pool.model, truth.inputs), wanted)


@pytest.mark.parametrize("times", [0, 2])
def test_a_layer_that_no_compared_output_shows_is_refused_or_proven_by_blocks(tmp_path, times):
    kind = Kind(lambda: Hiding(times), lambda: torch.randn(4, 3, 6), ("first", "last"))
    pool, folders = pool_for(kind, tmp_path)
    x, wanted = kind.inputs(), ["a", "b", None, "a"]
    pool.assign(wanted)
    if not times:
        refused("at last[.](.|\n)*no entry for each row", call, pool.model, x)
        return
    with torch.no_grad():
        found = pool.model(x)
        for row, name in enumerate(wanted):
            expected = (load(kind, folders[name]) if name else kind.base())(x)
            for mine, fresh in zip(found, expected, strict=True):
                assert_close(mine.unflatten(0, (4, -1))[row], fresh.unflatten(0, (4, -1))[row])


def test_a_proof_holds_for_the_layers_that_were_called(tmp_path):
    """A part that is called alone runs some of the layers; the others are not proven by this."""
    pool, _ = pool_for(LLAMA, tmp_path)
    pool.assign(["a", "b", None, "a"])
    base, hidden = pool.model.get_base_model(), randn(4, 5, 16)
    with torch.no_grad():
        pool.model(input_ids=torch.randint(0, 40, (4, 5)))
        base.model.layers[0].mlp(hidden)
        shown, batch = pool._room.batch.shown, pool._room.batch
        assert shown == batch.acting
        batch.proven.clear()
        batch.shown = frozenset()
        layers, base.model.layers = base.model.layers, base.model.layers[:1]
        pool.model(input_ids=torch.randint(0, 40, (4, 5)))
        base.model.layers = layers
    assert batch.shown < batch.acting
    refused("no proof for this part", call, base.model.layers[1].mlp, hidden)


def test_everything_is_as_it_was_after_a_proof(tmp_path):
    kind = Kind(Noisy, lambda: torch.randn(4, 6), ("lin",))
    pool, _ = pool_for(kind, tmp_path)
    base = pool.model.get_base_model()
    pool.assign(["a", "b", None, "a"])
    outputs, seen, inputs = [], [], kind.inputs()
    for _ in range(2):  # with a proof, then without one
        base.calls.zero_()
        torch.manual_seed(3)
        with torch.no_grad():
            outputs.append(pool.model(inputs, seen))
        assert base.calls == 1
    assert len(seen) == 2
    assert torch.equal(*outputs)


def test_what_says_how_many_rows_a_batch_has():
    """Not positions, which are often the same for all rows."""
    embeds = {"position_ids": torch.zeros(1, 4), "inputs_embeds": torch.zeros(3, 4, 8)}
    assert size_of((), embeds) == 3
    assert size_of((), {"timestep": torch.zeros(1), "sample": torch.zeros(2, 4)}) == 2
    assert size_of((), {"timestep": torch.zeros(3)}) == size_of(({"sample": [torch.zeros(3, 4)]},), {}) == 3


def test_a_part_of_the_model_that_is_called_by_itself(tmp_path, ways):
    pool, folders = pool_for(LLAMA, tmp_path)
    inputs, fresh = {"input_ids": torch.randint(0, 40, (4, 5))}, load(LLAMA, folders["b"])
    pool.assign(["b"] * 4)

    def part(model):
        return lambda x: model.get_base_model().model.layers[0].mlp(x)

    mine, hidden = ways(part(pool.model)), randn(4, 5, 16)
    with torch.no_grad():
        assert_close(mine(hidden), part(fresh)(hidden))  # where all rows are equal, it needs no proof
        pool.assign(["a", "b", None, "a"])
        refused("no proof for this part", mine, hidden)
        inner = [call(each.get_base_model().model, inputs) for each in (pool.model, fresh)]  # a proof of these layers
        assert_close(inner[0][1], inner[1][1])
        assert_close(mine(hidden)[1], part(fresh)(hidden)[1])
