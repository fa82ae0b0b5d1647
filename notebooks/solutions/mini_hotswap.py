"""The idea of hotswap_lab in one file: another LoRA adapter in the same memory of a live model.

    family = {name: read(folder) for name, folder in folders.items()}
    model = prepare(base, family.values())           # room for each adapter: ranks and layers
    model = scalings_as_tensors(model)
    compiled = torch.compile(model)
    write(plan(model, family["shout"]))              # no tensor moves, so nothing is compiled again
    pool = Pool(model, family); pool.swap("sort")    # the same as one copy

Right for LoRA on linear layers. The rest of the package is what it takes to be never wrong: other methods, other
layers, settings, files, threads, and models that something else has changed.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

NAME = "default"  # of the adapter in the model
Adapter = dict[str, tuple[torch.Tensor, torch.Tensor, float]]  # for each layer lora_A, lora_B and the scaling


# ---- 01: read


def read(folder: str) -> Adapter:
    """Read an adapter: lora_A has the shape (rank, in), lora_B (out, rank)."""
    config = LoraConfig.from_pretrained(folder)
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    adapter = {}
    for key in tensors:
        if match := re.fullmatch(r"base_model\.model\.(.+)\.lora_A\.weight", key):
            path, a, b = match[1], tensors[key], tensors[key.replace("lora_A", "lora_B")]
            alphas = [alpha for end, alpha in config.alpha_pattern.items() if re.fullmatch(rf"(.*\.)?({end})", path)]
            divisor = len(a) ** 0.5 if config.use_rslora else len(a)
            adapter[path] = a, b, (alphas or [config.lora_alpha])[0] / divisor
    return adapter


# ---- 01b: plan, write


def layers_of(model: PeftModel) -> dict[str, torch.nn.Module]:
    """The layers that have an adapter, by path."""
    return {path: each for path, each in model.get_base_model().named_modules() if hasattr(each, "lora_A")}


def plan(model: PeftModel, adapter: Adapter) -> list[tuple[dict, str, object]]:
    """Decide all writes: triples of a table, a key in it, and the new value. Raise before anything is written."""
    layers, writes = layers_of(model), []
    if missing := adapter.keys() - layers.keys():
        raise ValueError(f"the model has no adapter in {len(missing)} of the layers: {min(missing)}, for example")
    for path, layer in layers.items():
        tables = layer.lora_A[NAME]._parameters, layer.lora_B[NAME]._parameters
        room_a, room_b = (table["weight"] for table in tables)
        off = torch.zeros_like(room_a), torch.zeros_like(room_b), 0.0
        a, b, scaling = adapter.get(path, off)
        values = padded(a, room_a), padded(b, room_b)
        writes += [(table, "weight", value) for table, value in zip(tables, values, strict=True)]
        writes.append((layer.scaling, NAME, scaling))
    return writes


def write(writes: Iterable[tuple[dict, str, object]]) -> None:
    """Carry out a plan: tensors keep their addresses, which compiled code knows."""
    with torch.no_grad():
        for table, key, value in writes:
            if isinstance(table[key], torch.Tensor):
                table[key].copy_(torch.as_tensor(value))
            else:
                table[key] = value


# ---- 02: room for a family of adapters


def padded(values: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """Fill up to the shape of the room with zeros, which add nothing to B A."""
    if any(size > largest for size, largest in zip(values.shape, room.shape, strict=True)):
        raise ValueError(f"a tensor of shape {(*values.shape,)} has no place in {(*room.shape,)}")
    whole = torch.zeros_like(room)
    whole[: values.shape[0], : values.shape[1]] = values
    return whole


def prepare(base: torch.nn.Module, family: Iterable[Adapter]) -> PeftModel:
    """Give a model room for every adapter: all of their layers, each with the highest rank that one of them has."""
    ranks: dict[str, int] = {}
    for adapter in family:
        for path, (a, _, _) in adapter.items():
            ranks[path] = max(ranks.get(path, 0), len(a))
    config = LoraConfig(target_modules=[*ranks], rank_pattern={f"^{re.escape(path)}$": r for path, r in ranks.items()})
    return get_peft_model(base, config, NAME).eval()


# ---- 03: scalings that compiled code reads


def scalings_as_tensors(model: PeftModel) -> PeftModel:
    """Turn each scaling into a tensor: a number would be compiled into the code."""
    for layer in layers_of(model).values():
        layer.scaling[NAME] = torch.tensor(float(layer.scaling[NAME]), device=layer.lora_A[NAME].weight.device)
    return model


# ---- 04: a pool


class Pool:
    """Adapters packed one after the other as they lie in the model, so that a swap is one copy."""

    def __init__(self, model: PeftModel, family: Mapping[str, Adapter]):
        plans = {name: plan(model, adapter) for name, adapter in family.items()}
        targets = [table[key] for table, key, _ in next(iter(plans.values()))]
        self.memory = torch.cat([each.detach().flatten().to(targets[0].dtype) for each in targets])
        for target, part in zip(targets, self.memory.split([each.numel() for each in targets]), strict=True):
            target.data = part.view(target.shape)
        self.packed = {
            name: torch.cat([torch.as_tensor(value).flatten() for _, _, value in writes]).to(self.memory)
            for name, writes in plans.items()
        }

    def swap(self, name: str) -> None:
        self.memory.copy_(self.packed[name])


# ---- 08: rows


class Rows(torch.nn.Module):
    """A linear layer in which each row of a batch has its own adapter."""

    def __init__(self, linear: torch.nn.Linear, rows: int, rank: int):
        super().__init__()
        self.linear = linear
        self.a, self.b = torch.zeros(rows, rank, linear.in_features), torch.zeros(rows, linear.out_features, rank)

    def assign(self, row: int, a: torch.Tensor, b: torch.Tensor, scaling: float) -> None:
        self.a[row], self.b[row] = padded(a, self.a[row]), scaling * padded(b, self.b[row])

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (rows, tokens, in), or (rows, in)
        inputs = x if x.dim() == 3 else x[:, None]
        return self.linear(x) + (inputs @ self.a.mT @ self.b.mT).view(*x.shape[:-1], -1)
