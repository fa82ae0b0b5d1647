"""A pool with rows: all that a pool, PEFT and PyTorch do goes on meaning what it means, or is refused."""

from __future__ import annotations

import contextlib

import pytest
import torch
from lengths import long
from models import COPIES, KINDS, Kind, call, copied, load, lora_layers, save_random_adapter
from oracle import assert_equals_fresh_load, rounding
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from refusals import refused
from row_truth import Truth, assert_close

from hotswap_lab import (
    Adapter,
    AdapterPool,
    HotswapError,
    compat,
    get_strength,
    hotswap_adapter,
    in_use,
    prepare_model_for_compiled_hotswap,
    save_adapter,
    set_strength,
)
from hotswap_lab.pools.batch import HOOKS
from hotswap_lab.pools.copies import ONCE
from hotswap_lab.pools.rows import LONG

LINEAR, CONV = KINDS["linear"], KINDS["conv"]
FAMILY = {
    "a": dict(r=4, lora_alpha=6),
    "b": dict(r=6, lora_alpha=5, use_rslora=True),
    "c": dict(r=2, target_modules=["first"], lora_dropout=0.1),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    return {name: save_random_adapter(LINEAR, folder / name, seed=n, **FAMILY[name]) for n, name in enumerate(FAMILY)}


@pytest.fixture(scope="module")
def truth(folders):
    return Truth(LINEAR, folders, LINEAR.inputs()[:4])


@pytest.fixture
def model(folders):
    return load(LINEAR, folders["a"])


@pytest.fixture
def pool(model, folders):
    return AdapterPool(model, adapters=folders, rows=4, target_rank=12, progress=False)


@pytest.fixture(params=[False, long(True)], ids=["eager", "compiled"])
def compute(request, model, fresh_compiler):
    """The model, as it is and compiled."""
    return torch.compile(model, backend="eager") if request.param else model


def assert_rows(pool, truth, wanted, strengths=None) -> None:
    truth.check(call(pool.model, truth.inputs[: len(wanted)]), wanted, strengths)


# ---- what a pool does


def test_with_disabled_adapters_a_batch_has_any_size(model, pool):
    inputs = LINEAR.inputs()
    pool.assign(["a", "b", None])
    with model.disable_adapter():
        assert_close(call(model, inputs), call(LINEAR.base(), inputs))
    refused("rows", call, model, inputs)


def test_the_room_that_is_named_is_that_of_each_row(pool, model, folders):
    alone = AdapterPool(load(LINEAR, folders["a"]), adapters=folders, target_rank=12, progress=False)
    named = [int(each.summary.partition("room of ")[2].partition(" ")[0].replace(",", "")) for each in (pool, alone)]
    assert pool.summary.endswith("bytes in each of 4 rows")
    assert alone.summary.endswith("bytes")
    assert named[1] / 2 < named[0] <= named[1]  # not four times as much


def test_labels_and_blocks(pool, truth):
    assert pool.rows == []
    pool.assign(["a", None, {"a": 0.5, "c": 2}])
    assert pool.active is None
    with pool.using("b"):
        assert (pool.active, pool.rows) == ("b", [])
    pool.off()
    assert [row.strength for row in pool.rows] == [0, 0, 0]
    pool.assign(["a", None, {"a": 0.5, "c": 2}])
    with contextlib.suppress(ZeroDivisionError), pool.assigned([None, "c"], [1, 3]):
        assert_rows(pool, truth, [None, "c"], [1, 3])
        assert pool._room.batch.copies == ONCE
        raise ZeroDivisionError
    assert_rows(pool, truth, ["a", None, {"a": 0.5, "c": 2}])
    pool.update("a", Adapter.load(truth.folders["a"]).tensors)
    assert [pool.rows[number].version for number in (0, 2)] == [2, {"a": 2, "c": 1}]
    refused("in use", pool.remove, "c")


def test_strength_is_of_all_rows_beside_their_own(pool, model, truth):
    pool.assign([None, "b", "c"], strengths=[1, 2, 1])
    assert pool.strength == 1
    pool.strength = 0.5
    assert [row.strength for row in pool.rows] == [0, 1, 0.5]
    assert_rows(pool, truth, [None, "b", "c"], [1, 1, 0.5])
    set_strength(model, 2)
    assert_rows(pool, truth, [None, "b", "c"], [1, 4, 2])
    with pool.assigned(["a", "b", "a"]):
        assert_rows(pool, truth, ["a", "b", "a"])
    assert_rows(pool, truth, [None, "b", "c"], [1, 4, 2])
    pool.strength = 3
    pool.assign(["b", "b"])
    assert (pool.strength, get_strength(model)) == (1, 1)
    assert_rows(pool, truth, ["b", "b"])


def test_a_call_that_no_hook_sees_is_checked_as_one_and_ends_as_one(pool, truth):
    """That of code compiled ahead of time. The next call of the model is checked again."""
    pool.assign(["a", "b", "c"])
    inputs, batch = truth.inputs[:3], pool._room.batch
    with batch.around_call((inputs,), {}):
        pass
    assert batch.shown  # the rows differ, so there was a proof
    assert batch.local.outer is None  # it has ended
    with pytest.raises(HotswapError, match="a batch of 2"), batch.around_call((inputs[:2],), {}):
        pass
    with pytest.raises(HotswapError, match="a batch of 4"):
        call(pool.model, truth.inputs)
    assert_rows(pool, truth, ["a", "b", "c"])
    with torch.no_grad():
        lora_layers(pool.model)[0].lora_A["default"].weight.mul_(2)  # which is that of row 0 alone
    for _ in range(2):
        with pytest.raises(HotswapError, match="knows of one row only"), batch.around_call((inputs,), {}):
            pass
        assert batch.local.outer is None  # a part that is called next does not belong to this call


@pytest.mark.parametrize("wanted", [["c", "b"], [None, "b", "a"], ["a"] * 4])
def test_pefts_ways_to_scale_reach_all_rows(pool, model, truth, wanted):
    pool.assign(wanted)
    with rescale_adapter_scale(model, 0.5):
        assert_rows(pool, truth, wanted, [0.5] * len(wanted))
    for layer in lora_layers(model):
        layer.set_scale("default", 3)
        layer.scale_layer(0.5)
    assert get_strength(model) == 1.5
    assert_rows(pool, truth, wanted, [1.5] * len(wanted))


def test_a_mix_that_is_there_already_gets_another_strength(pool, truth):
    mix = {"a": 1.0, "b": -0.5}
    for strengths in ([0.5, 1], [1, 1], [1, -2]):
        pool.assign([mix, mix], strengths=strengths)
        assert_rows(pool, truth, [mix, mix], strengths)
    pool.swap(mix)
    assert_rows(pool, truth, [mix, mix])


def test_rows_with_the_same_mix_are_equal(pool, truth):
    """They need no proof, so that models that don't keep rows apart can compute them, too."""
    mix = {"a": 0.5, "c": 2}
    pool.assign([mix, dict(mix)])
    assert not pool._room.batch.differs
    assert_rows(pool, truth, [mix, mix])
    with pool.assigned(["a", "b"]):
        assert pool._room.batch.differs
    assert not pool._room.batch.differs
    pool.update("a", Adapter.load(truth.folders["a"]).tensors)
    assert not pool._room.batch.differs
    assert_rows(pool, truth, [mix, mix])
    pool.assign([mix, {"a": 0.5, "c": 1}])
    assert pool._room.batch.differs


def test_nothing_stays_of_an_adapter_that_overflowed(pool, truth, compute, folders):
    """In a row without an adapter, 0 times infinity would be no number."""
    huge = Adapter.load(folders["a"])
    for tensor in huge.tensors.values():
        tensor.fill_(torch.finfo(tensor.dtype).max)
    pool.add("huge", huge)
    pool.assign(["huge", "a", "huge"])
    call(compute, truth.inputs[:3])
    pool.assign([None, "a", None])
    truth.check(call(compute, truth.inputs[:3]), [None, "a", None])


def test_only_row_0_and_rows_that_change_are_written(pool, monkeypatch):
    """Other code may have written to row 0, which are the parameters."""
    written, copy = [], compat.foreach_copy

    def noted(targets, sources, **options):
        written.extend(targets)
        copy(targets, sources, **options)

    monkeypatch.setattr(compat, "foreach_copy", noted, raising=False)
    pool.assign(["a", {"a": 1.0, "b": 0.5}, "c", None], strengths=[1, 0.5, 1, 1])
    written.clear()
    pool.assign(["a", {"a": 1.0, "b": 0.5}, "b", None], strengths=[1, 0.5, 1, 1])
    row = pool._room.bands[0].memory
    large = [each.data_ptr() for each in written if each.numel() >= row.numel()]
    assert large == [row.data_ptr() + number * row.nbytes for number in (0, 2)]


@pytest.mark.parametrize(
    ("wanted", "options", "match"),
    [
        (["a"] * 5, {}, "There is no room for 5 rows"),
        ([], {}, "There is no room for 0 rows"),
        (["a", "b"], dict(strengths=[1]), "not as many strengths as rows"),
        (["a", "b"], dict(strengths=[1, float("nan")]), "strength"),
        (["a", "nobody"], {}, "'nobody'"),
        (["a", {"a": 1, "nobody": 1}], {}, "'nobody'"),
        (["a", {"a": "much"}], {}, "strength"),
        (["a", "b"], dict(copies=0), "can't have each row"),
        (["a", "b"], dict(copies=1.5), "can't have each row"),
        (["a", "b"], dict(copies="2"), "can't have each row"),
        (["a", "b"], dict(copies=2), "order in which a batch has its copies"),
        (["a", "b"], dict(copies=2, order="repeat"), "order='repeat'"),
        (["a", {}], {}, "A mix needs adapters"),
    ],
)
def test_wrong_arrangements_change_nothing(pool, wanted, options, match):
    pool.assign(["a", "b"])
    refused(match, pool.assign, wanted, **options)


def test_a_mix_above_the_room_says_which_rank_to_prepare_for(model, folders):
    pool = AdapterPool(model, adapters=folders, rows=2, progress=False)
    refused(r"rank 10 .*(.|\n)*at most 6(.|\n)*target_rank=10", pool.assign, [{"a": 1, "b": 1}])
    pool = AdapterPool(load(LINEAR, folders["a"]), adapters=folders, rows=2, target_rank=10, progress=False)
    pool.assign([{"a": 1, "b": 1}])


def test_without_rows_nothing_can_be_assigned(model, folders):
    pool = AdapterPool(model, adapters=folders, progress=False)
    refused(r"There is no room for 1 rows(.|\n)*rows=1\n(.|\n)*rows=2", pool.assign, ["a"])


@pytest.mark.parametrize(("kind", "lora"), [(LINEAR, dict(lora_bias=True)), (CONV, dict(target_modules=["grouped2d"]))])
def test_what_can_not_be_mixed_is_refused(kind, lora, tmp_path):
    folders = {name: save_random_adapter(kind, tmp_path / name, seed=n, r=4, **lora) for n, name in enumerate("ab")}
    pool = AdapterPool(load(kind, folders["a"]), adapters=folders, target_rank=12, progress=False)
    refused("can't be mixed", pool.swap, {"a": 0.5, "b": 0.5})


def test_an_arrangement_is_refused_inside_a_computation(pool, model):
    with in_use(model):
        refused("computing with the model", pool.assign, ["a", "b"])
    assert pool.rows == []


# ---- batches


def test_other_batches_are_refused_with_both_numbers(pool, model, truth, compute):
    """A model is told how often a batch has each row, and in which order; what is compiled computes nothing else."""
    pool.assign(["a", "b", None])
    truth.check(call(compute, truth.inputs[:3]), ["a", "b", None])
    for size in (2, 4):
        refused(rf"a batch of {size}(.|\n)*3 rows(.|\n)*sorts or splits", call, compute, truth.inputs[:size])
    if compute is model:
        refused(r"a batch of 7(.|\n)*3 rows", call, compute, truth.inputs.repeat(7, 1)[:7])
    else:
        refused(r"a batch of 6(.|\n)*3 rows", call, compute, truth.inputs[:3].repeat(2, 1))
    pool.assign(["a", "b", None], copies=2, order="interleave")
    expected = truth.rows(["a", "b", None]).repeat_interleave(2, 0)
    assert_close(call(compute, truth.inputs[:3].repeat_interleave(2, 0)), expected)
    pool.swap("c")
    assert_close(call(compute, truth.inputs), truth.of("c"))
    if compute is model:
        call(model, truth.inputs.repeat(50, 1)[:50])
    else:
        refused(r"a batch of 5(.|\n)*at most 4 rows", call, compute, truth.inputs.repeat(5, 1)[:5])
    for layer in lora_layers(model):
        layer.set_scale("default", 0.5)
    truth.check(call(compute, truth.inputs), ["c"] * 4, [0.5] * 4)


@pytest.mark.parametrize("target_rank", [LONG - 1, LONG, LONG + 5])
def test_however_the_rows_lie(model, folders, truth, compute, target_rank):
    pool = AdapterPool(model, adapters=folders, rows=4, target_rank=target_rank, progress=False)
    for wanted in (["a", "b", None, {"a": 0.5, "b": 1.5}], ["c", "c", "b", "a"]):
        pool.assign(wanted)
        truth.check(call(compute, truth.inputs), wanted)
    hotswap_adapter(model, folders["b"], "default")
    truth.check(call(compute, truth.inputs), ["b"] * 4)


# ---- what others do


def test_preparing_again(pool, model, folders, truth):
    pool.assign(["a", "b"])
    prepare_model_for_compiled_hotswap(model, target_rank=12)  # there is room already
    assert_rows(pool, truth, ["a", "b"])
    refused("may have different adapters", prepare_model_for_compiled_hotswap, model, target_rank=20)
    assert_rows(pool, truth, ["a", "b"])
    pool.swap("b")
    prepare_model_for_compiled_hotswap(model, target_rank=20)
    assert_equals_fresh_load(model, LINEAR, folders["b"], prepared=True)
    refused("no longer where", pool.assign, ["a"])
    again = AdapterPool(model, adapters=folders, rows=2, progress=False)
    again.assign(["c", "b"])
    assert_rows(again, truth, ["c", "b"])
    base = model.get_base_model()
    assert len(base._forward_pre_hooks) == len(base._forward_pre_hooks_with_kwargs) == 1


def test_saving_says_that_rows_are_not_saved(pool, model, tmp_path):
    """PEFT saves what is in the place of row 0, also if that row has no adapter."""
    pool.assign([None, "a"])
    with pytest.warns(UserWarning, match="rows of default may have different adapters"):
        model.save_pretrained(tmp_path)
    refused("may have different adapters", save_adapter, model, tmp_path)


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("wanted", [["a", "b"], [None, None]])
def test_copies_of_rows_are_refused(pool, model, truth, wanted, way):
    """A copy has the parameters alone: it would compute all rows with those of row 0."""
    pool.assign(wanted)
    advice = r"may have different adapters(.|\n)*pool.swap"
    refused(advice, copied, model, way)
    refused(advice, copied, model.get_base_model().first, way)
    assert_rows(pool, truth, wanted)
    pool.swap("b")
    assert_close(call(copied(model, way), truth.inputs), truth.of("b"))


@pytest.mark.parametrize("first", ["plain", "compiled", "next"])
def test_unloading_takes_the_rows_with_it(pool, model, folders, truth, first, fresh_compiler):
    own = model.get_base_model().register_forward_hook(lambda *_: None)  # of the user's
    pool.assign(["a", "b"])
    assert_rows(pool, truth, ["a", "b"])
    base = model.unload()
    if first == "plain":
        assert_close(call(base, truth.inputs[:3]), truth.base[:3])
        assert [key for name in HOOKS for key in getattr(base, name)] == [own.id]
    elif first == "compiled":
        assert_close(call(torch.compile(base, backend="eager"), truth.inputs[:3]), truth.base[:3])
    again = PeftModel.from_pretrained(base, folders["c"]).eval()
    assert_close(call(again, truth.inputs[:3]), truth.of("c")[:3])
    pool = AdapterPool(again, adapters=folders, rows=3, progress=False)
    pool.assign(["b", None, "a"])
    assert_rows(pool, truth, ["b", None, "a"])
    refused("a batch of 2", call, again, truth.inputs[:2])


def test_layers_that_are_added(folders, truth):
    model = load(LINEAR, folders["c"])
    pool = AdapterPool(model, adapters={"c": folders["c"]}, rows=4, target_rank=6, progress=False)
    pool.assign(["c", None])
    refused("may have different adapters", hotswap_adapter, model, folders["a"], "default", add_layers=True)
    assert_rows(pool, truth, ["c", None])
    pool.swap("c")
    hotswap_adapter(model, folders["a"], "default", add_layers=True)
    assert_equals_fresh_load(model, LINEAR, folders["a"], prepared=True)
    assert not model.get_base_model()._forward_pre_hooks
    model.share_memory()  # which a model with rows refuses
    refused("no longer where", pool.assign, ["c"])


def test_a_model_that_was_converted_says_so(pool, model, folders, truth):
    pool.assign(["b", None])
    single = load(LINEAR, folders["b"]).float()
    tolerance = rounding(single, truth.inputs.float())
    model.to(torch.float32)
    refused("not where the rows of its pool are", call, model, truth.inputs[:2].float())
    refused("no longer where", pool.assign, ["a"])
    again = AdapterPool(model, adapters=folders, rows=2, progress=False)
    again.assign(["c", "a"])
    assert_close(call(model, truth.inputs[:2].float()).double(), truth.rows(["c", "a"]), tolerance)
    again.swap("b")  # all rows have what the parameters have, wherever they are
    model.to(torch.float64)
    assert_close(call(model, truth.inputs), truth.of("b"), tolerance)


def test_a_first_layer_that_is_compiled_since(pool, model, truth, fresh_compiler):
    model.get_base_model().first = torch.compile(model.get_base_model().first, backend="eager")
    pool.assign(["a", "b", None])
    assert_rows(pool, truth, ["a", "b", None])
    refused("a batch of 2", call, model, truth.inputs[:2])


def test_a_first_layer_that_is_taken_out(tmp_path):
    kind = Kind(lambda: torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Linear(12, 12)), LINEAR.inputs, ("1",))
    folder = save_random_adapter(kind, tmp_path, seed=1, r=2)
    model = load(kind, folder)
    AdapterPool(model, adapters={"a": folder}, rows=2, progress=False)
    del model.get_base_model()[1]
    assert torch.equal(call(model, kind.inputs()), kind.inputs().tanh())


@pytest.mark.parametrize("wanted", [["b", "c"], ["b", "b"], None])
def test_weights_that_others_write_are_of_all_rows_or_refused(pool, model, truth, compute, wanted):
    """Whoever writes to the parameters knows of row 0 only."""
    pool.assign(wanted) if wanted else pool.swap("b")
    expected = call(compute, truth.inputs[:2])
    same = {key: value.clone() for key, value in model.state_dict().items() if "lora_" in key}
    model.load_state_dict(same, strict=False)
    assert torch.equal(call(compute, truth.inputs[:2]), expected)
    twice = {key: value * 2 for key, value in same.items() if "lora_A" in key}
    model.load_state_dict(twice, strict=False)
    if wanted or compute is not model:
        refused("knows of one row only", call, compute, truth.inputs[:2])
    else:
        truth.check(call(compute, truth.inputs[:2]), ["b", "b"], [2, 2])
    pool.assign(["b", "a"])
    truth.check(call(compute, truth.inputs[:2]), ["b", "a"])


@pytest.mark.parametrize("wanted", [[None, "a"], ["b", "a"], [None, None]])
def test_a_write_through_data_to_a_first_row_is_refused(pool, model, truth, wanted):
    """Also where that row has no adapter: its memory is zero."""
    for write in (lambda x: x.data.add_(0.1), lambda x: x.data.fill_(torch.inf), lambda x: x.detach().numpy().fill(1)):
        pool.assign(wanted)
        assert_rows(pool, truth, wanted)
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                write(parameter)
        refused("knows of one row only", call, model, truth.inputs[: len(wanted)])
        pool.assign(wanted)
        assert_rows(pool, truth, wanted)


def test_training_is_refused_and_gradients_of_inputs_are_right(pool, model, folders, truth, compute):
    pool.assign(["a", "b"])

    def gradient(model, row):
        inputs = truth.inputs[:2].clone().requires_grad_()
        model(inputs)[row].square().sum().backward()
        return inputs.grad[row]

    for row, name in enumerate("ab"):
        assert_close(gradient(compute, row), gradient(load(LINEAR, folders[name]), row))
    model.requires_grad_(True)
    refused("is being trained", compute, truth.inputs[:2])
    truth.check(call(compute, truth.inputs[:2]), ["a", "b"])


def test_dropout_is_of_all_rows_or_refused(pool, model, truth, compute):
    model.train()
    pool.assign(["a", "b"])
    truth.check(call(compute, truth.inputs[:2]), ["a", "b"])
    pool.assign(["a", None])
    truth.check(call(compute, truth.inputs[:2]), ["a", None])
    pool.assign(["a", "c"])
    refused("dropout", call, compute, truth.inputs[:2])
    model.eval()
    truth.check(call(compute, truth.inputs[:2]), ["a", "c"])


def test_deleted(pool, model, folders, truth):
    pool.assign(["b", "c"])
    model.load_adapter(folders["c"], "other")
    model.delete_adapter("default")
    assert_close(call(model, truth.inputs), truth.of("c"))
    refused("no longer where", pool.assign, ["a"])
    model.load_adapter(folders["a"], "default")
    model.set_adapter("default")
    assert_close(call(model, truth.inputs[:3]), truth.of("a")[:3])


def test_two_pools_with_rows_on_one_model(model, folders, truth):
    model.load_adapter(folders["b"], "second")
    one = AdapterPool(model, adapters=folders, rows=3, progress=False)
    two = AdapterPool(model, "second", adapters=folders, rows=4, progress=False)
    one.assign(["a", "b", None])
    two.assign(["c", None, "a", "b"])
    assert_rows(one, truth, ["a", "b", None])
    model.set_adapter("second")
    assert_rows(two, truth, ["c", None, "a", "b"])
    one.assign(["c", "c", "c"])
    two.assign(["b", "a", "c"])
    model.base_model.set_adapter(["default", "second"])
    truth.check(call(model, truth.inputs[:3]), [{"b": 1.0, "c": 1.0}, {"a": 1.0, "c": 1.0}, {"c": 2.0}])


# ---- what has no rows


class Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ModuleList([torch.nn.Linear(12, 12)])

    def forward(self, x):
        return self.experts[0](x)


def _convolution(**options) -> Kind:
    return Kind(lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, **options)), lambda: None, ("0",))


NOT_PLAIN = "can't have another adapter in each row"
WITHOUT = {
    "DoRA": (LINEAR, dict(use_dora=True), {}, "lora_magnitude_vector"),
    "lora_bias": (LINEAR, dict(lora_bias=True), {}, "lora_B.bias"),
    "modules_to_save": (LINEAR, dict(target_modules=["first"], modules_to_save=["last"]), {}, "saved modules"),
    "grouped": (CONV, dict(target_modules=["grouped2d"]), {}, "The layer grouped2d can't have"),
    "Conv1d": (CONV, dict(target_modules=["conv1d"]), {}, "The layer conv1d can't have"),
    "experts": (Kind(Experts, LINEAR.inputs, ("experts.0",)), {}, {}, "The layer experts.0 can't have"),
    "trained": (LINEAR, {}, dict(is_trainable=True), "is being trained"),
    "dilated": (_convolution(dilation=2), {}, {}, NOT_PLAIN),
    "same": (_convolution(padding="same"), {}, {}, NOT_PLAIN),
    "circular": (_convolution(padding=1, padding_mode="circular"), {}, {}, NOT_PLAIN),
}


@pytest.mark.parametrize("what", WITHOUT)
def test_what_can_not_have_rows_is_refused_when_the_pool_is_made(what, tmp_path):
    kind, lora, options, match = WITHOUT[what]
    folder = save_random_adapter(kind, tmp_path / "a", seed=1, r=4, **lora)
    refused(match, AdapterPool, load(kind, folder, **options), adapters={"a": folder}, rows=2, progress=False)


def test_what_an_alpha_of_zero_turns_off_stays_so(tmp_path):
    """A layer, or all: whatever the strength, from the beginning on, and in no other row."""
    nothing = save_random_adapter(LINEAR, tmp_path / "nothing", seed=9, r=4, lora_alpha=0)
    zero = save_random_adapter(LINEAR, tmp_path / "zero", seed=1, r=4, lora_alpha=8, alpha_pattern={"first": 0})
    other = save_random_adapter(LINEAR, tmp_path / "other", seed=2, r=4, lora_alpha=8)
    folders = {"zero": zero, "other": other}
    model, truth = load(LINEAR, zero), Truth(LINEAR, folders, LINEAR.inputs()[:2])
    pool = AdapterPool(model, adapters={**folders, "nothing": nothing}, rows=4, progress=False)
    for strength in (1.0, 0.5):
        set_strength(model, strength)
        assert_rows(pool, truth, ["zero", "zero"], [strength] * 2)
    pool.swap("other")
    pool.assign(["zero", "other"])
    for strength in (0.5, 1.0):
        pool.strength = strength
        assert_rows(pool, truth, ["zero", "other"], [strength] * 2)
    pool.assign(["nothing", "other"])
    assert_rows(pool, truth, [None, "other"])
    pool.swap("nothing")
    assert_rows(pool, truth, [None, None])


@pytest.fixture(params=[1, 4])
def mixed(request, tmp_path) -> AdapterPool:
    """A pool with a mix in use, in the whole model or in a row."""
    folders = {name: save_random_adapter(LINEAR, tmp_path / name, seed=n, r=4) for n, name in enumerate("abc")}
    pool = AdapterPool(
        load(LINEAR, folders["a"]), adapters=folders, rows=request.param, target_rank=8, progress=False, max_bytes=10**9
    )
    mix = {"a": 0.5, "b": 0.5}
    pool.swap(mix) if request.param == 1 else pool.assign([mix, "b"])
    pool.big = Adapter.load(save_random_adapter(LINEAR, tmp_path / "big", seed=9, r=8))
    return pool


@pytest.mark.parametrize("way", ["higher rank", "changed files"])
def test_a_mix_comes_back_whatever_becomes_of_its_shares(mixed, tmp_path, way):
    before = call(mixed.model, LINEAR.inputs()[:2])
    with mixed.using("c"):
        assert not torch.allclose(call(mixed.model, LINEAR.inputs()[:2]), before, atol=0.01)
        if way == "higher rank":
            mixed.update("a", mixed.big.tensors, mixed.big.config)
        else:
            mixed._members["a"].packed = None  # as if others had taken its place
            save_random_adapter(LINEAR, tmp_path / "a", seed=5, r=2)
    assert_close(call(mixed.model, LINEAR.inputs()[:2]), before)


def test_an_update_that_has_no_room_in_the_mix_in_use_is_refused(mixed):
    refused("rank", mixed.update, "a", mixed.big.tensors, mixed.big.config)


def test_an_update_in_a_mix_keeps_to_the_limit_of_memory(tmp_path):
    folders = {name: save_random_adapter(LINEAR, tmp_path / name, seed=n, r=4) for n, name in enumerate("abxy")}
    options = dict(adapters=folders, rows=4, target_rank=8, progress=False)
    limit = AdapterPool(load(LINEAR, folders["a"]), **options).nbytes // 2
    pool = AdapterPool(load(LINEAR, folders["a"]), max_bytes=limit, **options)
    pool.assign([{"a": 0.5, "b": 0.5}, "x", "y"])
    new = Adapter.load(folders["x"])
    pool.update("b", new.tensors, new.config)
    assert pool.nbytes <= limit


@pytest.mark.parametrize("wrong", ["ab", {"a": 0.5, "b": 0.5}])
def test_what_is_no_list_of_rows_is_not_taken_for_one(pool, wrong):
    with pytest.raises(TypeError, match="an adapter or a mix for each row"):
        pool.assign(wrong)


@pytest.mark.parametrize("strength", [10**400, 1e308, float("nan")], ids=["huge", "infinite as float32", "NaN"])
def test_what_no_scaling_can_be_multiplied_by_is_refused(pool, model, strength):
    refused("strength", pool.swap, "b", strength)
    refused("strength", pool.assign, [{"a": strength}])
    refused("strength", set_strength, model, strength)
