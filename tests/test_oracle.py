"""The oracle of the tests can say no: each kind of damage to a model, and to what is around it, is noticed."""

from __future__ import annotations

import os
import random
import tempfile
import threading
import warnings
from dataclasses import replace

import pytest
import torch
from models import ARCHITECTURES, KINDS, call, load, lora_layers, save_random_adapter
from oracle import (
    TOLERANCE,
    VISIBLE,
    assert_equals,
    assert_same_files,
    assert_same_outputs,
    assert_untouched,
    nothing_else_changes,
    rounding,
    snapshot,
    untouched,
)
from torch import nn

from hotswap_lab import AdapterPool
from hotswap_lab.core.journal import Journal
from hotswap_lab.core.slot import SLOTS

KIND = KINDS["linear"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return [
        save_random_adapter(KIND, root / "mine", 1, r=4, lora_dropout=0.2, alpha_pattern={"last": 3}),
        save_random_adapter(KIND, root / "other", 2, r=3, target_modules=["first", "last"]),
    ]


@pytest.fixture
def both(folders):
    """Two equal models, each with two adapters, one of which is trained."""
    models = []
    for _ in range(2):
        model = load(KIND, folders[0], is_trainable=True)
        model.load_adapter(folders[1], "other")
        last(model).base_layer.bias.data[0] = 0
        models.append(model.eval())
    return models


def first(model) -> nn.Module:
    return model.get_submodule("base_model.model.first")


def last(model) -> nn.Module:
    return model.get_submodule("base_model.model.last")


def weight(model, table: str = "lora_A", name: str = "default") -> nn.Parameter:
    return getattr(first(model), table)[name].weight


def scale(model, factor: float) -> None:
    """All of the adapter's scalings, and nothing else."""
    for layer in lora_layers(model):
        layer.scaling["default"] *= factor


def reorder(table: dict) -> None:
    """Puts the first entry behind the others."""
    key = next(iter(table))
    table[key] = table.pop(key)


DAMAGES = {
    "a weight, by the last bit": lambda model: weight(model).data[0, 0].mul_(1 + 2**-51),
    "a weight that float32 rounded": lambda model: weight(model).data.copy_(weight(model).data.float()),
    "a base weight": lambda model: first(model).base_layer.weight.data[0, 0].add_(1e-6),
    "a weight of the neighbor": lambda model: weight(model, name="other").data[0, 0].add_(1e-6),
    "the scaling": lambda model: first(model).scaling.update(default=2.0001),
    "the scaling, by the last bit": lambda model: scale(model, 1 + 2**-51),
    "the scaling of the neighbor": lambda model: first(model).scaling.update(other=1.5),
    "the rank that is said": lambda model: first(model).r.update(default=5),
    "the alpha that is said": lambda model: first(model).lora_alpha.update(default=5),
    "rsLoRA": lambda model: first(model).use_rslora.update(default=True),
    "dropout left on in evaluation": lambda model: first(model).lora_dropout["default"].train(),
    "no dropout in training": lambda model: setattr(first(model).lora_dropout["default"], "p", 0.0),
    "another dropout": lambda model: first(model).lora_dropout.update({"default": nn.Dropout(0.3)}),
    "the mode of one module": lambda model: first(model).lora_A.train(),
    "the mode of the model": lambda model: setattr(model, "training", True),
    "an adapter that is disabled": lambda model: model.base_model.disable_adapter_layers(),
    "a layer that computes while others are disabled": lambda model: setattr(first(model), "_disable_adapters", True),
    "another active adapter": lambda model: model.set_adapter("other"),
    "one layer with another active adapter": lambda model: first(model).set_adapter("other"),
    "two active adapters": lambda model: model.base_model.set_adapter(["default", "other"]),
    "a merged layer": lambda model: first(model).merge(),
    "trainable": lambda model: weight(model, name="other").requires_grad_(True),
    "frozen": lambda model: weight(model).requires_grad_(False),
    "a base weight that is trained": lambda model: first(model).base_layer.bias.requires_grad_(True),
    "a gradient": lambda model: setattr(weight(model), "grad", torch.zeros_like(weight(model))),
    "the precision": lambda model: setattr(weight(model, name="other"), "data", weight(model, name="other").float()),
    "a device": lambda model: first(model).lora_A["other"].to("meta"),
    "a field of the config": lambda model: setattr(model.peft_config["default"], "exclude_modules", ["blocks.0"]),
    "a target in the config": lambda model: model.peft_config["default"].target_modules.discard("last"),
    "a field of the neighbor's config": lambda model: setattr(model.peft_config["other"], "lora_alpha", 9),
    "an adapter that is gone": lambda model: model.delete_adapter("other"),
    "a layer that is gone": lambda model: last(model).delete_adapter("other"),
    "a hook": lambda model: first(model).register_forward_hook(lambda *_: None),
    "a hook before": lambda model: model.get_base_model().register_forward_pre_hook(lambda *_: None),
    "-0.0 instead of 0.0": lambda model: last(model).base_layer.bias.data[:1].neg_(),
    "more that is saved": lambda model: first(model).lora_A["default"].register_buffer("more", torch.ones(1)),
    "a bias": lambda model: first(model).lora_bias.update(default=True),
}
#: what tells whether it is the same model, though it equals a fresh load as well
ONLY_TOUCHED = {
    "the order of a table": lambda model: reorder(first(model).scaling),
    "the order of adapters": lambda model: reorder(first(model).lora_A._modules),
    "the order of configs": lambda model: reorder(model.peft_config),
    "a copy of a weight": lambda model: setattr(weight(model), "data", weight(model).data.clone()),
    "another parameter": lambda model: setattr(
        first(model).lora_A["default"], "weight", nn.Parameter(weight(model).data)
    ),
    "a copy of the config": lambda model: model.peft_config.update(
        default=type(model.peft_config["default"])(**model.peft_config["default"].to_dict())
    ),
    "an attribute": lambda model: setattr(first(model), "note", "mine"),
    "another class": lambda model: setattr(first(model), "__class__", type("Linear", (type(first(model)),), {})),
    "a hook of state dicts": lambda model: first(model)._register_state_dict_hook(lambda *_: None),
}


def test_equal_models_are_equal(both):
    assert_equals(*both, KIND)
    with untouched(*both):
        assert_equals(*both, KIND)  # and looking at them changes nothing


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damage_is_noticed(both, damage):
    before = snapshot(both[0])
    DAMAGES[damage](both[0])
    with pytest.raises(AssertionError):
        assert_equals(*both, KIND)
    with pytest.raises(AssertionError):
        assert_untouched(both[0], before)


#: what must be seen in the outputs alone, where no table is compared; 1e-5 would hide all of them
SMALL = {
    "a scaling": lambda model: first(model).scaling.update(default=first(model).scaling["default"] * (1 + 1e-6)),
    "all scalings": lambda model: scale(model, 1 + 1e-6),
    "all scalings, by less than float32 has": lambda model: scale(model, 1 + 5e-8),
    "one element of a weight": lambda model: largest(weight(model).data).mul_(1 + 1e-7),
    "one element of a base weight": lambda model: largest(last(model).base_layer.weight.data).mul_(1 + 1e-7),
    "a weight that float32 rounded": lambda model: weight(model).data.copy_(weight(model).data.float()),
    "all that float32 rounded": lambda model: model.float().double(),
    "a bias": lambda model: last(model).base_layer.bias.data.add_(1e-7),
}


def largest(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1)[tensor.abs().argmax()]


@pytest.mark.parametrize("damage", SMALL)
def test_a_small_mistake_is_noticed_in_outputs_alone(both, damage):
    assert_same_outputs(*both, KIND)
    SMALL[damage](both[0])
    with pytest.raises(AssertionError, match="not close"):
        assert_same_outputs(*both, KIND)
    off = (call(both[0], KIND.inputs()) - call(both[1], KIND.inputs())).abs().max()
    assert off < 1e-5 * call(both[1], KIND.inputs()).abs().max(), "it was never hidden"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_are_in_float64(name):
    """All of a model, and its outputs; and no weight is one that float32 has, too, but zeros and ones."""
    kind = ARCHITECTURES[name]
    model = kind.base()
    assert {each.dtype for each in (*model.parameters(), call(model, kind.inputs()))} == {torch.float64}
    for each in model.parameters():
        assert not (each[each != 0].float() == each[each != 0]).any()


def test_what_may_be_rounded_is_measured(folders):
    """In float32 a rounding of each weight is allowed, and a mistake that is visible is not."""
    kind = replace(KIND, dtype=torch.float32)
    assert rounding(load(KIND, folders[0]), KIND.inputs()) == TOLERANCE
    model, fresh = (load(kind, folders[0]) for _ in range(2))
    assert 1e-7 < rounding(fresh, kind.inputs()) < VISIBLE
    assert_same_outputs(model, fresh, kind)
    scale(model, 1 + 1e-4)
    with pytest.raises(AssertionError, match="not close"):
        assert_same_outputs(model, fresh, kind)
    half = replace(KIND, dtype=torch.bfloat16)
    assert 1e-3 < rounding(load(half, folders[0]), half.inputs()) < 0.1


@pytest.mark.parametrize("damage", ONLY_TOUCHED)
def test_a_touch_is_noticed(both, damage):
    before = snapshot(both[0])
    ONLY_TOUCHED[damage](both[0])
    with pytest.raises(AssertionError):
        assert_untouched(both[0], before)


#: what this package keeps, in a pool with rows
NOTES = {
    "the origin of a config": lambda pool: vars(pool.model.peft_config["default"]).update(_hotswap_origin=None),
    "a mark on a layer": lambda pool: vars(first(pool.model)).update(hotswap_off=frozenset({"default"})),
    "the rows": lambda pool: setattr(pool._room, "assigned", pool._room.assigned[:1]),
    "the memory of another row": lambda pool: pool._room._rows_of(pool._room.bands[0])[1, 0].add_(1e-6),
    "which numbers are looked at": lambda pool: pool._room.few.append(torch.zeros(1)),
    "how often a batch has a row": lambda pool: setattr(pool._room.batch, "copies", 2),
    "a call that has not ended": lambda pool: setattr(pool._room.batch.local, "outer", 0),
    "a proof": lambda pool: pool._room.batch.proven.update({(0,): frozenset({1})}),
    "another hook": lambda pool: pool._room.batch.watch(pool._room.batch.entries, Journal()),
    "a slot": lambda pool: vars(pool.model.get_base_model())[SLOTS].update(default=None),
    "a version": lambda pool: setattr(pool._members["mine"], "version", 2),
    "a member": lambda pool: pool._members.pop("mine"),
}


@pytest.mark.parametrize("damage", NOTES)
def test_a_note_is_looked_at(folders, damage):
    sources = dict(zip(["mine", "other"], folders, strict=True))
    pool = AdapterPool(load(KIND, folders[0]), adapters=sources, rows=2, progress=False)
    pool.assign([None, "other"])
    before = snapshot(pool)
    assert_untouched(pool, before)
    NOTES[damage](pool)
    with pytest.raises(AssertionError):
        assert_untouched(pool, before)


def test_files_are_compared_to_the_byte(both, monkeypatch):
    assert_same_files(*both, "default")
    save = type(both[0]).save_pretrained
    names = iter(range(9))

    def with_a_note(model, folder, **options):
        save(model, folder, **options)
        (folder / f"note{next(names)}").touch()

    monkeypatch.setattr(type(both[0]), "save_pretrained", with_a_note)
    with pytest.raises(AssertionError, match="note0"):
        assert_same_files(*both, "default")


def draw() -> None:
    torch.rand(1)


AROUND = {
    "random numbers": draw,
    "gradients": lambda: torch.set_grad_enabled(False),
    "the environment": lambda: os.environ.update(MARK=str(random.random())),
    "a filter of warnings": lambda: warnings.simplefilter("ignore", UserWarning),
    "a warning": lambda: warnings.warn("look", stacklevel=1),
    "the default precision": lambda: torch.set_default_dtype(torch.float64),
    "a file left open": lambda: LEFT.append(tempfile.TemporaryFile()),  # noqa: SIM115
    "a thread": lambda: threading.Thread(target=ENDED.wait, args=(20,), daemon=True).start(),
}
LEFT, ENDED = [], threading.Event()


@pytest.mark.parametrize("what", AROUND)
def test_what_is_around_a_model_is_looked_at(what, monkeypatch):
    monkeypatch.setenv("MARK", "0")
    ENDED.clear()
    with torch.random.fork_rng(), warnings.catch_warnings():
        try:
            with pytest.raises(AssertionError), nothing_else_changes():
                AROUND[what]()
        finally:
            torch.set_grad_enabled(True)
            torch.set_default_dtype(torch.float32)
            ENDED.set()
            LEFT.clear()


def test_what_was_open_before_may_be_closed():
    with tempfile.TemporaryFile() as file, nothing_else_changes():
        file.close()


ARGUMENTS = {
    "a tensor": (lambda: torch.ones(2), lambda value: value.add_(1)),
    "a dict of tensors": (lambda: {"a": torch.ones(2)}, lambda value: value["a"].add_(1)),
    "a list": (lambda: [1, 2], lambda value: value.pop()),
    "a tensor's flag": (lambda: torch.ones(2), lambda value: value.requires_grad_()),
}


@pytest.mark.parametrize("what", ARGUMENTS)
def test_arguments_are_looked_at(what):
    make, change = ARGUMENTS[what]
    value = make()
    with nothing_else_changes(value):
        pass
    with pytest.raises(AssertionError), nothing_else_changes(value):
        change(value)


def test_a_file_that_was_passed_in_is_looked_at(tmp_path):
    (tmp_path / "config").write_text("one")
    with pytest.raises(AssertionError), nothing_else_changes(tmp_path):
        (tmp_path / "config").write_text("two")
