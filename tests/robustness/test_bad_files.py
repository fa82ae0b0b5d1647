"""Damaged adapters: each loads as a fresh load does, or is refused in words and leaves everything as it was.

Each mutation in turn on each seed, some with more on top, by each of the ways in (``TIMES=35`` tries 4,200); and one
test for each defect that this has found. All adapters are tried in another process (see child.py), so that a crash, a
hang or something executed is seen, and the rest of the tests go on.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import zipfile
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from lengths import TIMES, long
from mutations import (
    EXPRESSIONS,
    Attack,
    config_of,
    deflate,
    mutations_for,
    nested,
    nothing,
    tensors_of,
    write_config,
    write_tensors,
)
from seeds import BIN, CONFIG, SEEDS, WEIGHTS
from trials import STRICTER, Laboratory, Tally, Trial


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    with Laboratory(tmp_path_factory.mktemp("laboratory")) as laboratory:
        yield laboratory


def plan_trials(count: int, seed: int):
    """Seed, mutations and way of each trial; the same for the same numbers."""
    pairs = [(name, mutation) for name, each in SEEDS.items() for mutation in mutations_for(each.is_bin)]
    for number, (name, mutation) in enumerate(itertools.islice(itertools.cycle(pairs), count)):
        draw = Random(f"{seed}/{number}")
        more = draw.sample(mutations_for(SEEDS[name].is_bin), draw.choice([0, 0, 0, 0, 1, 2]))
        ways = ["hotswap", "hotswap", "plan", *(["pool", "prepare"] if SEEDS[name].is_plain else [])]
        yield (
            name,
            [(each, Random(f"{seed}/{number}/{rank}")) for rank, each in enumerate((mutation, *more))],
            draw.choice(ways),
        )


def run_trials(laboratory: Laboratory, count: int, seed: int) -> Tally:
    """Tries ``count`` mutations."""
    tally = Tally()
    for name, mutations, way in plan_trials(count, seed):
        tally.add(mutations[0][0].__name__, laboratory.attempt(name, mutations, way))
    return tally


@pytest.mark.parametrize(("count", "seed"), [(16, 4), long(120 * TIMES, 2)])
def test_mutations_in_turn(laboratory, count, seed):
    tally = run_trials(laboratory, count, seed)
    assert not tally.failures, "\n".join(f"{trial}: {problems}" for trial, problems in tally.failures)
    ended = sum(tally.rows.values(), start=type(tally.rows["nothing"])())
    assert ended["refused"] > count // 4
    assert ended["equal"] > count // 8, "a fuzzer that only ever sees refusals tests little"


@st.composite
def damages(draw):
    """A seed, and one to three things that are done to it."""
    name = draw(st.sampled_from(sorted(SEEDS)))
    mutations = draw(st.lists(st.sampled_from(mutations_for(SEEDS[name].is_bin)), min_size=1, max_size=3))
    return name, [(each, draw(st.randoms(use_true_random=False))) for each in mutations]


@pytest.mark.long
@settings(derandomize=True, deadline=None, max_examples=40, suppress_health_check=list(HealthCheck), database=None)
@given(damage=damages())
def test_mutations_that_hypothesis_draws(laboratory, damage):
    name, mutations = damage
    trial = laboratory.attempt(name, mutations)
    note(f"{trial}\n{trial.ours}\n{trial.fresh}")
    assert trial.problems == []


def test_a_good_folder_is_swapped_in_by_every_way(laboratory):
    for name, seed in SEEDS.items():
        for way in ("hotswap", "plan", *(("pool", "prepare") if seed.is_plain else ())):
            trial = laboratory.attempt(name, [(nothing, Random(0))], way)
            assert trial.outcome == "accepted", f"{trial}: {trial.ours}"
            assert trial.problems == [], str(trial)


@pytest.mark.parametrize(
    ("ours", "fresh", "problem"),
    [
        ({"outcome": "hung"}, {}, "hung"),
        ({"outcome": "died"}, {}, "died"),
        ({"outcome": "raised", "text": "KeyError: 1"}, {}, "KeyError"),
        ({"outcome": "accepted"}, {"peft": "loads", "differs": "outputs"}, "differs"),
        ({"outcome": "accepted"}, {"peft": "ValueError: x"}, "PEFT refuses it"),
        ({"outcome": "refused", "text": "no"}, {"peft": "ValueError: x"}, "no found, expected and next"),
        (
            {"outcome": "refused", "text": "x\n  found:  a\n  expected:  b\n  next:  c"},
            {"peft": "loads"},
            "PEFT loads it",
        ),
        ({"outcome": "accepted", "executed": True}, {"peft": "loads"}, "executed"),
        ({"outcome": "accepted", "memory": 10**9}, {"peft": "loads"}, "bytes for files of"),
        ({"outcome": "accepted", "touched": "x"}, {"peft": "loads"}, "changed"),
    ],
)
def test_what_is_not_as_promised_is_noticed(ours, fresh, problem):
    trial = Trial("linear", "hotswap", [], ours, fresh, size=2000)
    assert any(problem in each for each in trial.problems)
    tally = Tally()
    tally.add("x", trial)
    assert tally.failures
    assert "wrong" in str(tally)


def refused(laboratory: Laboratory, seed: str, damage, way: str = "hotswap") -> str:
    """Tries one damage, which must be refused as promised; returns the text."""
    trial = laboratory.attempt(seed, [(damage, Random(0))], way, by_peft=False)
    assert trial.problems == [], str(trial)
    assert trial.outcome == "refused", str(trial)
    return trial.ours["text"]


def with_config(**changes):
    def change(folder: Path, pick: Random) -> str:
        write_config(folder, {**config_of(folder), **changes})
        return str(changes)[:60]

    return change


# ---- found by the long form: each of these was no HotswapError, or did worse


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
@pytest.mark.parametrize("kind", ["pipe", "folder", "/dev/zero", "nowhere", "itself"])
def test_what_is_no_file(laboratory, name, kind):
    """Opening a pipe waited for ever."""

    def replace(folder: Path, pick: Random) -> str:
        path = folder / name
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to(path.name if kind == "itself" else kind)
        return kind

    assert "can't be read" in (text := refused(laboratory, "linear", replace)) or "Can't find" in text


def test_a_link_to_nowhere_in_a_pool(laboratory):
    """FileNotFoundError."""

    def replace(folder: Path, pick: Random) -> str:
        (folder / CONFIG).unlink()
        (folder / CONFIG).symlink_to("nowhere")
        return ""

    assert "Can't find" in refused(laboratory, "linear", replace, "pool")


@pytest.mark.parametrize("way", ["plan"])
@pytest.mark.parametrize("seed", ["linear", "dora", "ia3", "bin"])
def test_files_that_change_between_plan_and_commit(laboratory, seed, way):
    """A file that was shortened ended the process; one with other content was swapped in without being checked."""
    for number in range(6):
        trial = laboratory.attempt(seed, [(nothing, Random(number))], way)
        assert trial.outcome == "accepted", str(trial)
        assert trial.problems == [], str(trial)


def test_expressions_that_are_none(laboratory):
    """RecursionError, OverflowError."""
    for expression in ("(" * 5000, "a{99999999999999}", "(", "*"):
        assert "regular expression" in refused(laboratory, "linear", with_config(rank_pattern={expression: 2}))
    pattern = with_config(layers_pattern=[r"\1"], layers_to_transform=[0])
    assert "regular expression" in refused(laboratory, "dora", pattern)
    assert EXPRESSIONS


@pytest.mark.parametrize("name", ["lora_alpha", "lora_dropout"])
def test_a_whole_number_that_is_larger_than_any_float(laboratory, name):
    """OverflowError."""
    assert name in refused(laboratory, "linear", with_config(**{name: 10**400}))


def test_values_within_values(laboratory):
    """RecursionError: such a config can be read but not copied."""
    for value in (nested(300), nested(900), nested(300, "dict")):
        assert "deep" in refused(laboratory, "linear", with_config(revision=value))


def test_no_number_is_a_floating_point_number(laboratory):
    """RuntimeError, from looking for NaN in nothing."""

    def whole_numbers(folder: Path, pick: Random) -> str:
        tensors = {key: ("I32", shape, values) for key, (_, shape, values) in tensors_of(folder).items()}
        write_tensors(folder, tensors)
        return ""

    trial = laboratory.attempt("ia3", [(whole_numbers, Random(0))])
    assert trial.problems == [], str(trial)


@pytest.mark.parametrize("name", ["r", "lora_alpha"])
@pytest.mark.parametrize("size", [10**6, 10**9])
def test_a_config_that_asks_for_memory(laboratory, size, name):
    """The memory was taken, or at least asked for."""
    if name == "r":
        refused(laboratory, "loha", with_config(r=size))
        refused(laboratory, "linear", with_config(r=size), "pool")
        refused(laboratory, "linear", with_config(r=size), "prepare")
        refused(laboratory, "prompt", with_config(num_virtual_tokens=size))
    assert refused(laboratory, "linear", with_config(r=size))


def test_long_names_and_names_that_upset_a_terminal(laboratory):
    """A text of 100,000 characters."""

    def rename(folder: Path, pick: Random) -> str:
        tensors = tensors_of(folder)
        tensors["\u202ea" * 50_000 + "\x1b[2J"] = tensors.popitem()[1]
        write_tensors(folder, tensors)
        return ""

    text = refused(laboratory, "linear", rename)
    assert len(text) < 4000
    assert "\u202e" not in text
    assert "\x1b" not in text


@pytest.mark.parametrize("seed", ["linear", "dora", "ia3"])
def test_a_name_without_its_prefix(laboratory, seed):
    """A fresh load ignores the tensor; it was swapped in."""

    def rename(folder: Path, pick: Random) -> str:
        tensors = tensors_of(folder)
        key = sorted(tensors)[1]
        tensors[key.removeprefix("base_model.model.")] = tensors.pop(key)
        write_tensors(folder, tensors)
        return key

    assert "prefix" in refused(laboratory, seed, rename)


# ---- .bin files


def as_bin(content, **save):
    def write(folder: Path, pick: Random) -> str:
        torch.save(content(folder) if callable(content) else content, folder / BIN, **save)
        return ""

    return write


KEY = "base_model.model.first.lora_A.weight"


@pytest.mark.parametrize("form", ["zip", "before 1.6", "pickle"])
def test_nothing_in_a_pickle_is_executed(laboratory, form):
    def write(folder: Path, pick: Random) -> str:
        content = {KEY: Attack(os.mkdir, str(folder / "canary_was_executed"))}
        if form == "pickle":
            (folder / BIN).write_bytes(pickle.dumps(content))
        else:
            torch.save(content, folder / BIN, _use_new_zipfile_serialization=form == "zip")
        return form

    assert "can't be read" in refused(laboratory, "bin", write)


def test_a_small_archive_of_much(laboratory):
    """160 MB from 160 kB."""

    def write(folder: Path, pick: Random) -> str:
        torch.save({KEY: torch.zeros(40 * 2**20)}, folder / BIN)
        deflate(folder / BIN)
        assert (folder / BIN).stat().st_size < 2**20
        assert zipfile.is_zipfile(folder / BIN)
        return ""

    assert "compressed" in refused(laboratory, "bin", write)


def test_few_bytes_that_say_they_are_many(laboratory):
    """A tensor of a trillion times the same number, which was looked through for NaN."""
    content = {KEY: torch.zeros(1).as_strided((10**6, 10**6), (0, 0))}
    assert "in a file of" in refused(laboratory, "bin", as_bin(content))


@pytest.mark.parametrize(
    "content",
    [
        *([torch.ones(2)], torch.ones(2), 5, None, {}, {5: torch.ones(2)}, {KEY: 5}, {KEY: [1.0]}),
        *({KEY: torch.ones(6, 12).to_sparse()}, {KEY: torch.ones(6, 12, device="meta")}, {"a": {KEY: torch.ones(2)}}),
    ],
    ids=lambda content: str(content)[:20],
)
def test_what_is_no_table_of_tensors(laboratory, content):
    """AttributeError, NotImplementedError, ..."""
    refused(laboratory, "bin", as_bin(content))


# ---- configs that name code or files


@pytest.mark.parametrize(
    ("seed", "changes"),
    [
        ("linear", {"auto_mapping": {"base_model_class": "run", "parent_library": "canary_was_executed"}}),
        ("linear", {"base_model_name_or_path": "/etc", "revision": "../../x"}),
        (
            "prompt",
            {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x", "tokenizer_name_or_path": "/dev/zero"},
        ),
    ],
)
def test_what_a_config_names_is_not_read(laboratory, seed, changes):
    trial = laboratory.attempt(seed, [(with_config(**changes), Random(0))])
    assert trial.outcome == "accepted", trial.ours
    assert trial.problems == [], str(trial)


def test_modules_that_a_config_names_are_not_imported(laboratory):
    changes = {"megatron_config": {"a": 1}, "megatron_core": "megatron.canary_was_executed"}
    assert "imported" in refused(laboratory, "linear", with_config(**changes))


def test_reasons_are_given_for_whatever_is_stricter_than_peft():
    assert all(json.dumps(each) and reason for each, reason in STRICTER.items())
