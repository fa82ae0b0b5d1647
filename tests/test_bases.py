"""Swaps on base models that are not plain float32 in one place: half precision, quantized, offloaded, with a map."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import pytest
import torch
from lengths import few_of
from models import KINDS, Kind, call, load, save_family, save_random_adapter
from oracle import assert_equals_fresh_load, assert_same_outputs, assert_same_tensors, rounding
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from refusals import refused
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hotswap_lab import (
    AdapterPool,
    hotswap_adapter,
    prepare_model_for_compiled_hotswap,
    resolve_slot,
    save_adapter,
    verify_hotswap,
)

LLAMA = KINDS["llama"]


def llama() -> nn.Module:
    """Blocks of 64: what 4-bit kernels on the CPU can take."""
    sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=2)
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False))


def int8_weight_only(base: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(base, quantization.Int8WeightOnlyConfig())
    assert type(base.lm_head.weight.data) is not torch.Tensor
    return base


def bitsandbytes(base: nn.Module, bits: int) -> nn.Module:
    """What ``from_pretrained`` with a ``BitsAndBytesConfig`` does, which would need a checkpoint and a GPU."""
    bnb = pytest.importorskip("bitsandbytes")
    for name, module in list(base.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            shape = dict(input_features=module.in_features, output_features=module.out_features, bias=False)
            if bits == 8:
                layer = bnb.nn.Linear8bitLt(**shape, has_fp16_weights=False)
                layer.weight = bnb.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
            else:
                layer = bnb.nn.Linear4bit(**shape, compute_dtype=module.weight.dtype, quant_type="nf4")
                layer.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
                # some CPUs pack the weights at the first call and unpack them for a state dict, both with rounding:
                # a look at the state dict would change the outputs
                layer.support_avx512bf16_for_cpu = False
            base.set_submodule(name, layer.to("cpu"))
    setattr(base, f"is_loaded_in_{bits}bit", True)
    return base


@dataclass
class Base:
    """A kind of base model, and what loading an adapter onto it gives."""

    make: Callable[[], nn.Module]
    layer: str = "Linear"
    adapter_dtype: torch.dtype = torch.float32
    #: to `PeftModel.from_pretrained`
    arguments: dict = field(default_factory=dict)

    @cached_property
    def kind(self) -> Kind:
        original = make_kind(self.make).base()
        return make_kind(lambda: copy.deepcopy(original))

    def load(self, folder: str, adapter_name: str = "default") -> PeftModel:
        return load(self.kind, folder, adapter_name, **self.arguments)

    @property
    def tolerance(self) -> dict[str, float]:
        """Where sums may be of another length. What is quantized by a library has no copy in float64 to measure it."""
        is_half = self.kind.base().dtype.itemsize == 2
        if self.layer == "Linear":
            return {}
        return dict(tolerance=1e-2, margin=30) if is_half else dict(tolerance=1e-5, margin=1000)


def make_kind(make: Callable[[], nn.Module]) -> Kind:
    return Kind(make, lambda: {"input_ids": torch.randint(0, 64, (2, 9))}, LLAMA.modules, dtype=None)


UNCAST = dict(autocast_adapter_dtype=False)
BASES = {
    "bfloat16": Base(lambda: llama().bfloat16()),
    "float16": Base(lambda: llama().half()),
    "float16, adapter too": Base(lambda: llama().half(), "Linear", torch.float16, UNCAST),
    "torchao int8": Base(lambda: int8_weight_only(llama()), "TorchaoLoraLinear"),
    "torchao int8 of bfloat16": Base(lambda: int8_weight_only(llama().bfloat16()), "TorchaoLoraLinear"),
    "bitsandbytes int8": Base(lambda: bitsandbytes(llama(), 8), "Linear8bitLt"),
    "bitsandbytes nf4": Base(lambda: bitsandbytes(llama(), 4), "Linear4bit"),
}


@pytest.fixture(params=few_of(BASES, ("bfloat16",)))
def base(request) -> Base:
    return BASES[request.param]


#: not large, which makes chaos of half precision
#: from the first: the same rank, a higher and a lower one, fewer layers, and all of them again
FAMILY = {
    "first": dict(r=4, lora_alpha=4),
    "same": dict(r=4, lora_alpha=3),
    "grown": dict(r=8, lora_alpha=6, use_rslora=True),
    "shrunk": dict(r=2, lora_alpha=2),
    "fewer": dict(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj", "down_proj"]),
}
ORDER = ("same", "grown", "shrunk", "fewer", "first")


def save(kind: Kind, folder: Path) -> dict[str, str]:
    targets = dict(target_modules=list(LLAMA.modules))
    return {
        name: save_random_adapter(kind, folder / name, seed, **targets | lora)
        for seed, (name, lora) in enumerate(FAMILY.items())
    }


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> dict[str, str]:
    return save(make_kind(llama), tmp_path_factory.mktemp("family"))


def assert_is_the_adapter(base: Base, model: nn.Module, folder: str) -> None:
    """For a prepared model, too, whose sums are longer than a fresh load's by some zeros."""
    slot = resolve_slot(model, "default")
    assert {type(layer.module).__name__ for layer in slot.layers} == {base.layer}
    assert {tensor.parameter.dtype for tensor in slot.tensors} == {base.adapter_dtype}
    fresh = base.load(folder)
    assert_same_outputs(model, fresh, base.kind, **base.tolerance)
    assert_same_tensors(get_peft_model_state_dict(model), get_peft_model_state_dict(fresh))


def swapping(base: Base, family: dict[str, str], way: str) -> tuple[nn.Module, Callable[[str], object]]:
    """A model, and what swaps in one of the family."""
    model = base.load(family["first" if way == "a pool" else "fewer"])
    if way == "a pool":
        return model, AdapterPool(model, adapters=family, progress=False).swap
    if way == "prepared":
        prepare_model_for_compiled_hotswap(model, adapters=family)
    return model, lambda name: hotswap_adapter(model, family[name], "default", add_layers=way == "plain")


@pytest.mark.parametrize("way", ["plain", "prepared", "a pool"])
def test_swaps(base, family, tmp_path, way):
    model, swap = swapping(base, family, way)
    addresses = resolve_slot(model, "default").data_ptrs()
    for name in ORDER:
        swap(name)
        assert_is_the_adapter(base, model, family[name])
        assert (resolve_slot(model, "default").data_ptrs() == addresses) == (way != "plain")
    if way != "plain":
        return
    assert_equals_fresh_load(model, base.kind, family["first"], **base.arguments)
    swap("fewer")
    save_adapter(model, tmp_path / "saved")
    assert_equals_fresh_load(model, base.kind, str(tmp_path / "saved"), **base.arguments)
    with model.disable_adapter():
        assert torch.equal(call(model, base.kind.inputs()), call(base.kind.base(), base.kind.inputs()))
    if not base.arguments:  # the oracle of the package loads as PEFT does by default
        arguments = dict(inputs=base.kind.inputs(), base=base.kind.base, tolerance=1e-5)
        for name in ("fewer", "first"):
            assert bool(verify_hotswap(model, family[name], **arguments)) == (name == "fewer")
        parts = (each.scale for each in model.parameters() if hasattr(each, "__tensor_flatten__"))
        if (scale := next(parts, None)) is not None:  # one of the parts of a quantized weight
            scale.mul_(2)
            assert "tensors differ" in str(verify_hotswap(model, family["fewer"], **arguments))


def test_rows(base, family):
    """Each row as a fresh load computes it; refused where PEFT's layer is one of bitsandbytes."""
    model, wanted = base.load(family["first"]).requires_grad_(False), ("grown", "fewer")
    if "bit" in base.layer:
        refused("can't have another adapter in each row", AdapterPool, model, adapters=family, rows=2)
        return
    pool = AdapterPool(model, adapters=family, rows=2)
    pool.assign(wanted)
    rows = call(model, base.kind.inputs())
    models = [base.load(family[name]) for name in wanted]
    fresh = [call(each, base.kind.inputs()) for each in models]
    # rounding comes in another order: half precision has it in every layer
    tolerance = max(base.tolerance.get("tolerance") or rounding(each, base.kind.inputs()) for each in models)
    tolerance *= fresh[0].abs().max()
    for row in range(2):
        assert (rows[row] - fresh[row][row]).abs().max() < tolerance
        assert (rows[row] - fresh[1 - row][row]).abs().max() > 3 * tolerance


# ---- weights that accelerate keeps elsewhere between calls

CPU = torch.device("cpu")


@pytest.fixture
def adapters(tmp_path) -> dict[str, str]:
    return save(LLAMA, tmp_path)


def offload(model: nn.Module, where: str, folder) -> None:
    accelerate = pytest.importorskip("accelerate")
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=CPU)
    else:
        accelerate.disk_offload(model, str(folder), execution_device=CPU)


MIXED = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
MIXED |= dict.fromkeys(("model.norm", "model.rotary_emb", "lm_head"), "cpu")
#: by where all is: a device map
ELSEWHERE = {"cpu": None, "disk": None, "all on one": {"": "cpu"}, "some on disk": MIXED}


@pytest.mark.long
@pytest.mark.parametrize("where", ELSEWHERE)
def test_base_weights_that_are_elsewhere(adapters, tmp_path, where):
    accelerate, device_map, kind = pytest.importorskip("accelerate"), ELSEWHERE[where], LLAMA
    if device_map:
        arguments = dict(offload_dir=str(tmp_path / "offloaded"), main_device="cpu", force_hooks=True)
        kind = replace(kind, make_random=lambda: accelerate.dispatch_model(LLAMA.base(), device_map, **arguments))
    model = load(kind, adapters["first"])
    layers = [module.base_layer for module in model.modules() if "base_layer" in module._modules]
    for number, layer in enumerate(layers if device_map is None else ()):
        offload(layer, where, tmp_path / f"layer{number}")
    before = [layer.weight.is_meta for layer in layers]
    for name in ("same", "grown", "first", "prepare", "grown", "same"):
        if name == "prepare":
            prepare_model_for_compiled_hotswap(model, target_rank=8)
            continue
        hotswap_adapter(model, adapters[name], "default")
        assert [layer.weight.is_meta for layer in layers] == before
        assert_same_outputs(model, load(kind, adapters[name]), LLAMA)
        if name == "first" and device_map:
            assert_equals_fresh_load(model, kind, adapters[name])


@pytest.mark.parametrize("rank", [2, 4])
def test_embeddings_that_are_elsewhere_are_refused(tmp_path, rank):
    """PEFT has no values for an adapter on them, and saves them with it."""
    embedded = dict(target_modules=["embed_tokens", "q_proj"])
    old, new = save_family(LLAMA, tmp_path, dict(r=4) | embedded, dict(r=rank) | embedded)
    model = load(LLAMA, old)
    offload(model.get_base_model().model.embed_tokens.base_layer, "cpu", tmp_path)
    refused("other base weights than the model has", hotswap_adapter, model, new, "default")


@pytest.mark.long
@pytest.mark.parametrize("where", ["disk", "cpu"])
def test_offloaded_adapter_weights_are_refused(adapters, tmp_path, where):
    hooks = pytest.importorskip("accelerate.hooks")
    model = load(LLAMA, adapters["first"])
    offload(model, where, tmp_path / "offloaded")
    for action in (
        *(partial(hotswap_adapter, model_name_or_path=adapters[each], adapter_name="default") for each in adapters),
        partial(prepare_model_for_compiled_hotswap, target_rank=8),
        partial(AdapterPool, adapters=adapters),
    ):
        refused(r"(?s)accelerate keeps elsewhere.*remove_hook_from_submodules", action, model)
    assert_same_outputs(model, load(LLAMA, adapters["first"]), LLAMA)
    # what the refusal says to do next
    hooks.remove_hook_from_submodules(model)
    hotswap_adapter(model, adapters["grown"], "default")
    offload(model, where, tmp_path / "again")
    assert_same_outputs(model, load(LLAMA, adapters["grown"]), LLAMA)
