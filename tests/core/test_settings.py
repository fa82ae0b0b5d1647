"""What a config says of a layer, and which of its values no fresh load can work with."""

from __future__ import annotations

import math

import pytest
from models import KINDS, load, save_random_adapter
from peft import IA3Config, LoraConfig

from hotswap_lab.core.settings import LayerSettings, damaged_values, damages, settings_for, settings_of

KIND = KINDS["linear"]
CONFIG = dict(
    r=4,
    lora_alpha=6,
    lora_dropout=0.25,
    use_rslora=True,
    rank_pattern={"first": 2, "blocks.1": 3},
    alpha_pattern={"last": 5},
    target_modules=[*KIND.modules],
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(KIND, save_random_adapter(KIND, tmp_path_factory.mktemp("adapter"), 1, **CONFIG))


@pytest.mark.parametrize("path", KIND.modules)
def test_a_config_says_what_peft_puts_on_the_layer(model, path):
    layer = model.get_base_model().get_submodule(path)
    settings = settings_for(LoraConfig(**CONFIG), path)
    assert settings == settings_of(layer, "default")
    assert settings.scaling == layer.scaling["default"]


def test_patterns_are_exceptions_by_the_end_of_a_path():
    config = LoraConfig(**CONFIG)
    assert settings_for(config, "blocks.0") == LayerSettings(4, 6, 0.25, True)
    assert settings_for(config, "model.blocks.1") == LayerSettings(3, 6, 0.25, True)
    assert settings_for(config, "last") == LayerSettings(4, 5, 0.25, True)


WRONG = [
    ("r", 0),
    ("r", True),
    ("r", 2.0),
    ("r", "4"),
    ("lora_alpha", math.nan),
    ("lora_alpha", None),
    ("lora_dropout", 1.5),
    ("lora_dropout", -0.1),
    ("use_rslora", 1),
    ("rank_pattern", {"first": 0}),
    ("rank_pattern", None),
    ("alpha_pattern", {"first": "8"}),
    ("target_modules", [3]),
    ("layers_to_transform", ["0"]),
    ("init_lora_weights", "unheard of"),
    ("fan_in_fan_out", "yes"),
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_value_that_no_fresh_load_takes_is_named_with_its_field(field, value):
    config = LoraConfig(**CONFIG)
    assert damages(config) == []
    setattr(config, field, value)
    (found,) = damages(config)
    assert field in found.found
    assert str(value) in found.found


@pytest.mark.parametrize("value", [{"first": 1}, {}])
def test_right_values_are_not_refused(value):
    assert damages(LoraConfig(**CONFIG | dict(rank_pattern=value))) == []


def test_values_that_are_nested_without_an_end_are_refused_before_they_are_copied():
    config = LoraConfig(**CONFIG)
    for _ in range(30):
        config.loftq_config = {"inner": config.loftq_config}
    (found,) = damages(config)
    assert "loftq_config" in found.found


def test_expressions_that_are_broken():
    (found,) = damages(LoraConfig(r=4, target_modules="(q_proj"))
    assert "(q_proj" in found.found


def test_of_other_methods_only_numbers_that_are_not_finite_are_refused():
    config = IA3Config(target_modules=["first"])
    assert damaged_values(config) == []
    config.strength = math.inf
    assert len(damaged_values(config)) == 1
