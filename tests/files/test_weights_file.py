"""A safetensors file as one piece of memory: the same tensors as the library reads, or left to the library."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from models import KINDS, save_random_adapter
from oracle import assert_same_tensors
from refusals import refused
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hotswap_lab import Adapter, demo
from hotswap_lab.files.weights_file import LONGEST, layout_of, map_weights


@pytest.mark.parametrize("name", demo.adapter_names())
def test_the_same_as_load_file(name):
    path = Path(demo.adapter_path(name)) / "adapter_model.safetensors"
    mapped, theirs = map_weights(path), load_file(path)
    total = sum(each.double().sum().item() for each in theirs.values())
    assert mapped.whole.double().sum().item() == pytest.approx(total)
    assert_same_tensors(mapped.tensors, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("metadata", [None, {"format": "pt"}], ids=["none", "as PEFT writes it"])
def test_dtypes_and_odd_shapes(tmp_path, dtype, metadata):
    tensors = {str(shape): torch.randn(shape).to(dtype) for shape in ((3, 5), (7,), (1, 1, 3), (0, 4))}
    save_file(tensors, tmp_path / "file", metadata)
    assert_same_tensors(map_weights(tmp_path / "file").tensors, tensors)


def test_what_can_not_be_read_this_way_is_left_to_the_library(tmp_path):
    save_file({"a": torch.ones(3), "b": torch.ones(2).half()}, tmp_path / "two dtypes")
    assert map_weights(tmp_path / "two dtypes") is None
    save_file({"a": torch.arange(3)}, tmp_path / "integers")
    assert map_weights(tmp_path / "integers") is None
    folder = Path(save_random_adapter(KINDS["linear"], tmp_path / "adapter", seed=1, r=2))
    save_file({"first.lora_A.weight": torch.arange(3)}, folder / "adapter_model.safetensors")
    refused("int64", Adapter.load, folder)


def parts_of(path: Path) -> tuple[bytes, bytes]:
    """The header and the data of a file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return data[8 : 8 + size], data[8 + size :]


def write(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


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
}


def check_not_mapped(path: Path) -> None:
    """It is left to the library, which refuses it."""
    with contextlib.suppress(KeyError, ValueError):
        assert map_weights(path) is None
    with pytest.raises(SafetensorError):
        load_file(path)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_headers_are_refused(tmp_path, damage):
    path = tmp_path / "file"
    save_file({"a": torch.randn(3), "b": torch.randn(6)}, path)
    text, data = parts_of(path)
    header = json.loads(text)
    DAMAGES[damage](header)
    text = json.dumps(header).encode()
    # aligned as ever: it is to be refused for what it says
    write(path, text + b" " * (-len(text) % 8), data)
    check_not_mapped(path)


def test_a_header_is_worked_out_once_and_its_numbers_are_read_each_time(tmp_path):
    layout_of.cache_clear()
    path = tmp_path / "file"
    for seed in range(3):
        save_file({"a": torch.randn(30, generator=torch.Generator().manual_seed(seed)), "b": torch.ones(2, 3)}, path)
        assert torch.equal(map_weights(path).tensors["a"], load_file(path)["a"])
    assert layout_of.cache_info()[:2] == (2, 1)  # hits and misses
    data = path.read_bytes()
    for size in (0, 4, 8, 20, len(data) - 4, len(data) - 1):
        path.write_bytes(data[:size])
        check_not_mapped(path)


def test_a_header_of_any_length_is_read_and_only_short_ones_are_kept(tmp_path):
    layout_of.cache_clear()
    path = tmp_path / "file"
    save_file({"a" * LONGEST: torch.randn(30)}, path)
    assert torch.equal(*(next(iter(each.values())) for each in (map_weights(path).tensors, load_file(path))))
    assert layout_of.cache_info().currsize == 0


def test_badly_aligned_data_is_left_to_the_library(tmp_path):
    path = tmp_path / "file"
    save_file({"a": torch.randn(30)}, path)
    text, data = parts_of(path)
    write(path, text.rstrip() + b" " * (1 + -len(text.rstrip()) % 4), data)
    assert map_weights(path) is None
    assert load_file(path)["a"].shape == (30,)


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path):
    path = tmp_path / "file"
    save_file({"a": torch.ones(30)}, path)
    map_weights(path).tensors["a"].zero_()
    assert load_file(path)["a"].all()


@pytest.mark.parametrize("for_one_swap", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_number_among_many_is_found(tmp_path, value, for_one_swap):
    folder = Path(save_random_adapter(KINDS["llama"], tmp_path / "a", seed=1, r=2))
    tensors = load_file(folder / "adapter_model.safetensors")
    key = sorted(tensors)[7]
    tensors[key].view(-1)[3] = value
    save_file(tensors, folder / "adapter_model.safetensors")
    refused(key, Adapter.load, folder, for_one_swap=for_one_swap)


def test_large_but_finite_numbers_are_fine(tmp_path):
    path = Path(save_random_adapter(KINDS["llama"], tmp_path / "a", seed=1, r=2)) / "adapter_model.safetensors"
    save_file({key: torch.full_like(each, 3e38) for key, each in load_file(path).items()}, path)
    assert Adapter.load(path.parent)
