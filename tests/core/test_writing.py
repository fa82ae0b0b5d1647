"""One function writes scalings: with a wrong value in it, every way of swapping is wrong, and says so."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from models import KINDS, load, save_random_adapter
from oracle import assert_same_outputs
from peft import LoHaConfig

from hotswap_lab import AdapterPool, hotswap_adapter, prepare_model_for_compiled_hotswap, set_strength
from hotswap_lab.core import writing
from hotswap_lab.core.writing import write_packed_scalings, write_scalings

KIND = KINDS["llama"]


def prepared(model, folders) -> None:
    prepare_model_for_compiled_hotswap(model, adapters=folders)
    hotswap_adapter(model, folders[1])


def pooled(model, folders) -> None:
    AdapterPool(model, adapters=dict(zip("AB", folders, strict=True)), progress=False).swap("B")


def in_rows(model, folders) -> None:
    AdapterPool(model, adapters=dict(zip("AB", folders, strict=True)), rows=2, progress=False).assign(["B", "B"])


def at_strength(model, folders) -> None:
    hotswap_adapter(model, folders[1])
    set_strength(model, 1)


#: ways to swap, and the configs of the two adapters; another alpha, so that the scaling has to be written
PLAIN = dict(r=4, lora_alpha=2), dict(r=4, lora_alpha=12)
DORA = dict(r=4, lora_alpha=2, use_dora=True), dict(r=4, lora_alpha=12, use_dora=True)
WAYS: dict[str, tuple[Callable, tuple]] = {
    "from disk": (lambda model, folders: hotswap_adapter(model, folders[1]), PLAIN),
    "prepared": (prepared, PLAIN),
    "in a pool": (pooled, PLAIN),
    "in rows": (in_rows, PLAIN),
    "by strength": (at_strength, PLAIN),
    "DoRA": (lambda model, folders: hotswap_adapter(model, folders[1]), DORA),
    "prepared DoRA": (prepared, DORA),
    "LoHa": (lambda model, folders: hotswap_adapter(model, folders[1]), (dict(alpha=2), dict(alpha=12))),
    "prepared LoHa": (prepared, (dict(r=4, alpha=2), dict(r=4, alpha=12))),
    "with saved modules": (
        lambda model, folders: hotswap_adapter(model, folders[1]),
        tuple(each | dict(modules_to_save=["lm_head"]) for each in PLAIN),
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_wrong_scaling_is_wrong_whatever_way_it_comes(way, tmp_path, monkeypatch):
    swap, configs = WAYS[way]
    folders = []
    for number, config in enumerate(configs):
        if "LoHa" in way:
            config = {"config": LoHaConfig(**config, init_weights=False, target_modules=list(KIND.modules))}
        folders.append(save_random_adapter(KIND, tmp_path / str(number), number, **config))
    model = load(KIND, folders[0])
    swap(model, folders)
    assert_same_outputs(model, load(KIND, folders[1]), KIND)

    def doubled(change, tables, name, scalings):
        write_scalings(change, tables, name, [2 * scaling for scaling in scalings])

    def doubled_in_memory(change, memories, scalings):
        write_packed_scalings(change, memories, 2 * scalings)

    for module in [module for name, module in sys.modules.items() if name.startswith("hotswap_lab")]:
        if vars(module).get("write_scalings") is write_scalings and module is not writing:
            monkeypatch.setattr(module, "write_scalings", doubled)
        if vars(module).get("write_packed_scalings") is write_packed_scalings and module is not writing:
            monkeypatch.setattr(module, "write_packed_scalings", doubled_in_memory)
    model = load(KIND, folders[0])
    swap(model, folders)
    with pytest.raises(AssertionError):
        assert_same_outputs(model, load(KIND, folders[1]), KIND)
