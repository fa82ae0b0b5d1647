"""What can be wrong with an adapter's folder: bytes, JSON, tensors, pickles. Each mutation damages a folder in place.

A mutation is a function of the folder and of a ``random.Random`` that it takes its choices from.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import safetensors.torch
import torch
from peft import PeftType

CONFIG, WEIGHTS, BIN = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
#: nothing may ever make this file, or import the module of this name
CANARY = "canary_was_executed"
M = "base_model.model."
KEY = f"{M}first.lora_A.weight"

Mutation = Callable[[Path, Random], None]

# ---- any file


def other_bytes(folder: Path, pick: Random) -> None:
    """Some bits flipped, or cut off, or with zeros at the end."""
    path = pick.choice([each for each in (folder / CONFIG, folder / WEIGHTS, folder / BIN) if each.exists()])
    content = bytearray(path.read_bytes())
    size = len(content)
    if pick.random() < 0.5:
        for _ in range(pick.choice([1, 1, 1, 2, 8, 64])):
            content[pick.randrange(size)] ^= 1 << pick.randrange(8)
        path.write_bytes(content)
        return
    data = min(8 + int.from_bytes(content[:8], "little"), size)  # where the data of safetensors starts
    lengths = [0, 2, 4, 8, 30, data - 1, data, data + 1, size - 22, size - 4, size - 1, size + 1, size + 4096]
    os.truncate(path, max(0, pick.choice([*lengths, pick.randrange(size + 1)])))


LINKS = {"passwd": "/etc/passwd", "nowhere": "nowhere", "zero": "/dev/zero", "null": "/dev/null"}


def replaced(name: str, kind: str) -> Mutation:
    """Puts something else in the place of a file."""

    def replace(folder: Path, pick: Random) -> None:
        path, elsewhere = folder / name, folder / "elsewhere"
        path.rename(elsewhere)
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "empty":
            path.touch()
        else:
            path.symlink_to({**LINKS, "link": elsewhere, "itself": path.name}[kind])

    return replace


# ---- JSON: a config, and the header of a safetensors file


def nested(depth: int, kind: str = "list") -> object:
    value: object = 1
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


#: names of tensors
NAMES = [
    *("", ".", "..", "../../x", "/etc/passwd", "../../../../tmp/x.lora_A.weight", f"{M}../../x.lora_A.weight", M, KEY),
    *(f"{M}.lora_A.weight", f"{M}first.base_layer.weight", f"{M}first.weight", f"{M}first.lora_A.default.weight"),
    *(f"{M}first.lora_C.weight", f"{M}first.lora_A.bias", f"{M}first.lora_magnitude_vector", f"{M}lm_head.weight"),
    *(f"{M}model.embed_tokens.weight", f"{M}model.layers.0.self_attn.v_proj.lora_A.weight"),
    *(f"{M}__class__.lora_A.weight", f"{M}first.__dict__.lora_A.weight", "prompt_embeddings", "x\ny\x00z"),
    *("\u202e\U0001f600.lora_A.weight", "a" * 100_000, "a." * 5_000 + "lora_A.weight"),
]
#: of every size
NUMBERS = [0, 1, -1, 2, 5, 7, 2.5, -0.0, 10**5, 10**6, 10**9, 2**31, 2**63, 2**64, 10**18, 10**400, -(10**400), 1e308]
NUMBERS += [1e-320, float("nan"), float("inf"), float("-inf"), None, True, "4", [4]]
#: broken ones, and others that nobody would write
EXPRESSIONS = ["(", "[", "*", "(?P<x", r"\1", "(?i)FIRST", "x" * 10_000, "a{1000000}", "(a{1000}){1000}", "", "^", "$"]
EXPRESSIONS += [".*", r"(.*\.)*last", r"first|last", "(?<=a)b", "\x00"]
TEXTS = ["", "x", "none", "all", "first", "q_proj", "all-linear", "CAUSAL_LM", "\ud800", "a\x00b", "é" * 300]
TEXTS += ["y" * 10**5, "/etc/passwd", "../../../../etc", "/dev/zero", CANARY, *sorted(each.value for each in PeftType)]
TEXTS += ["lora", "F64", "F16", "BF16", "F8_E4M3", "I64", "I32", "I8", "U8", "BOOL", "U64", "C64", *EXPRESSIONS]
LISTS = [[], ["first"], ["q_proj", "down_proj"], [1], [None], [[]], [1.5, "x"], ["x"] * 1000, [["first"]], [{}]]
LISTS += [[2**20, 2**20], [2**40, 2**40], [2**63], [2**62, 4], [0, 2**62], [-1, 4], [-6, -12], [1] * 5000]
TABLES = [{}, {"first": 2}, {"q_proj": 3}, {"a": {"b": []}}, {"first": "x"}, {"": 0}, {"r": 10**9}, {"format": "tf"}]
TABLES += [{each: 5} for each in EXPRESSIONS]
DEEP = [nested(30), nested(300), nested(300, "dict"), nested(900)]


def other_value(value: object, pick: Random) -> object:
    """Of the same type, or of any."""
    near: list = [*DEEP, value]
    if isinstance(value, (int, float)):
        near = [*NUMBERS, value + 1, value + 4, value - 4, -value, 2 * value, str(value), float(value)]
    elif isinstance(value, str):
        near = [*TEXTS, [value], {value: 5}]
    elif isinstance(value, list):
        near = [*LISTS, value[::-1], value[1:], [*value, 1], [1, *value], [each for each in value for _ in (1, 2)]]
    elif isinstance(value, dict):
        near = TABLES
    return pick.choice(pick.choice([near, near, near, NUMBERS, TEXTS, LISTS, TABLES, DEEP]))


def entries(value: object) -> Iterator[tuple]:
    """Each place in a document, as a table or list and a key of it."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from entries(value[key])


def odd_json(text: bytes, pick: Random) -> bytes:
    """One entry anywhere has another value or name, is gone, or is there twice; or all of it is another text."""
    document = json.loads(text)
    if pick.random() < 0.3:
        return pick.choice([*odd_texts(text, pick), json.dumps([document]).encode()])
    table, key = pick.choice([*entries(document)])
    way = pick.choice(["value", "value", "value", "gone", "name", "copy"])
    if way == "value":
        table[key] = other_value(table[key], pick)
    elif way == "gone" or isinstance(table, list):
        table.pop(key)
    else:
        entry = table.pop(key) if way == "name" else table[key]
        table[pick.choice([f"{key}2", key.replace("lora_A", "lora_B"), *table, *NAMES])] = entry
    return json.dumps(document).encode()


def odd_texts(text: bytes, pick: Random) -> list[bytes]:
    """What is no JSON, or JSON that few have seen."""
    texts = [b"", b"{}", b"[]", b"null", b"5", b"{", b'"peft_type"', text[:-1], text + b"}", text + b"{}"]
    texts += [text + b"\x00", b"\xef\xbb\xbf" + text, b" " + text, b"// x\n" + text, pick.randbytes(200)]
    texts += [text.decode().encode("utf-16")]
    document = json.loads(text)
    for _ in range(5):  # a name that occurs twice, with another's value the second time
        one, other = pick.choices(list(document), k=2)
        texts.append(text.rstrip()[:-1] + b", " + json.dumps({one: document[other]}).encode()[1:])
    key = pick.choice([*re.finditer(rb'"[\w.]+": ?', text)])
    start, end = text[: key.start()], text[key.start() :]
    odd = [b"7", b"[1]", b'"F16"', b"9" * 5000, b"1e400", b"NaN", b'"L\xffRA"', b'"\\ud800"', b'"l\\u0000ra"']
    odd += [one * 10**5 + b"1" + two * 10**5 for one, two in ((b"[", b"]"), (b'{"a":', b"}"))]
    # by a name of its own, and by one that comes again
    return texts + [start + name + value + b", " + end for name in (b'"x": ', key[0]) for value in odd]


def odd_config(folder: Path, pick: Random) -> None:
    path = folder / CONFIG
    path.write_bytes(odd_json(path.read_bytes(), pick))


def odd_header(folder: Path, pick: Random) -> None:
    """Of safetensors: eight bytes with the length of the header, the header, the data of all tensors."""
    path = folder / WEIGHTS
    content = path.read_bytes()
    stop = 8 + int.from_bytes(content[:8], "little")
    header = odd_json(content[8:stop], pick)
    lengths = [0, 1, stop - 9, stop - 7, 2 * stop, 10**8 + 1, 2**31, 2**63 - 1, 2**64 - 1]
    length = pick.choice(lengths) if pick.random() < 0.1 else len(header)
    path.write_bytes(length.to_bytes(8, "little") + header + content[stop:])


def with_config(**changes: object) -> Mutation:
    def change(folder: Path, pick: Random) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **changes}))

    return change


MAPPING = {"base_model_class": "run", "parent_library": CANARY}
TEXT = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x"}
#: fields that make PEFT import or read something, or that need more than the adapter's own tensors; FOLDER is its path
FOLDER = "FOLDER"
HOOKS: list[dict] = [
    {"auto_mapping": MAPPING},
    {"auto_mapping": {"base_model_class": "system", "parent_library": "os"}},
    {"auto_mapping": {**MAPPING, "AutoConfig": f"{CANARY}.run"}, "trust_remote_code": True},
    *({"megatron_config": {"a": 1}, **core} for core in ({}, {"megatron_core": CANARY})),
    {"base_model_name_or_path": FOLDER},
    {"base_model_name_or_path": "/etc", "revision": "../../x", "subfolder": "../.."},
    {"runtime_config": {"ephemeral_gpu_offload": True}},
    {"init_lora_weights": "corda", "corda_config": {"cache_file": FOLDER}},
    {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
    {"init_lora_weights": "lora_ga", "lora_ga_config": {"cache_file": FOLDER}},
    {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    *({"init_lora_weights": each} for each in ("pissa", "olora", "gaussian", "orthogonal", "x", True, False, 5)),
    {**TEXT, "tokenizer_name_or_path": FOLDER},
    {**TEXT, "tokenizer_name_or_path": FOLDER, "tokenizer_kwargs": {"trust_remote_code": True}},
    {"peft_type": "MULTITASK_PROMPT_TUNING", "prompt_tuning_init": "ONLY_SOURCE_SHARED"}
    | {"prompt_tuning_init_state_dict_path": "/dev/zero", "num_tasks": 1},
    {"arrow_config": {"arrow_expert_num": 2}},
    {"peft_type": "XLORA", "adapters": {"a": FOLDER}, "hidden_size": 16},
    {"peft_type": "SHADOW", "task_type": "CAUSAL_LM", "shadow_model": FOLDER},
    *({"layer_replication": each} for each in ([[0, 2], [1, 2]], [[0, 10**6]])),
    {"target_parameters": ["lm_head.weight"]},
    *({"trainable_token_indices": each} for each in ([1, 2], [10**9], [-1], {"embed_tokens": [1]})),
    {"ensure_weight_tying": True},
    {"unknown_field": {"__class__": "os.system"}, "__init__": CANARY},
]


def hooks(folder: Path, pick: Random) -> None:
    change = pick.choice(HOOKS)
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": {"AutoTokenizer": [None, f"{CANARY}.Run"]}}
    if "tokenizer_name_or_path" in change:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        (folder / f"{CANARY}.py").write_text(f"open({str(folder / CANARY)!r}, 'w')")
    with_config(**json.loads(json.dumps(change).replace(FOLDER, str(folder))))(folder, pick)


# ---- tensors, in a file that is in order


def with_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Mutation:
    """Changes the table of tensors in place."""

    def mutate(folder: Path, pick: Random) -> None:
        path = folder / WEIGHTS
        if path.exists():
            tensors = safetensors.torch.load(path.read_bytes())
            change(tensors)
            copies = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
            # older safetensors reads no file that has metadata and no tensors
            path.write_bytes(safetensors.torch.save(copies, {"format": "pt"} if copies else None))
        else:
            tensors = torch.load(folder / BIN, weights_only=True)
            change(tensors)
            torch.save(tensors, folder / BIN)

    return mutate


DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint64, torch.bool]
FILLS = [3e38, 1e-45, -0.0, torch.nan, torch.inf, -torch.inf]


def other_tensors(one: torch.Tensor) -> list[list[torch.Tensor]]:
    """Of another dtype or shape, or with other numbers. Whatever is finite in a shape that fits is fine."""
    shapes = [one.movedim(0, -1), one[None], one[..., None], one.flatten(), one.flatten()[0], one[0], one[:0], one[:-1]]
    shapes += [one[..., :1], torch.cat([one, one]), torch.cat([one, one[:1]])]
    some = [torch.where(one == one.max(), value, one) for value in FILLS]
    return [[one.to(dtype) for dtype in DTYPES], shapes, [*some, *(torch.full_like(one, value) for value in FILLS)]]


def odd_tensors(folder: Path, pick: Random) -> None:
    """One tensor, or all of them, with another dtype or shape, with other numbers, by another name, or gone."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        key, way = pick.choice(list(tensors)), pick.choice(["change", "change", "name", "gone"])
        if way == "change":
            kind = pick.randrange(3)
            number = pick.randrange(len(other_tensors(tensors[key])[kind]))
            for each in pick.choice([[key], [key], list(tensors)]):
                tensors[each] = other_tensors(tensors[each])[kind][number]
        elif way == "gone":  # one, a layer, all of one kind, all
            part = pick.choice([key, key.partition(".lora_")[0], key.rsplit(".", 2)[-2], ""])
            for name in [each for each in tensors if part in each]:
                del tensors[name]
        else:
            names = [key.removeprefix(M), key.replace(".weight", ".default.weight"), key.upper(), key + " ", M + key]
            names += [key.replace(".lora_", ".default.lora_"), key.replace("lora_A", "lora_B"), *NAMES]
            tensors[pick.choice(names)] = tensors[key] if pick.random() < 0.5 else tensors.pop(key)

    with_tensors(change)(folder, pick)


# ---- .bin: a zip file of a pickle and of the tensors' bytes


class Attack:
    """An object whose pickle runs a function when it is read."""

    def __init__(self, function: Callable, *arguments: object):
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


FORMS = ("zip", "legacy", "pickle", "protocol 0")


def as_bin(content: object, form: str = "zip") -> Mutation:
    """Saves anything in one of the formats that torch.load reads."""

    def save(folder: Path, pick: Random) -> None:
        with (folder / BIN).open("wb") as file:
            if form in ("zip", "legacy"):
                torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
            else:
                pickle.dump(content, file, protocol=0 if form == "protocol 0" else 2)

    return save


def attack(folder: Path, pick: Random) -> None:
    """A pickle that runs something, or names a function of a module that is not imported yet."""
    if pick.random() < 0.3:
        module = pick.choice([CANARY, f"{CANARY}.inner", "antigravity", "torch.utils.cpp_extension"])
        (folder / BIN).write_bytes(b"\x80\x02c" + module.encode() + b"\nrun\n)R.")
        return
    target = str(folder / CANARY)
    calls = [(os.mkdir, target), (os.system, f"touch {target}"), (exec, f"open({target!r}, 'w')")]
    calls += [(eval, f"__import__('os').mkdir({target!r})"), (getattr, os, "mkdir"), (torch.load, target)]
    function, *arguments = pick.choice(calls)
    call = Attack(function, *arguments)
    good = torch.load(folder / BIN, weights_only=True)
    as_bin(pick.choice([{**good, "x": call}, call, {"x": [call]}, {call: 1}]), pick.choice(FORMS))(folder, pick)


def expanded(*size: int) -> torch.Tensor:
    """One number in memory that says it is many."""
    return torch.zeros(1).as_strided(size, (0,) * len(size))


def deflated(folder: Path, pick: Random) -> None:
    """80 MB in 80 kB."""
    torch.save({KEY: torch.zeros(20 * 2**20)}, folder / BIN)
    with zipfile.ZipFile(folder / BIN) as archive:
        content = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(folder / BIN, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
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


def odd_content(folder: Path, pick: Random) -> None:
    """Nothing dangerous, but no tensors by name, or tensors in other memory than usual."""
    good = torch.load(folder / BIN, weights_only=True)
    key, value = next(iter(good.items()))
    contents = {
        "weights": "weights",
        **{f"{each} as key": {**good, each: value} for each in (5, None, (1, 2))},
        "nested": {"state_dict": good},
        "parameters": {each: torch.nn.Parameter(tensor) for each, tensor in good.items()},
        "transposed": {**good, key: value.t().contiguous().t()},
        "expanded": {**good, key: value[:1].expand(value.shape)},
        "slices": {each: torch.cat([tensor, tensor])[: len(tensor)] for each, tensor in good.items()},
        "conjugate": {**good, key: value.to(torch.complex64).conj()},
        **{name: {**good, key: each} for name, each in odd(value).items() if name != "numpy"},
    }
    name = pick.choice(list(contents))
    form = "legacy" if name != "sparse CSR" and pick.random() < 0.3 else "zip"
    as_bin(contents[name], form)(folder, pick)


# ---- any folder


def other_model(folder: Path, pick: Random) -> None:
    """An adapter that was made for another model, or the weights of one with the config of another."""
    source = pick.choice(sorted(folder.parent.glob("seeds/*/new")))
    for name in pick.choice([[CONFIG, WEIGHTS, BIN], [CONFIG], [WEIGHTS, BIN]]):
        if (source / name).exists():
            (folder / name).unlink(missing_ok=True)
            shutil.copy(source / name, folder / name)


def nothing(folder: Path, pick: Random) -> None:
    """A good folder loads: the trials can tell good from bad."""


def mutations_for(seed: str) -> tuple[Mutation, ...]:
    """All that can be done to its folder."""
    own = (attack, attack, odd_content) if seed == "bin" else (odd_header,) * 5
    return (
        *own,
        *(odd_config,) * 5,
        *(odd_tensors,) * 5,
        *(other_bytes, other_bytes, hooks, other_model, nothing),
    )
