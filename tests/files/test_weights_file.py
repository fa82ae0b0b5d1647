"""A safetensors file as one piece of memory: the same tensors as the library reads, or left to the library."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from models import KINDS, Kind, save_random_adapter
from mutations import WEIGHTS
from oracle import assert_same_tensors
from refusals import refused
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hotswap_lab import Adapter, demo
from hotswap_lab.files.weights_file import FOR_ONE_THREAD, LONGEST, layout_of, map_weights


def parts(folder: Path) -> tuple[dict, bytes]:
    """Header and data."""
    content = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def write(folder: Path, text: bytes, data: bytes) -> None:
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture
def path(tmp_path):
    """Where a test saves its tensors."""
    layout_of.cache_clear()
    return tmp_path / WEIGHTS


def is_mapped(path: Path) -> bool:
    """Whether a file is read this way, and then as the library reads it. What the library refuses is not."""
    with contextlib.suppress(KeyError, ValueError):
        if mapped := map_weights(path):
            theirs = load_file(path)
            assert_same_tensors(mapped.tensors, theirs)
            total = sum(each.double().sum().item() for each in theirs.values())
            assert mapped.whole.double().sum().item() == pytest.approx(total)
            return True
    return False


@pytest.mark.parametrize("name", demo.adapter_names())
def test_the_same_as_load_file(name):
    assert is_mapped(Path(demo.adapter_path(name)) / WEIGHTS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("metadata", [None, {"format": "pt"}], ids=["none", "as PEFT writes it"])
def test_dtypes_and_odd_shapes(path, dtype, metadata):
    save_file({str(shape): torch.randn(shape).to(dtype) for shape in ((3, 5), (7,), (1, 1, 3), (0, 4))}, path, metadata)
    assert is_mapped(path)


def test_what_can_not_be_read_this_way_is_left_to_the_library(path):
    for tensors in ({"a": torch.ones(3), "b": torch.ones(2).half()}, {"a": torch.arange(3)}):
        save_file(tensors, path)
        assert not is_mapped(path)
    # badly aligned data, too
    save_file({"a": torch.randn(30)}, path)
    header, data = parts(path.parent)
    text = json.dumps(header).encode()
    write(path.parent, text + b" " * (1 + -len(text) % 4), data)
    assert not is_mapped(path)
    assert load_file(path)["a"].shape == (30,)


def test_whole_numbers_are_refused(path):
    folder = save_random_adapter(KINDS["linear"], path.parent, seed=1, r=2)
    save_file({"first.lora_A.weight": torch.arange(3)}, path)
    refused("int64", Adapter.load, folder)


@pytest.mark.parametrize("device", ["nowhere", "meta"])
def test_a_device_that_can_not_be_read_to_is_not_exchanged_for_another(tmp_path, device):
    folder = save_random_adapter(KINDS["linear"], tmp_path, seed=1, r=2)
    refused("device", Adapter.load, folder, torch_device=device)


DAMAGES = {
    "beyond the end": lambda header: header["b"].update(data_offsets=[12, 1 << 40]),
    "negative": lambda header: header["a"].update(data_offsets=[-4, 12]),
    "a float": lambda header: header["a"].update(data_offsets=[0.0, 12]),
    "a truth value": lambda header: header["a"].update(data_offsets=[False, 12]),
    "a shape of floats": lambda header: header["a"].update(shape=[3.0]),
    "a shape of truth values": lambda header: header["a"].update(shape=[True, 3]),
    "a negative shape": lambda header: header["a"].update(shape=[-1, -3]),
    "overlap": lambda header: header["b"].update(data_offsets=[4, 28]),
    "other shape": lambda header: header["a"].update(shape=[1 << 20, 1 << 20]),
    "other dtype": lambda header: header["a"].update(dtype="F16"),
    "no dtype": lambda header: header["a"].pop("dtype"),
    "hole": lambda header: header.pop("a"),
    "a number as metadata": lambda header: header.update(__metadata__={"format": 1}),
}


def check_not_mapped(path: Path) -> None:
    """It is left to the library, which refuses it."""
    assert not is_mapped(path)
    with pytest.raises(SafetensorError):
        load_file(path)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_headers_are_refused(path, damage):
    save_file({"a": torch.randn(3), "b": torch.randn(6)}, path)
    header, data = parts(path.parent)
    DAMAGES[damage](header)
    text = json.dumps(header).encode()
    # aligned as ever: it is to be refused for what it says
    write(path.parent, text + b" " * (-len(text) % 8), data)
    check_not_mapped(path)


def test_a_header_is_worked_out_once_and_its_numbers_are_read_each_time(path):
    for seed in range(3):
        save_file({"a": torch.randn(30, generator=torch.Generator().manual_seed(seed)), "b": torch.ones(2, 3)}, path)
        assert is_mapped(path)
    assert layout_of.cache_info()[:2] == (2, 1)  # hits and misses
    data = path.read_bytes()
    for size in (0, 4, 8, 20, len(data) - 4, len(data) - 1):
        path.write_bytes(data[:size])
        check_not_mapped(path)


def test_a_header_of_any_length_is_read_and_only_short_ones_are_kept(path):
    save_file({"a" * LONGEST: torch.randn(30)}, path)
    assert is_mapped(path)
    assert layout_of.cache_info().currsize == 0


def test_writing_to_a_tensor_leaves_the_file_alone(path):
    save_file({"a": torch.ones(30)}, path)
    map_weights(path).tensors["a"].zero_()
    assert load_file(path)["a"].all()


@pytest.mark.parametrize("for_one_swap", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3e38])
def test_one_bad_number_among_many_is_found(path, value, for_one_swap):
    """A large one that is finite is fine."""
    folder = save_random_adapter(KINDS["llama"], path.parent, seed=1, r=2)
    tensors = load_file(path)
    key = sorted(tensors)[7]
    tensors[key].view(-1)[3] = value
    if value == 3e38:  # in all of them, so that no sum is finite
        tensors = {key: torch.full_like(each, value) for key, each in tensors.items()}
    save_file(tensors, path)
    if value == 3e38:
        assert Adapter.load(folder, for_one_swap=for_one_swap)
    else:
        refused(key, Adapter.load, folder, for_one_swap=for_one_swap)


def test_a_bad_number_behind_what_one_thread_checks_is_found(path):
    """A file so large is summed by all threads."""
    kind = Kind(lambda: torch.nn.Sequential(torch.nn.Linear(1024, 1024)), lambda: torch.ones(2, 1024), ("0",))
    folder = save_random_adapter(kind, path.parent, seed=1, r=520)
    tensors = load_file(path)
    assert sum(each.numel() for each in tensors.values()) > FOR_ONE_THREAD
    tensors[max(tensors)][-1, -1] = torch.nan
    save_file(tensors, path)
    refused("lora_B", Adapter.load, folder, for_one_swap=True)


@pytest.mark.parametrize("twice", ['"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},', ""])
def test_a_name_that_is_there_twice_is_left_to_safetensors(twice):
    """Which refuses it; json would take the last one."""
    found = layout_of((f'{{{twice}"a":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}  ').ljust(128).encode())
    assert (found is None) == bool(twice)
