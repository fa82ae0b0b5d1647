"""What can be wrong with an adapter's folder. Each mutation damages a folder in place, in one way.

A mutation is a function of the folder and of a ``random.Random`` that it takes its choices from: a seeded one, or one
that hypothesis draws, and shrinks, the choices of. It returns a few words on what it did. Functions are found by the
tables at the end: what is done to safetensors files, to ``.bin`` files, to configs, and to any folder.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from peft import PeftType
from seeds import BIN, CONFIG, WEIGHTS

#: nothing may ever make this file, or import the module of this name
CANARY = "canary_was_executed"

Mutation = Callable[[Path, Random], str]


class Attack:
    """An object whose pickle runs a function when it is read."""

    def __init__(self, function: Callable, *arguments: object):
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


# ---- safetensors: eight bytes with the length of the header, the header, the data of all tensors


def parts(folder: Path) -> tuple[dict, bytes]:
    """Header and data."""
    content = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def write(folder: Path, header: dict | bytes, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + text + data)


def entries(header: dict) -> list[str]:
    return sorted(key for key in header if key != "__metadata__")


def tensors_of(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    header, data = parts(folder)
    return {
        key: (header[key]["dtype"], header[key]["shape"], data[slice(*header[key]["data_offsets"])])
        for key in entries(header)
    }


def write_tensors(folder: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    """A file that is in order, whatever its tensors are."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for key, (dtype, shape, values) in tensors.items():
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    write(folder, header, data)


def numel(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def flip_header_bits(folder: Path, pick: Random) -> str:
    content = bytearray((folder / WEIGHTS).read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    return _flip(folder / WEIGHTS, content, 0, end, pick)


def flip_data_bits(folder: Path, pick: Random) -> str:
    content = bytearray((folder / WEIGHTS).read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    return _flip(folder / WEIGHTS, content, start, len(content), pick)


def _flip(path: Path, content: bytearray, start: int, stop: int, pick: Random) -> str:
    places = [(pick.randrange(start, stop), pick.randrange(8)) for _ in range(pick.choice([1, 1, 1, 2, 8, 64]))]
    for position, bit in places:
        content[position] ^= 1 << bit
    path.write_bytes(content)
    return f"bits {places[:3]}"


def truncate(folder: Path, pick: Random) -> str:
    header, data = parts(folder)
    size = (folder / WEIGHTS).stat().st_size
    start = size - len(data)
    bounds = {0, 4, 8, start} | {start + offset for key in entries(header) for offset in header[key]["data_offsets"]}
    # another mutation may have declared offsets far beyond the end, and a file of that size would have to be read
    cut = min(max(pick.choice(sorted(bounds - {size})) + pick.choice([0, 0, -1, 1]), 0), size)
    with (folder / WEIGHTS).open("r+b") as file:
        file.truncate(cut)
    return f"to {cut} of {size} bytes"


def append(folder: Path, pick: Random) -> str:
    extra = bytes(pick.choice([1, 8, 4096]))
    with (folder / WEIGHTS).open("ab") as file:
        file.write(extra)
    return f"{len(extra)} bytes"


def header_length(folder: Path, pick: Random) -> str:
    header, data = parts(folder)
    text = json.dumps(header).encode()
    wrong = [0, 1, len(text) - 1, len(text) + 1, len(text) * 2, 100_000_001, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
    length = pick.choice(wrong)
    write(folder, text, data, length)
    return str(length)


DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8", "BOOL", "U64", "C64", "X"]
ITEMSIZE = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


def wrong_dtype(folder: Path, pick: Random) -> str:
    """Says another dtype than the data has."""
    header, data = parts(folder)
    key = pick.choice(entries(header))
    header[key]["dtype"] = pick.choice([*DTYPES, "f32", "", 7, None])
    write(folder, header, data)
    return f"{key}: {header[key]['dtype']}"


def other_dtype(folder: Path, pick: Random) -> str:
    """Tensors of another dtype, in a file that is in order."""
    tensors = tensors_of(folder)
    keys = [pick.choice(list(tensors))] if pick.random() < 0.7 else list(tensors)
    dtype = pick.choice(DTYPES[:-1])
    for key in keys:
        _, shape, values = tensors[key]
        size = ITEMSIZE.get(dtype, 1) * numel(shape)
        if dtype in ("F64", "F16", "BF16"):
            floats = torch.frombuffer(bytearray(values), dtype=torch.float32)
            kind = {"F64": torch.float64, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
            values = bytes(floats.to(kind).view(torch.uint8).tolist())
        elif dtype != "F32":
            values = bytes(pick.randrange(2) for _ in range(8)) * (size // 8 + 1)
        tensors[key] = dtype, shape, values[:size]
    write_tensors(folder, tensors)
    return f"{len(keys)} tensors, such as {keys[0]}: {dtype}"


def wrong_shape(folder: Path, pick: Random) -> str:
    """Says another shape than the data has room for, or orders the same numbers in another way."""
    header, data = parts(folder)
    key = pick.choice(entries(header))
    header[key]["shape"] = shape = _another_shape(header[key]["shape"], pick)
    write(folder, header, data)
    return f"{key}: {shape}"


def other_shape(folder: Path, pick: Random) -> str:
    """A tensor of another shape, in a file that is in order."""
    tensors = tensors_of(folder)
    key = pick.choice(list(tensors))
    dtype, shape, values = tensors[key]
    shape = _another_shape(shape, pick)
    size = 4 * numel(shape)
    tensors[key] = dtype, shape, (values * (size // len(values) + 1))[:size]
    write_tensors(folder, tensors)
    return f"{key}: {shape}"


def _another_shape(shape: list[int], pick: Random) -> list[int]:
    axis = pick.randrange(len(shape))
    size = pick.choice([0, 1, shape[axis] - 1, shape[axis] + 1, shape[axis] * 2])
    other = [*shape[:axis], size, *shape[axis + 1 :]]
    return pick.choice([other, shape[::-1], [*shape, 1], [1, *shape], [numel(shape)], shape[1:], []])


def impossible_shape(folder: Path, pick: Random) -> str:
    header, data = parts(folder)
    key = pick.choice(entries(header))
    shapes = [[2**20, 2**20], [2**40, 2**40], [2**63], [2**64], [2**62, 4], [0, 2**62], [-1, 4], [-6, -12], [2.0, 3]]
    header[key]["shape"] = shape = pick.choice([*shapes, "6", None, [[6]], {"0": 6}, [True, 6], [1] * 5000])
    write(folder, header, data)
    return f"{key}: {str(shape)[:40]}"


def wrong_offsets(folder: Path, pick: Random) -> str:
    header, data = parts(folder)
    key = pick.choice(entries(header))
    start, stop = header[key]["data_offsets"]
    wrong = [[-4, stop], [start, -1], [stop, start], [start + 4, stop + 4], [start, stop - 4], [start - 4, stop - 4]]
    wrong += [
        [start, 2**63],
        [2**63, 2**64 - 1],
        [2**64, 2**65],
        [0, len(data)],
        [float(start), stop],
        [str(start), stop],
    ]
    wrong += [[start], [start, stop, stop], [], None, [None, stop], [True, stop], {"0": start}]
    header[key]["data_offsets"] = offsets = pick.choice(wrong)
    write(folder, header, data)
    return f"{key}: {offsets}"


def overlap(folder: Path, pick: Random) -> str:
    """Two names for the same bytes."""
    header, data = parts(folder)
    key = pick.choice(entries(header))
    name = pick.choice([key + "2", key.replace("lora_A", "lora_B"), key.removeprefix("base_model.model.")])
    header[name] = dict(header[key])
    write(folder, header, data)
    return f"{key} and {name}"


def swap_offsets(folder: Path, pick: Random) -> str:
    header, data = parts(folder)
    first, second = pick.choice(entries(header)), pick.choice(entries(header))
    one, other = header[first], header[second]
    one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]
    write(folder, header, data)
    return f"{first} and {second}"


def duplicate_json_key(folder: Path, pick: Random) -> str:
    header, data = parts(folder)
    first, second = pick.choice(entries(header)), pick.choice(entries(header))
    text = json.dumps(header).encode()
    extra = json.dumps({first: header[second]}).encode()
    write(folder, text[:-1] + b", " + extra[1:], data)
    return f"{first} again, with what {second} has"


def duplicate_inner_key(folder: Path, pick: Random) -> str:
    header, data = parts(folder)
    text = json.dumps(header).encode()
    old = pick.choice([b'"dtype": "F32"', b'"shape": ['])
    new = {b'"dtype": "F32"': b'"dtype": "F16", "dtype": "F32"', b'"shape": [': b'"shape": [1], "shape": ['}[old]
    write(folder, text.replace(old, new, 1), data)
    return new.decode()


def metadata(folder: Path, pick: Random) -> str:
    header, data = parts(folder)
    odd = [{"format": "tf"}, {"format": 3}, {}, [], None, "pt", {"a": {"b": "c"}}]
    values = [*odd, {"format": "pt", "x": "y" * 10**6}]
    header["__metadata__"] = value = pick.choice(values)
    write(folder, header, data)
    return str(value)[:40]


def header_text(folder: Path, pick: Random) -> str:
    header, data = parts(folder)
    text = json.dumps(header).encode()
    texts = [b"", b"{}", b"[]", b"null", b"{", text[:-1], text + b"}", b"\xef\xbb\xbf" + text, b" " + text]
    texts += [text + b" " * 9, text.replace(b"lora", b"l\xffra", 1), b"[" * 50_000, b'{"a":' * 50_000]
    texts += [text.replace(b"F32", b"F\\ud83232"), text.replace(b"lora", b"l\\u0000ra", 1)]
    texts += [text.replace(b": [", b": [1e400, ", 1), text.replace(b"[0", b"[NaN")]
    new = pick.choice(texts)
    write(folder, new, data)
    return repr(new[:40])


M = "base_model.model."
NAMES = [
    *("", ".", "..", "../../x", "/etc/passwd", "../../../../tmp/x.lora_A.weight", f"{M}../../x.lora_A.weight", M),
    *(f"{M}.lora_A.weight", f"{M}first.base_layer.weight", f"{M}first.weight", f"{M}first.lora_A.default.weight"),
    *(f"{M}first.lora_A.weight", f"{M}first.lora_C.weight", f"{M}first.lora_A.bias"),
    *(f"{M}first.lora_magnitude_vector", f"{M}model.embed_tokens.weight", f"{M}lm_head.weight"),
    *(f"{M}model.layers.0.self_attn.v_proj.lora_A.weight", f"{M}__class__.lora_A.weight"),
    *(f"{M}first.__dict__.lora_A.weight", "prompt_embeddings", "\u202e\U0001f600.lora_A.weight", "a" * 100_000),
    *("a." * 5_000 + "lora_A.weight", "x\ny\x00z"),
]


def extra_key(folder: Path, pick: Random) -> str:
    tensors = tensors_of(folder)
    key, name = pick.choice(list(tensors)), pick.choice(NAMES)
    tensors[name] = tensors[key]
    write_tensors(folder, tensors)
    return repr(name[:60])


def renamed_key(folder: Path, pick: Random) -> str:
    tensors = tensors_of(folder)
    key = pick.choice(list(tensors))
    names = [key.removeprefix("base_model.model."), key.replace(".weight", ".default.weight"), key.upper(), key + " "]
    names += [key.replace(".lora_", ".default.lora_"), "base_model.model." + key, key.replace("lora_A", "lora_B")]
    name = pick.choice([*names, *NAMES])
    tensors[name] = tensors.pop(key)
    write_tensors(folder, tensors)
    return f"{key} is called {name[:60]!r}"


def missing_keys(folder: Path, pick: Random) -> str:
    tensors = tensors_of(folder)
    keys = list(tensors)
    which = pick.choice(["one", "a layer", "all of one kind", "all but one", "all"])
    key = pick.choice(keys)
    layer, kind = key.partition(".lora_")[0], key.rsplit(".", 2)[-2]
    gone = {
        "one": [key],
        "a layer": [each for each in keys if each.startswith(layer)],
        "all of one kind": [each for each in keys if kind in each],
        "all but one": [each for each in keys if each != key],
        "all": keys,
    }[which]
    write_tensors(folder, {each: tensors[each] for each in keys if each not in gone})
    return f"{which}: {key}"


def nonfinite(folder: Path, pick: Random) -> str:
    tensors = tensors_of(folder)
    key, value = pick.choice(list(tensors)), pick.choice([float("nan"), float("inf"), float("-inf")])
    dtype, shape, data = tensors[key]
    position = 4 * pick.randrange(len(data) // 4)
    tensors[key] = dtype, shape, data[:position] + struct.pack("<f", value) + data[position + 4 :]
    write_tensors(folder, tensors)
    return f"{key}: {value} at {position // 4}"


def large_values(folder: Path, pick: Random) -> str:
    """Finite numbers, however large or small, are fine."""
    tensors = tensors_of(folder)
    key, value = pick.choice(list(tensors)), pick.choice([3e38, -3e38, 1e-45, -0.0])
    dtype, shape, data = tensors[key]
    tensors[key] = dtype, shape, struct.pack("<f", value) * (len(data) // 4)
    write_tensors(folder, tensors)
    return f"{key}: {value}"


# ---- .bin: a zip file of a pickle and of the tensors' bytes


def flip_bits(folder: Path, pick: Random) -> str:
    content = bytearray((folder / BIN).read_bytes())
    return _flip(folder / BIN, content, 0, len(content), pick)


def truncate_bin(folder: Path, pick: Random) -> str:
    content = (folder / BIN).read_bytes()
    with zipfile.ZipFile(folder / BIN) as archive:
        bounds = [info.header_offset for info in archive.infolist()]
    cut = max(pick.choice([0, 2, 30, len(content) - 1, len(content) - 22, *bounds]) + pick.choice([0, 0, -1, 1]), 0)
    (folder / BIN).write_bytes(content[:cut])
    return f"to {cut} of {len(content)} bytes"


def attack(folder: Path, pick: Random) -> str:
    """A pickle that runs something, in all the formats that torch.load reads."""
    target = str(folder / CANARY)
    good = torch.load(folder / BIN, weights_only=True)
    calls = {
        "mkdir": Attack(os.mkdir, target),
        "system": Attack(os.system, f"touch {target}"),
        "exec": Attack(exec, f"open({target!r}, 'w')"),
        "eval": Attack(eval, f"__import__('os').mkdir({target!r})"),
        "getattr": Attack(getattr, os, "mkdir"),
        "torch.load": Attack(torch.load, target),
    }
    name, form = pick.choice(list(calls)), pick.choice(["zip", "legacy", "pickle", "protocol 0"])
    content = pick.choice([{**good, "x": calls[name]}, calls[name], {"x": [calls[name]]}, {calls[name]: 1}])
    with (folder / BIN).open("wb") as file:
        if form in ("zip", "legacy"):
            torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
        else:
            pickle.dump(content, file, protocol=0 if form == "protocol 0" else 2)
    return f"{name}, {form}"


def imports(folder: Path, pick: Random) -> str:
    """A pickle that names a function of a module that is not imported yet."""
    module = pick.choice([CANARY, f"{CANARY}.inner", "antigravity", "torch.utils.cpp_extension"])
    (folder / BIN).write_bytes(b"\x80\x02c" + module.encode() + b"\nrun\n)R.")
    return module


def zip_bomb(folder: Path, pick: Random) -> str:
    """Little in the file, much in memory."""
    kind = pick.choice(["deflated", "expanded", "declared"])
    key = "base_model.model.first.lora_A.weight"
    if kind == "expanded":
        huge = torch.zeros(1).as_strided(pick.choice([(6, 10**12), (10**6, 10**6), (6, 2**28)]), (0, 0))
        torch.save({key: huge}, folder / BIN)
    elif kind == "deflated":
        torch.save({key: torch.zeros(40 * 2**20)}, folder / BIN)
        deflate(folder / BIN)
    else:
        torch.save({key: torch.zeros(3)}, folder / BIN, _use_new_zipfile_serialization=False)
        content = (folder / BIN).read_bytes()
        (folder / BIN).write_bytes(content.replace(b"cpu\nq\x07K\x03N", b"cpu\nq\x07J\xff\xff\xff\x7fN"))
    return kind


def deflate(path: Path) -> None:
    """Compresses what is in a zip file."""
    with zipfile.ZipFile(path) as archive:
        content = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def odd(tensor: torch.Tensor) -> dict[str, object]:
    """What can't be swapped in."""
    return {
        "meta": tensor.to("meta"),
        "sparse": tensor.to_sparse(),
        "sparse CSR": tensor.to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
        "nested": torch.nested.nested_tensor([tensor, tensor]),
        "whole numbers": tensor.long(),
        "complex": tensor.to(torch.complex64),
        "boolean": tensor > 0,
        "numpy": tensor.numpy(),
        "list": tensor.tolist(),
        "number": 1.0,
        "none": None,
        "nan": tensor * float("nan"),
        "one more axis": tensor[None],
        "scalar": tensor[0, 0],
        "empty": tensor[:0],
    }


def odd_content(folder: Path, pick: Random) -> str:
    """Nothing dangerous, but no tensors by name either."""
    good = torch.load(folder / BIN, weights_only=True)
    key = next(iter(good))
    value = good[key]
    contents = {
        **{str(each)[:20]: each for each in (list(good.values()), value, 5, None, "weights", {})},
        **{f"{each} as key": {**good, each: value} for each in (5, None, (1, 2))},
        "nested": {"state_dict": good},
        "parameters": {each: torch.nn.Parameter(tensor) for each, tensor in good.items()},
        "transposed": {**good, key: value.t().contiguous().t()},
        "expanded": {**good, key: value[:1].expand(value.shape)},
        "slices": {each: torch.cat([tensor, tensor])[: len(tensor)] for each, tensor in good.items()},
        "conjugate": {**good, key: value.to(torch.complex64).conj()},
        "8 bits": {**good, key: value.to(torch.float8_e4m3fn)},
        "half": {each: tensor.half() for each, tensor in good.items()},
        "twice": {**good, key.removeprefix("base_model.model."): value},
        **{name: {**good, key: each} for name, each in odd(value).items() if name != "numpy"},
    }
    name = pick.choice(list(contents))
    legacy = name not in ("sparse CSR",) and pick.random() < 0.3
    torch.save(contents[name], folder / BIN, _use_new_zipfile_serialization=not legacy)
    return f"{name}, {'legacy' if legacy else 'zip'}"


# ---- adapter_config.json


def config_of(folder: Path) -> dict:
    return json.loads((folder / CONFIG).read_text())


def write_config(folder: Path, config: object) -> None:
    (folder / CONFIG).write_text(json.dumps(config))


def nested(depth: int, kind: str = "list") -> object:
    value: object = 1
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


#: of every JSON type, and of every size
VALUES = [
    *(None, True, False, 0, 1, -1, 2, 7, 2.5, -0.0, 10**9, 2**31, 2**63, 2**64, 10**400, 1e308, 1e-320),
    *(float("nan"), float("inf"), float("-inf")),
    *("", "x", "none", "all", "first", "q_proj", "all-linear", "CAUSAL_LM", "1", "\ud800", "a\x00b", "é" * 300),
    "y" * 10**5,
    *("/etc/passwd", "../../../../etc", "/dev/zero", CANARY),
    *([], ["first"], ["q_proj", "down_proj"], [1], [None], [[]], [1.5, "x"], ["x"] * 1000, [["first"]], [{}]),
    *({}, {"first": 2}, {"q_proj": 3}, {"a": {"b": []}}, {"first": "x"}, {"": 0}, {"r": 10**9}),
]
VALUES += [nested(30), nested(300), nested(300, "dict"), nested(900)]


def wrong_field(folder: Path, pick: Random) -> str:
    """Each field of the config with values of every JSON type."""
    config = config_of(folder)
    name, value = pick.choice(sorted(config)), pick.choice(VALUES)
    config[name] = value
    write_config(folder, config)
    return f"{name}={str(value)[:60]!r}"


SIZES = ("r", "alpha", "lora_alpha", "lora_dropout")
SIZES += ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads")


def wrong_size(folder: Path, pick: Random) -> str:
    config = config_of(folder)
    name = pick.choice([each for each in SIZES if each in config] or sorted(config))
    numbers = [0, -1, 5, 10**5, 10**6, 10**9, 2**31, 2**63, 10**18, 10**400, -(10**400), 1.0, 4.5, True, None, "4", [4]]
    config[name] = value = pick.choice([*numbers, float("nan"), float("inf"), 1e308])
    write_config(folder, config)
    return f"{name}={str(value)[:40]}"


EXPRESSIONS = ["(", "[", "*", "(?P<x", r"\1", "(?i)FIRST", "x" * 10_000, "a{1000000}", "(a{1000}){1000}", "", "^", "$"]
EXPRESSIONS += [".*", r"(.*\.)*last", r"first|last", "(?<=a)b", "\x00"]


def wrong_expression(folder: Path, pick: Random) -> str:
    """Regular expressions: broken ones, and others that nobody would write."""
    config = config_of(folder)
    fields = (
        "target_modules exclude_modules rank_pattern alpha_pattern modules_to_save layers_pattern feedforward_modules"
    )
    name = pick.choice([each for each in fields.split() if each in config] or ["modules_to_save"])
    expression = pick.choice(EXPRESSIONS)
    config[name] = expression
    if name.startswith(("rank", "alpha")):
        config[name] = {expression: 5}
    elif name in ("modules_to_save", "layers_pattern"):
        config[name] = [expression]
        config["layers_to_transform"] = [0] if name == "layers_pattern" else None
    write_config(folder, config)
    return f"{name}: {expression[:40]}"


def config_text(folder: Path, pick: Random) -> str:
    text = (folder / CONFIG).read_text()
    config = config_of(folder)
    bare = {key: value for key, value in config.items() if key != "peft_type"}
    texts = {
        "empty": b"",
        "a brace": b"{",
        "an object": b"{}",
        "a list": json.dumps([config]).encode(),
        "pairs": json.dumps(list(config.items())).encode(),
        "null": b"null",
        "a number": b"5",
        "a word": b'"peft_type"',
        "cut off": text[: pick.randrange(len(text))].encode(),
        "more behind": (text + "{}").encode(),
        "BOM": b"\xef\xbb\xbf" + text.encode(),
        "UTF-16": text.encode("utf-16"),
        "not UTF-8": text.encode().replace(b"LORA", b"L\xffRA") + b"\xff\xfe",
        "NUL": text.encode() + b"\x00",
        "surrogate": text.replace("LORA", "\\ud800", 1).encode(),
        "deep list": b'{"peft_type": "LORA", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "deep object": b'{"peft_type": "LORA", "x": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
        "long number": b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}",
        "comment": b"// x\n" + text.encode(),
        "duplicate": text.rstrip()[:-1].encode() + b', "r": 2, "peft_type": "LORA"}',
        "no peft_type": json.dumps(bare).encode(),
        "only peft_type": json.dumps({"peft_type": config["peft_type"]}).encode(),
        "bytes": bytes(pick.randrange(256) for _ in range(200)),
    }
    name = pick.choice(list(texts))
    (folder / CONFIG).write_bytes(texts[name])
    return name


def flip_config_bits(folder: Path, pick: Random) -> str:
    content = bytearray((folder / CONFIG).read_bytes())
    return _flip(folder / CONFIG, content, 0, len(content), pick)


def missing_field(folder: Path, pick: Random) -> str:
    config = config_of(folder)
    name = pick.choice(sorted(config))
    del config[name]
    write_config(folder, config)
    return name


def other_type(folder: Path, pick: Random) -> str:
    """Another PEFT type, with or without the fields that it needs."""
    config = config_of(folder)
    kind = pick.choice([*sorted(each.value for each in PeftType), "lora", "X", "", 5, None, ["LORA"], {}])
    config = pick.choice([{**config, "peft_type": kind}, {"peft_type": kind}])
    write_config(folder, config)
    return str(kind)


def hooks(folder: Path, pick: Random) -> str:
    """Fields that make somebody import or read something."""
    config = config_of(folder)
    mapping = {"base_model_class": "run", "parent_library": CANARY}
    text_init = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x", "tokenizer_name_or_path": str(folder)}
    change = pick.choice(
        [
            {"auto_mapping": mapping},
            {"auto_mapping": {"base_model_class": "system", "parent_library": "os"}},
            {"auto_mapping": {**mapping, "AutoConfig": f"{CANARY}.run"}, "trust_remote_code": True},
            {"megatron_config": {"a": 1}, "megatron_core": CANARY},
            {"megatron_config": {"a": 1}, "megatron_core": f"megatron.{CANARY}"},
            {"megatron_config": {"a": 1}},
            {"base_model_name_or_path": str(folder)},
            {"base_model_name_or_path": "/etc", "revision": "../../x", "subfolder": "../.."},
            {"runtime_config": {"ephemeral_gpu_offload": True}},
            {"init_lora_weights": "corda", "corda_config": {"cache_file": str(folder / BIN)}},
            {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
            {"init_lora_weights": "lora_ga", "lora_ga_config": {"cache_file": str(folder / BIN)}},
            {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
            {"init_lora_weights": pick.choice(["pissa", "olora", "gaussian", "orthogonal", "x", True, False, 5])},
            text_init,
            {**text_init, "tokenizer_kwargs": {"trust_remote_code": True}},
            {"peft_type": "MULTITASK_PROMPT_TUNING", "prompt_tuning_init": "ONLY_SOURCE_SHARED"}
            | {"prompt_tuning_init_state_dict_path": "/dev/zero", "num_tasks": 1},
            {"arrow_config": {"arrow_expert_num": 2}},
            {"peft_type": "XLORA", "adapters": {"a": str(folder)}, "hidden_size": 16},
            {"peft_type": "SHADOW", "task_type": "CAUSAL_LM", "shadow_model": str(folder)},
            {"layer_replication": [[0, 2], [1, 2]]},
            {"layer_replication": [[0, 10**6]]},
            {"target_parameters": ["lm_head.weight"]},
            {"trainable_token_indices": pick.choice([[1, 2], [10**9], [-1], {"embed_tokens": [1]}])},
            {"ensure_weight_tying": True},
            {"unknown_field": {"__class__": "os.system"}, "__init__": CANARY},
        ]
    )
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": {"AutoTokenizer": [None, f"{CANARY}.Run"]}}
    if "tokenizer_name_or_path" in change:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        (folder / f"{CANARY}.py").write_text(f"open({str(folder / CANARY)!r}, 'w')")
    write_config(folder, {**config, **change})
    return str(change)[:80]


# ---- any folder


def strange_file(folder: Path, pick: Random) -> str:
    """One of the two files is no file, or is somewhere else. Nothing else may be done to the folder afterwards."""
    path = pick.choice([each for each in (folder / CONFIG, folder / WEIGHTS, folder / BIN) if each.exists()])
    kind = pick.choice(["other text", "dangling", "loop", "folder", "fifo", "zero", "null", "empty", "link", "missing"])
    elsewhere = folder / "elsewhere"
    path.rename(elsewhere)
    targets = {
        "passwd": "/etc/passwd",
        "dangling": "nowhere",
        "loop": path.name,
        "zero": "/dev/zero",
        "null": "/dev/null",
    }
    targets["link"] = elsewhere.name
    if kind in targets:
        path.symlink_to(targets[kind])
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "empty":
        path.touch()
    return f"{path.name}: {kind}"


def other_model(folder: Path, pick: Random) -> str:
    """An adapter that was made for another model, or the weights of one with the config of another."""
    sources = [each for each in folder.parent.glob("seeds/*/new") if each.is_dir()]
    source = pick.choice(sorted(sources))
    names = pick.choice([[CONFIG, WEIGHTS, BIN], [CONFIG], [WEIGHTS, BIN]])
    for name in names:
        if (source / name).exists():
            (folder / name).unlink(missing_ok=True)
            shutil.copy(source / name, folder / name)
    return f"{names[0]} of {source.parent.name!r}"


def second_file(folder: Path, pick: Random) -> str:
    """A .bin beside the safetensors file: nobody reads it."""
    if (folder / WEIGHTS).exists():
        (folder / BIN).write_bytes(pickle.dumps(Attack(os.mkdir, str(folder / CANARY))))
    else:
        (folder / WEIGHTS).write_bytes(b"\x08" + bytes(7) + b"{}      ")
    return "safetensors come first"


def nothing(folder: Path, pick: Random) -> str:
    """A good folder loads: the trials can tell good from bad."""
    return "as it was"


SAFETENSORS: tuple[Mutation, ...] = (
    *(flip_header_bits, flip_data_bits, truncate, append, header_length, wrong_dtype, other_dtype, wrong_shape),
    *(other_shape, impossible_shape, wrong_offsets, overlap, swap_offsets, duplicate_json_key, duplicate_inner_key),
    *(metadata, header_text, extra_key, renamed_key, missing_keys, nonfinite, large_values),
)
BINS: tuple[Mutation, ...] = (flip_bits, truncate_bin, attack, imports, zip_bomb, odd_content)
CONFIGS: tuple[Mutation, ...] = (
    *(wrong_field, wrong_size, wrong_expression, config_text, flip_config_bits, missing_field, other_type, hooks),
)
FOLDERS: tuple[Mutation, ...] = (strange_file, other_model, second_file, nothing)


def mutations_for(is_bin: bool) -> tuple[Mutation, ...]:
    """All that can be done to a folder."""
    return (BINS if is_bin else SAFETENSORS) + CONFIGS + FOLDERS
