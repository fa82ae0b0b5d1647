"""What can be wrong with an adapter's folder. Each mutation damages a folder in place, in one way.

A mutation is a function of the folder and of a ``random.Random`` that it takes its choices from. It returns a few
words on what it did. Tables at the end list them: for safetensors files, for ``.bin`` files, and for any folder.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import safetensors.torch
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


# ---- any file


def files(folder: Path) -> list[Path]:
    return [each for each in (folder / CONFIG, folder / WEIGHTS, folder / BIN) if each.exists()]


def flip_bits(folder: Path, pick: Random) -> str:
    path = pick.choice(files(folder))
    content = bytearray(path.read_bytes())
    flipped = [(pick.randrange(len(content)), pick.randrange(8)) for _ in range(pick.choice([1, 1, 1, 2, 8, 64]))]
    for position, bit in flipped:
        content[position] ^= 1 << bit
    path.write_bytes(content)
    return f"{path.name}: bits {flipped[:3]}"


def other_length(folder: Path, pick: Random) -> str:
    """Cut off, or with zeros at the end."""
    path = pick.choice(files(folder))
    content, size = path.read_bytes(), path.stat().st_size
    data = min(8 + int.from_bytes(content[:8], "little"), size)  # where the data of safetensors starts
    lengths = [0, 2, 4, 8, 30, data - 1, data, data + 1, size - 22, size - 4, size - 1, size + 1, size + 4096]
    length = max(0, pick.choice([*lengths, pick.randrange(size + 1)]))
    os.truncate(path, length)
    return f"{path.name}: {length} of {size} bytes"


LINKS = {"passwd": "/etc/passwd", "nowhere": "nowhere", "zero": "/dev/zero", "null": "/dev/null"}


def replaced(name: str, kind: str) -> Mutation:
    """Puts something else in the place of a file."""

    def replace(folder: Path, pick: Random) -> str:
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
        return f"{name}: {kind}"

    return replace


# ---- tensors, in a file that is in order


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    if (folder / WEIGHTS).exists():
        return safetensors.torch.load((folder / WEIGHTS).read_bytes())
    return torch.load(folder / BIN, weights_only=True)


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    if (folder / WEIGHTS).exists():
        copies = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
        (folder / WEIGHTS).write_bytes(safetensors.torch.save(copies, {"format": "pt"}))
    else:
        torch.save(tensors, folder / BIN)


def with_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Mutation:
    """Changes the table of tensors in place."""

    def mutate(folder: Path, pick: Random) -> str:
        tensors = tensors_of(folder)
        change(tensors)
        write_tensors(folder, tensors)
        return "other tensors"

    return mutate


DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint64, torch.bool]


def other_tensor(folder: Path, pick: Random) -> str:
    """Of another dtype or shape, or with numbers that are not finite. Any that are finite are fine."""
    tensors = tensors_of(folder)
    key = pick.choice(list(tensors))
    one = tensors[key]
    shapes = [
        one.movedim(0, -1),
        one[None],
        one[..., None],
        one.flatten(),
        one.flatten()[0],
        one[0],
        one[:0],
        one[:-1],
        one[..., :1],
    ]
    shapes += [one[..., :1], torch.cat([one, one]), torch.cat([one, one[:1]])]
    numbers = [torch.full_like(one, each) for each in (3e38, 1e-45, -0.0)]
    numbers += [torch.where(one == one.max(), float(each), one) for each in ("nan", "inf", "-inf")]
    tensors[key] = pick.choice(pick.choice([[one.to(each) for each in DTYPES], shapes, numbers]))
    write_tensors(folder, tensors)
    return f"{key}: {tensors[key].dtype}, {list(tensors[key].shape)}"


def other_dtype(folder: Path, pick: Random) -> str:
    dtype = pick.choice(DTYPES)
    write_tensors(folder, {key: tensor.to(dtype) for key, tensor in tensors_of(folder).items()})
    return str(dtype)


M = "base_model.model."
KEY = f"{M}first.lora_A.weight"
NAMES = [
    *("", ".", "..", "../../x", "/etc/passwd", "../../../../tmp/x.lora_A.weight", f"{M}../../x.lora_A.weight", M, KEY),
    *(f"{M}.lora_A.weight", f"{M}first.base_layer.weight", f"{M}first.weight", f"{M}first.lora_A.default.weight"),
    *(f"{M}first.lora_C.weight", f"{M}first.lora_A.bias", f"{M}first.lora_magnitude_vector", f"{M}lm_head.weight"),
    *(f"{M}model.embed_tokens.weight", f"{M}model.layers.0.self_attn.v_proj.lora_A.weight"),
    *(f"{M}__class__.lora_A.weight", f"{M}first.__dict__.lora_A.weight", "prompt_embeddings", "x\ny\x00z"),
    *("\u202e\U0001f600.lora_A.weight", "a" * 100_000, "a." * 5_000 + "lora_A.weight"),
]


def other_name(folder: Path, pick: Random) -> str:
    """One more name for a tensor, or another one."""
    tensors = tensors_of(folder)
    key = pick.choice(list(tensors))
    names = [key.removeprefix(M), key.replace(".weight", ".default.weight"), key.upper(), key + " ", M + key]
    names += [key.replace(".lora_", ".default.lora_"), key.replace("lora_A", "lora_B")]
    name, more = pick.choice(names + NAMES), pick.random() < 0.5
    tensors[name] = tensors[key] if more else tensors.pop(key)
    write_tensors(folder, tensors)
    return f"{key} is called {name[:60]!r}{', too' if more else ''}"


def missing_names(folder: Path, pick: Random) -> str:
    tensors = tensors_of(folder)
    key = pick.choice(list(tensors))
    # one, a layer, all of one kind, all
    part = pick.choice([key, key.partition(".lora_")[0], key.rsplit(".", 2)[-2], ""])
    write_tensors(folder, {name: tensor for name, tensor in tensors.items() if part not in name})
    return f"{part!r}"


# ---- safetensors: eight bytes with the length of the header, the header, the data of all tensors


def parts(folder: Path) -> tuple[dict, bytes]:
    """Header and data."""
    content = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def write(folder: Path, text: bytes, data: bytes, length: int = -1) -> None:
    length = len(text) if length < 0 else length
    (folder / WEIGHTS).write_bytes(length.to_bytes(8, "little") + text + data)


def names_in(header: dict) -> list[str]:
    return sorted(key for key in header if key != "__metadata__")


def wrong_entry(folder: Path, pick: Random) -> str:
    """What the header says of a tensor does not fit its data, or makes no sense."""
    header, data = parts(folder)
    key = pick.choice(names_in(header))
    shape, (start, stop) = header[key]["shape"], header[key]["data_offsets"]
    dtypes = ["F64", "F16", "BF16", "F8_E4M3", "I64", "I32", "I8", "U8", "BOOL", "U64", "C64", "X", "f32", "", 7, None]
    shapes = [shape[::-1], [*shape, 1], shape[1:], [], [2 * shape[0], *shape[1:]], [0, *shape[1:]], [1, *shape]]
    shapes += [[2**20, 2**20], [2**40, 2**40], [2**63], [2**64], [2**62, 4], [0, 2**62], [-1, 4], [-6, -12], [2.0, 3]]
    shapes += ["6", None, [[6]], {"0": 6}, [True, 6], [1] * 5000]
    offsets = [[-4, stop], [start, -1], [stop, start], [start + 4, stop + 4], [start, stop - 4], [start - 4, stop - 4]]
    offsets += [[start, 2**63], [2**63, 2**64 - 1], [2**64, 2**65], [0, len(data)], [float(start), stop]]
    offsets += [[str(start), stop], [start], [start, stop, stop], [], None, [None, stop], [True, stop], {"0": start}]
    field, values = pick.choice([("dtype", dtypes), ("shape", shapes), ("data_offsets", offsets)])
    header[key][field] = value = pick.choice(values)
    write(folder, json.dumps(header).encode(), data)
    return f"{key}: {field} {str(value)[:40]}"


def odd_header(folder: Path, pick: Random) -> str:
    header, data = parts(folder)
    one, other = pick.choice(names_in(header)), pick.choice(names_in(header))
    odd = [{"format": "tf"}, {"format": 3}, {}, [], None, "pt", {"a": {"b": "c"}}, {"format": "pt", "x": "y" * 10**6}]
    headers = [header | {"__metadata__": each} for each in odd]
    # the same bytes by two names, and those of another name
    headers += [header | {name: header[one]} for name in (f"{one}2", one.replace("lora_A", "lora_B"), other)]
    text = json.dumps(header).encode()
    texts = [json.dumps(each).encode() for each in headers]
    texts += [b"", b"{}", b"[]", b"null", b"{", text[:-1], text + b"}", b"\xef\xbb\xbf" + text, b" " + text]
    texts += [text + b" " * 9, text.replace(b"lora", b"l\xffra", 1), b"[" * 50_000, b'{"a":' * 50_000]
    texts += [text.replace(b"F32", b"F\\ud83232"), text.replace(b"lora", b"l\\u0000ra", 1)]
    texts += [text.replace(b": [", b": [1e400, ", 1), text.replace(b"[0", b"[NaN")]
    # keys that occur twice
    texts += [text[:-1] + b", " + json.dumps({one: header[other]}).encode()[1:]]
    texts += [text.replace(b'"shape": [', b'"shape": [1], "shape": [', 1)]
    texts += [text.replace(b'"dtype"', b'"dtype": "F16", "dtype"', 1)]
    lengths = [0, 1, len(text) - 1, len(text) + 1, 2 * len(text), 100_000_001, 2**31, 2**63 - 1, 2**63, 2**64 - 1]
    new, length = pick.choice([*((each, -1) for each in texts), *((text, each) for each in lengths)])
    write(folder, new, data, length)
    return f"{len(new)} bytes, {new[:40]!r}, length {length}"


# ---- .bin: a zip file of a pickle and of the tensors' bytes


def as_bin(content: object, form: str = "zip") -> Mutation:
    """Saves anything in one of the formats that torch.load reads."""

    def save(folder: Path, pick: Random) -> str:
        with (folder / BIN).open("wb") as file:
            if form in ("zip", "legacy"):
                torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
            else:
                pickle.dump(content, file, protocol=0 if form == "protocol 0" else 2)
        return form

    return save


FORMS = ("zip", "legacy", "pickle", "protocol 0")


def attack(folder: Path, pick: Random) -> str:
    """A pickle that runs something, or names a function of a module that is not imported yet."""
    if pick.random() < 0.3:
        module = pick.choice([CANARY, f"{CANARY}.inner", "antigravity", "torch.utils.cpp_extension"])
        (folder / BIN).write_bytes(b"\x80\x02c" + module.encode() + b"\nrun\n)R.")
        return module
    target = str(folder / CANARY)
    calls = [(os.mkdir, target), (os.system, f"touch {target}"), (exec, f"open({target!r}, 'w')")]
    calls += [(eval, f"__import__('os').mkdir({target!r})"), (getattr, os, "mkdir"), (torch.load, target)]
    function, *arguments = pick.choice(calls)
    call = Attack(function, *arguments)
    content = pick.choice([{**tensors_of(folder), "x": call}, call, {"x": [call]}, {call: 1}])
    return f"{function.__name__}, {as_bin(content, pick.choice(FORMS))(folder, pick)}"


def expanded(*size: int) -> torch.Tensor:
    """One number in memory that says it is many."""
    return torch.zeros(1).as_strided(size, (0,) * len(size))


def deflated(folder: Path, pick: Random) -> str:
    """160 MB in 160 kB."""
    torch.save({KEY: torch.zeros(40 * 2**20)}, folder / BIN)
    with zipfile.ZipFile(folder / BIN) as archive:
        content = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(folder / BIN, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return "deflated"


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
    return f"{name}, {as_bin(contents[name], form)(folder, pick)}"


# ---- adapter_config.json


def config_of(folder: Path) -> dict:
    return json.loads((folder / CONFIG).read_text())


def with_config(**changes: object) -> Mutation:
    def change(folder: Path, pick: Random) -> str:
        (folder / CONFIG).write_text(json.dumps({**config_of(folder), **changes}))
        return str(changes)[:80]

    return change


def nested(depth: int, kind: str = "list") -> object:
    value: object = 1
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


#: of every size, and of every JSON type
NUMBERS = [0, 1, -1, 2, 5, 7, 2.5, -0.0, 10**5, 10**6, 10**9, 2**31, 2**63, 2**64, 10**18, 10**400, -(10**400), 1e308]
NUMBERS += [1e-320, float("nan"), float("inf"), float("-inf"), None, True, "4", [4]]
VALUES = [
    *(*NUMBERS, "", "x", "none", "all", "first", "q_proj", "all-linear", "CAUSAL_LM", "\ud800", "a\x00b", "é" * 300),
    *("y" * 10**5, "/etc/passwd", "../../../../etc", "/dev/zero", CANARY),
    *([], ["first"], ["q_proj", "down_proj"], [1], [None], [[]], [1.5, "x"], ["x"] * 1000, [["first"]], [{}]),
    *({}, {"first": 2}, {"q_proj": 3}, {"a": {"b": []}}, {"first": "x"}, {"": 0}, {"r": 10**9}),
    *(nested(30), nested(300), nested(300, "dict"), nested(900)),
]
SIZES = ("r", "alpha", "lora_alpha", "lora_dropout", "num_virtual_tokens", "token_dim", "num_layers")
SIZES += ("num_attention_heads",)
#: broken ones, and others that nobody would write
EXPRESSIONS = ["(", "[", "*", "(?P<x", r"\1", "(?i)FIRST", "x" * 10_000, "a{1000000}", "(a{1000}){1000}", "", "^", "$"]
EXPRESSIONS += [".*", r"(.*\.)*last", r"first|last", "(?<=a)b", "\x00"]
PATTERNS = ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "modules_to_save", "layers_pattern")
PATTERNS += ("feedforward_modules",)


TYPES = [*sorted(each.value for each in PeftType), "lora", "X", "", 5, None, ["LORA"], {}]
GONE = object()
#: which fields, any if the config has none of these; and what is written there
FIELDS = [
    ((), VALUES),
    (SIZES, NUMBERS),
    (("peft_type",), TYPES),
    (PATTERNS, EXPRESSIONS),
    (PATTERNS, [{each: 5} for each in EXPRESSIONS]),
    (PATTERNS, [[each] for each in EXPRESSIONS]),
    ((), [GONE]),
]


def wrong_field(folder: Path, pick: Random) -> str:
    config, (names, values) = config_of(folder), pick.choice(FIELDS)
    name, value = pick.choice([each for each in names if each in config] or sorted(config)), pick.choice(values)
    config[name] = value
    if name == "layers_pattern":
        config["layers_to_transform"] = [0]
    (folder / CONFIG).write_text(json.dumps({key: each for key, each in config.items() if each is not GONE}))
    return f"{name}: {str(value)[:60]}"


def config_text(folder: Path, pick: Random) -> str:
    text = (folder / CONFIG).read_text()
    config, lora = config_of(folder), b'{"peft_type": "LORA", '
    texts = [b"", b"{", b"{}", b"null", b"5", b'"peft_type"', (text + "{}").encode(), b"// x\n" + text.encode()]
    texts += [json.dumps(each).encode() for each in ([config], list(config.items()))]
    texts += [b"\xef\xbb\xbf" + text.encode(), text.encode("utf-16"), text.encode() + b"\x00"]
    texts += [text.encode().replace(b"LORA", b"L\xffRA") + b"\xff\xfe", text.replace("LORA", "\\ud800", 1).encode()]
    texts += [lora + b'"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", lora + b'"r": ' + b"9" * 5000 + b"}"]
    texts += [lora + b'"x": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}", pick.randbytes(200)]
    texts += [text.rstrip()[:-1].encode() + b', "r": 2, "peft_type": "LORA"}']
    new = pick.choice(texts)
    (folder / CONFIG).write_bytes(new)
    return f"{len(new)} bytes, {new[:40]!r}"


MAPPING = {"base_model_class": "run", "parent_library": CANARY}
TEXT = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x"}
#: fields that make PEFT import or read something, or that need more than the adapter's own tensors; FOLDER is its path
FOLDER = "FOLDER"
HOOKS: list[dict] = [
    {"auto_mapping": MAPPING},
    {"auto_mapping": {"base_model_class": "system", "parent_library": "os"}},
    {"auto_mapping": {**MAPPING, "AutoConfig": f"{CANARY}.run"}, "trust_remote_code": True},
    {"megatron_config": {"a": 1}, "megatron_core": CANARY},
    {"megatron_config": {"a": 1}, "megatron_core": f"megatron.{CANARY}"},
    {"megatron_config": {"a": 1}},
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
    {"layer_replication": [[0, 2], [1, 2]]},
    {"layer_replication": [[0, 10**6]]},
    {"target_parameters": ["lm_head.weight"]},
    *({"trainable_token_indices": each} for each in ([1, 2], [10**9], [-1], {"embed_tokens": [1]})),
    {"ensure_weight_tying": True},
    {"unknown_field": {"__class__": "os.system"}, "__init__": CANARY},
]


def hooks(folder: Path, pick: Random) -> str:
    change = pick.choice(HOOKS)
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": {"AutoTokenizer": [None, f"{CANARY}.Run"]}}
    if "tokenizer_name_or_path" in change:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        (folder / f"{CANARY}.py").write_text(f"open({str(folder / CANARY)!r}, 'w')")
    return with_config(**json.loads(json.dumps(change).replace(FOLDER, str(folder))))(folder, pick)


# ---- any folder


def other_model(folder: Path, pick: Random) -> str:
    """An adapter that was made for another model, or the weights of one with the config of another."""
    source = pick.choice(sorted(folder.parent.glob("seeds/*/new")))
    names = pick.choice([[CONFIG, WEIGHTS, BIN], [CONFIG], [WEIGHTS, BIN]])
    for name in names:
        if (source / name).exists():
            (folder / name).unlink(missing_ok=True)
            shutil.copy(source / name, folder / name)
    return f"{names[0]} of {source.parent.name!r}"


def second_file(folder: Path, pick: Random) -> str:
    """A .bin beside the safetensors file: nobody reads it."""
    if (folder / WEIGHTS).exists():
        return as_bin(Attack(os.mkdir, str(folder / CANARY)), "pickle")(folder, pick)
    (folder / WEIGHTS).write_bytes(b"\x08" + bytes(7) + b"{}      ")
    return "safetensors come first"


def nothing(folder: Path, pick: Random) -> str:
    """A good folder loads: the trials can tell good from bad."""
    return "as it was"


SAFETENSORS: tuple[Mutation, ...] = (wrong_entry, odd_header, odd_header)
BINS: tuple[Mutation, ...] = (attack, attack, odd_content)
ANY: tuple[Mutation, ...] = (
    *(flip_bits, other_length, other_tensor, other_tensor, other_dtype, other_name, missing_names, config_text),
    *(wrong_field, wrong_field, wrong_field, hooks, other_model, second_file, nothing),
)


def mutations_for(seed: str) -> tuple[Mutation, ...]:
    """All that can be done to its folder."""
    return (BINS if seed == "bin" else SAFETENSORS) + ANY
