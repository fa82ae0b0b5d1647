"""Chapter 07: adapters of other kinds than plain LoRA, and reading a refusal.

Tests: ``tests/lessons/test_exercises.py`` and ``tests/lessons/test_lessons.py``.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import peft
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

from .. import demo
from ..beyond.base_twin import make_base_twin
from ..files.reading import Adapter
from ..swap import resolve_slot
from .exercise import Exercise

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
TOKENS = [5, 6], [7, 8, 9, 10]
NORMS = ["input_layernorm", "norm"], ["input_layernorm", "post_attention_layernorm", "norm"]
#: LoKr's, where both of its factors are decomposed
FACTORS = dict(decompose_both=True, decompose_factor=4)

# --- adapters of every kind ------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """A swap to try: the change in words, and the configs of both adapters."""

    what: str
    old: PeftConfig
    new: PeftConfig


def _config(kind: str, *, on: Sequence[str] = ALL, **options: object) -> PeftConfig:
    return getattr(peft, f"{kind}Config")(target_modules=list(on), **options)


def _lora(r: int = 4, **options: object) -> PeftConfig:
    return _config("Lora", r=r, lora_alpha=8, **options)


def _ia3(*inputs_of: str) -> PeftConfig:
    return _config("IA3", on=["k_proj", "v_proj", *inputs_of], feedforward_modules=list(inputs_of))


def _vera(r: int, **options: object) -> PeftConfig:
    return _config("Vera", on=ATTENTION, r=r, **options)


def _oft(block: int) -> PeftConfig:
    # exact rotations, because the fast approximation only holds near zero, and random weights are larger
    return _config("OFT", oft_block_size=block, use_cayley_neumann=False)


def _prompt(tokens: int) -> PeftConfig:
    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens)


#: swaps from one adapter of a kind to another, by the name of the kind
PAIRS: dict[str, Pair] = {
    "LoRA": Pair("rank 4 to 16, on fewer layers", _lora(4), _lora(16, on=ATTENTION)),
    "LoRA to rsLoRA": Pair("rank 16 to 4, another scaling", _lora(16), _lora(4, use_rslora=True)),
    "DoRA": Pair("rank 4 to 16, on fewer layers", _lora(4, use_dora=True), _lora(16, on=ATTENTION, use_dora=True)),
    "LoRA with lora_bias": Pair("rank 4 to 16", _lora(4, lora_bias=True), _lora(16, lora_bias=True)),
    "LoRA to DoRA": Pair("a magnitude more on each layer", _lora(4), _lora(4, use_dora=True)),
    "DoRA to LoRA": Pair("a magnitude less on each layer", _lora(4, use_dora=True), _lora(4)),
    "LoRA, modules_to_save": Pair("an lm_head of its own", _lora(4), _lora(4, modules_to_save=["lm_head"])),
    "LoRA, trainable tokens": Pair("four other tokens", *(_lora(trainable_token_indices=ids) for ids in TOKENS)),
    "LoHa": Pair("rank 4 to 6, another scaling", _config("LoHa", r=4, alpha=8), _config("LoHa", r=6, alpha=3)),
    "LoKr": Pair("rank 2 to 4, other factors", _config("LoKr", r=2, alpha=4), _config("LoKr", r=4, alpha=2, **FACTORS)),
    "IA3": Pair("on the attention only", _ia3("down_proj"), _ia3()),
    "OFT": Pair("blocks of 4 to blocks of 8", _oft(4), _oft(8)),
    "VeRA": Pair("rank 4 to 8, other random matrices", _vera(4), _vera(8, projection_prng_key=7)),
    "LayerNorm tuning": Pair("on more layers", *(_config("LNTuning", on=names) for names in NORMS)),
    "Prompt tuning": Pair("4 virtual tokens to 7", _prompt(4), _prompt(7)),
}


@torch.no_grad()
def disturb(model: torch.nn.Module) -> None:
    """Add noise to all trainable weights, because PEFT's initial values often turn an adapter off."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.add_(0.2 * torch.randn_like(parameter))


def load(config: PeftConfig, seed: int = 1) -> PeftModel:
    """Return the embedded base model with a random adapter, as PEFT would load it.

    >>> load(PAIRS["LoHa"].old).peft_config["default"].r
    4
    """
    base = demo.load_base()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(base, copy.deepcopy(config)).eval()
        disturb(model)
    model.peft_config["default"].inference_mode = True
    return model


def adapter(config: PeftConfig, seed: int = 2) -> Adapter:
    """Return a random adapter for the embedded base model, with noise in all of its tensors.

    >>> len(adapter(PAIRS["IA3"].old).tensors)
    12
    """
    tensors = get_peft_model_state_dict(model := load(config, seed), adapter_name="default")
    return Adapter(model.peft_config["default"], tensors, f"a random {config.peft_type.value} adapter")


# --- exercises -------------------------------------------------------------------------------------------------------


@Exercise
@torch.no_grad()
def turn_off(solution):
    """Write values with which a DoRA or an IA3 layer computes what its base layer does. About 5 lines."""
    for kind in ("DoRA", "IA3"):
        model, other = (load(PAIRS[kind].old) for _ in range(2))
        slot, equal = resolve_slot(model, "default"), 0
        addresses = slot.data_ptrs()
        for layer in slot.layers:
            solution(layer.module)
        # only the values count: they are copied to a model whose adapter is on
        set_peft_model_state_dict(other, get_peft_model_state_dict(model))
        for layer in resolve_slot(other, "default").layers:
            base = layer.module.get_base_layer()
            inputs = torch.randn(2, base.in_features, generator=torch.Generator().manual_seed(0))
            equal += torch.allclose(layer.module(inputs), base(inputs), atol=1e-4)
        yield f"{kind} layers that compute what their base does", equal, len(slot.layers)
        yield f"{kind}: the addresses stay the same", slot.data_ptrs() == addresses, True


#: the old and the new config, by the difference between the two adapters
SAME_STRUCTURE: dict[str, Any] = {
    "values of parameters": (_ia3("down_proj"), _ia3("down_proj")),
    "values of buffers, too": [_vera(4, projection_prng_key=key) for key in (0, 7)],
    "numbers, too": (_lora(4), _lora(4, alpha_pattern={"q_proj": 3}, use_rslora=True)),
}


@Exercise
@torch.no_grad()
def make_equal(solution):
    """Make ``live`` compute what ``fresh`` does, in place, whatever the method is. About 6 lines."""
    for difference, (old, new) in SAME_STRUCTURE.items():
        live = load(old)
        inputs = live.get_base_model().dummy_inputs
        # a fresh load around the same base weights
        fresh = PeftModel(make_base_twin(live.get_base_model()).model, copy.deepcopy(new), "default").eval()
        set_peft_model_state_dict(fresh, adapter(new).tensors, "default")
        addresses = resolve_slot(live, "default").data_ptrs()
        before = (norm := live.get_base_model().model.norm.weight).clone()
        expected = fresh(**inputs).logits
        solution(live, fresh)
        disturb(fresh)  # so that live can't call fresh or share its memory
        yield f"equal: {difference}", torch.allclose(live(**inputs).logits, expected, atol=1e-4), True
        kept = torch.equal(norm, before) and resolve_slot(live, "default").data_ptrs() == addresses
        yield f"addresses and base kept: {difference}", kept, True
