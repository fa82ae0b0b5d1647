"""Tiny models of many architectures, random families of adapters, and everything that swaps, pools and rows can do.

Every result is compared with a fresh load in float64, where the tolerance can be tiny. It equals that, or it was
refused for a reason that is known to be right here, and nothing was changed. By itself, for minutes to an hour::

    python tests/robustness/architectures.py --minutes 20

It prints its figures, and for each failure the command that shows it again.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import itertools
import math
import os
import random
import re
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1])]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from models import TINY, Kind, call, load
from oracle import assert_equals, assert_untouched, snapshot
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from row_truth import Truth
from torch import nn

from hotswap_lab import (
    Adapter,
    AdapterPool,
    HotswapError,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    set_strength,
)
from hotswap_lab import prepare_model_for_compiled_hotswap as prepare

#: of the largest output: what sums in another order may change, and what numbers that were float32 on the way change
TOLERANCE, ROUNDED = 1e-10, 1e-5
ROWS = 4

# ---- the architectures


@dataclass(frozen=True)
class Architecture(Kind):
    """A kind of model whose batches can have any number of rows and tokens."""

    make_batch: Callable[[int, int], dict] = dict
    #: layers whose rows are not the batch's, or can't be told: refusing to give each row its own adapter is right
    mixed: str = "^$"
    #: modules that can be saved with an adapter
    saved: tuple[str, ...] = ()
    ways: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float64

    def base(self) -> nn.Module:
        return super().base().to(self.dtype)

    def inputs(self) -> dict:
        return {
            key: each.to(self.dtype) if each.is_floating_point() else each for key, each in super().inputs().items()
        }

    def of(self, rows: int, tokens: int) -> Architecture:
        return replace(self, make_inputs=partial(self.make_batch, rows, tokens))


def text(rows: int, tokens: int) -> dict:
    return {"input_ids": torch.randint(3, 39, (rows, tokens))}


def both(rows: int, tokens: int) -> dict:
    return text(rows, tokens) | {"decoder_input_ids": text(rows, 3)["input_ids"]}


def pixels(rows: int, tokens: int) -> dict:
    return {"pixel_values": torch.randn(rows, 3, 16, 16)}


def waves(rows: int, tokens: int) -> dict:
    return {"input_values": torch.randn(rows, 80)}


def speech(rows: int, tokens: int) -> dict:
    return {"input_features": torch.randn(rows, 8, 20), "decoder_input_ids": text(rows, tokens)["input_ids"]}


def captioned(rows: int, tokens: int) -> dict:
    return text(rows, tokens) | pixels(rows, tokens)


def illustrated(rows: int, tokens: int) -> dict:
    """One image in each row; with five tokens, two in the first row and none in the second one."""
    images = [2, 0, 1, 1][:rows] if tokens == 5 else [1] * rows
    ids = text(rows, 4 * max(images) + tokens)["input_ids"]
    for row, count in zip(ids, images, strict=True):
        row[: 4 * count] = 39
    return {"input_ids": ids} | pixels(sum(images), tokens)


WAYS: dict[str, dict] = {
    "greedy": {},
    "beams": dict(num_beams=3),
    "several": dict(num_beams=4, num_return_sequences=2),
    "sampled": dict(do_sample=True, num_return_sequences=3, top_k=1),
}


def tiny(config: str, head: str, modules: str, make_batch=text, *, mixed="^$", saved="", ways=None, **settings):
    """A model from its config; every weight random, and large enough to matter."""

    @functools.cache
    def pristine() -> nn.Module:
        made = transformers.AutoConfig.for_model(config, **settings)
        model = getattr(transformers, f"AutoModel{'For' if head else ''}{head}").from_config(made).double()
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter.data) * (0.3 if parameter.dim() > 1 else 0.1)
        return model

    ways = tuple(WAYS) if ways is None and head in ("CausalLM", "Seq2SeqLM", "SpeechSeq2Seq") else tuple(ways or ())
    make_inputs = partial(make_batch, 2, 5)
    names = tuple(modules.split())
    return Architecture(
        lambda: copy.deepcopy(pristine()), make_inputs, names, make_batch, mixed, tuple(saved.split()), ways
    )


def decoder(config: str, modules: str, **settings) -> Architecture:
    return tiny(config, "CausalLM", modules, **{"saved": "lm_head", **TINY, "max_position_embeddings": 40, **settings})


def encoder(config: str, modules: str, **settings) -> Architecture:
    return tiny(config, "MaskedLM", modules, **{**TINY, "max_position_embeddings": 40, **settings})


QKV = "q_proj k_proj v_proj"
LLAMA = f"{QKV} o_proj gate_proj up_proj down_proj"
BART = f"{QKV} out_proj fc1 fc2"
BERT = "query key value attention.output.dense intermediate.dense"
HALVES = {f"{half}_{each}": 2 for half in ("encoder", "decoder") for each in ("layers", "attention_heads")}
HALVES |= dict(encoder_ffn_dim=24, decoder_ffn_dim=24, d_model=16, vocab_size=40)
T5 = dict(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
MARKS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
IMAGE = dict(image_size=16, patch_size=8)
SIGHT = {key: value for key, value in TINY.items() if key != "vocab_size"} | IMAGE
STAGES = dict(hidden_sizes=[8, 12], depths=[1, 1])
WAVES = dict(conv_dim=[8, 8], conv_stride=[4, 2], conv_kernel=[4, 3], num_feat_extract_layers=2)
WAVES |= dict(num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, feat_extract_norm="layer")
GROUPED = dict(num_key_value_heads=1)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": decoder("llama", f"{LLAMA} embed_tokens", **GROUPED),
    "mistral": decoder("mistral", LLAMA, **GROUPED),
    "qwen2": decoder("qwen2", LLAMA, **GROUPED),
    "gemma": decoder("gemma", LLAMA, **GROUPED, head_dim=8, saved=""),
    "stablelm": decoder("stablelm", LLAMA, num_key_value_heads=2),
    "gpt2": decoder("gpt2", "c_attn attn.c_proj c_fc mlp.c_proj wpe", mixed="wpe", saved="ln_f"),
    "gpt_neox": decoder("gpt_neox", "query_key_value dense dense_h_to_4h dense_4h_to_h"),
    "gptj": decoder("gptj", f"{QKV} out_proj fc_in fc_out", rotary_dim=4),
    "opt": decoder("opt", BART, word_embed_proj_dim=16, ffn_dim=24, saved="final_layer_norm"),
    "phi": decoder("phi", f"{QKV} dense fc1 fc2"),
    "bloom": decoder("bloom", "query_key_value dense dense_h_to_4h dense_4h_to_h", saved="ln_f"),
    "falcon": decoder("falcon", "query_key_value dense dense_h_to_4h dense_4h_to_h", saved="ln_f"),
    "mamba": decoder("mamba", "in_proj x_proj out_proj", state_size=4, time_step_rank=2, saved=""),
    "rwkv": decoder("rwkv", "key value receptance output", saved="head", ways=("greedy",)),
    "mixtral": decoder("mixtral", f"{QKV} o_proj", **GROUPED, num_local_experts=4, experts_implementation="eager"),
    "qwen2_moe": decoder(
        "qwen2_moe",
        f"{LLAMA} shared_expert_gate",
        **GROUPED,
        num_experts=4,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=20,
        experts_implementation="eager",
    ),
    # the sequence comes first; with hardly more than one token at a time, its cache is of another kind
    "xlnet": tiny("xlnet", "CausalLM", "layer_1 layer_2", mixed="layer_", saved="lm_loss", ways=(), **TINY, d_head=8),
    "longformer": encoder("longformer", BERT, mixed="query|key|value", attention_window=4),
    "bert": encoder("bert", f"{BERT} word_embeddings", saved="transform"),
    "albert": encoder("albert", "query key value attention.dense ffn ffn_output", embedding_size=12),
    "roberta": encoder("roberta", BERT, saved="lm_head"),
    "electra": encoder("electra", f"{BERT} embeddings_project", embedding_size=12, saved="generator_predictions"),
    "distilbert": encoder("distilbert", "q_lin k_lin v_lin out_lin lin1 lin2", hidden_dim=24, saved="vocab_transform"),
    # a table of relative positions goes through these, and no rows
    "deberta": encoder(
        "deberta",
        "in_proj pos_proj pos_q_proj intermediate.dense",
        mixed="pos_",
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        max_relative_positions=8,
    ),
    "t5": tiny("t5", "Seq2SeqLM", "q k v o wi wo", both, saved="lm_head", **T5, **MARKS),
    "bart": tiny("bart", "Seq2SeqLM", BART, both, saved="lm_head", **HALVES, **MARKS, max_position_embeddings=40),
    "marian": tiny("marian", "Seq2SeqLM", BART, both, saved="lm_head", **HALVES, **MARKS, max_position_embeddings=40),
    "whisper": tiny(
        "whisper",
        "SpeechSeq2Seq",
        f"{BART} conv1",
        speech,
        saved="proj_out",
        **HALVES,
        **MARKS,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=40,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    ),
    "wav2vec2": tiny("wav2vec2", "", f"{BART[:-8]} intermediate_dense output_dense projection", waves, **TINY, **WAVES),
    "hubert": tiny("hubert", "", f"{QKV} out_proj intermediate_dense conv_layers.1.conv", waves, **TINY, **WAVES),
    "vit": tiny("vit", "ImageClassification", f"{QKV} o_proj fc1 fc2 projection", pixels, saved="classifier", **SIGHT),
    "clip_text": tiny("clip_text_model", "", BART, **TINY, max_position_embeddings=40),
    "clip_vision": tiny("clip_vision_model", "", f"{BART} patch_embedding", pixels, **SIGHT),
    "swin": tiny(
        "swin",
        "ImageClassification",
        f"{QKV} o_proj fc1 fc2 reduction",
        pixels,
        saved="classifier",
        image_size=16,
        patch_size=2,
        window_size=2,
        embed_dim=8,
        depths=[1, 1],
        num_heads=[1, 2],
    ),
    # BatchNorm in every layer; it has a buffer of integers
    "resnet": tiny(
        "resnet",
        "ImageClassification",
        "convolution",
        pixels,
        saved="classifier normalization",
        embedding_size=8,
        layer_type="basic",
        **STAGES,
    ),
    "convnext": tiny(
        "convnext",
        "ImageClassification",
        "pwconv1 pwconv2 dwconv patch_embeddings",
        pixels,
        saved="classifier",
        num_stages=2,
        patch_size=2,
        **STAGES,
    ),
    "llava": tiny(
        "llava",
        "ImageTextToText",
        f"{LLAMA} vision_tower.*fc1 vision_tower.*fc2 linear_1",
        illustrated,
        mixed="vision_tower|projector",
        saved="linear_2",
        ways=("greedy",),
        text_config=dict(model_type="llama", **TINY, **GROUPED),
        vision_config=dict(model_type="clip_vision_model", **SIGHT),
        image_token_index=39,
        vision_feature_layer=-1,
    ),
    "blip": tiny(
        "blip",
        "ImageTextToText",
        "query key value qkv fc1 fc2",
        captioned,
        ways=(),
        text_config=dict(**TINY, encoder_hidden_size=16, projection_dim=16),
        vision_config=dict(**SIGHT, projection_dim=16),
        projection_dim=16,
        image_text_hidden_size=16,
    ),
}


# ---- families of adapters

#: what all adapters of a family have beside LoRA; "any": each of them something else
STRUCTURES = ("plain", "plain", "plain", "dora", "saved", "bias", "lora_bias", "tokens", "any")


def draw_lora(draw: random.Random, kind: Architecture) -> dict:
    """Which layers, ranks, scalings and whatever else belongs to LoRA alone."""
    some = draw.sample(kind.modules, draw.randint(1, len(kind.modules)))
    lora: dict = dict(r=draw.randint(1, 8), lora_alpha=draw.choice([1, 3, 5, 8, 16]))
    way = draw.choice(["list", "list", "regex", "all-linear"])
    if way == "all-linear" and len(kind.modules) > 2:
        lora["target_modules"] = way
    elif way == "regex" or any("*" in each for each in some):
        lora["target_modules"] = rf".*\.({'|'.join(some)})"
    else:
        lora["target_modules"] = some
        if draw.random() < 0.2:
            lora["layers_to_transform"] = draw.choice([0, [1], [0, 1]])
        if draw.random() < 0.2 and len(some) > 1:
            lora["exclude_modules"] = some[:1]
    maybe = dict(
        use_rslora=True,
        lora_dropout=0.1,
        fan_in_fan_out=True,
        init_lora_weights=draw.choice(["gaussian", False]),
        rank_pattern={draw.choice(some): draw.randint(1, 9)},
        alpha_pattern={draw.choice(some): draw.choice([2, 7])},
    )
    return lora | {key: value for key, value in maybe.items() if draw.random() < 0.3}


def draw_structure(draw: random.Random, kind: Architecture, structure: str) -> dict:
    return {
        "plain": {},
        "dora": dict(use_dora=True),
        "saved": dict(modules_to_save=[draw.choice(kind.saved)] if kind.saved else None),
        "bias": dict(bias=draw.choice(["all", "lora_only"])),
        "lora_bias": dict(lora_bias=True),
        "tokens": dict(trainable_token_indices=draw.sample(range(3, 39), 3) if "input_ids" in kind.inputs() else None),
        "any": {},
    }[structure]


def save_random(kind: Architecture, settings: dict, folder: str, seed: int) -> bool:
    """Makes an adapter with PEFT alone; False where PEFT doesn't."""
    with torch.random.fork_rng(), contextlib.suppress(ValueError, TypeError, NotImplementedError, AttributeError):
        torch.manual_seed(seed)
        model = get_peft_model(kind.base(), LoraConfig(**settings))
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            if "running_" in name and "modules_to_save" in name:
                tensor.add_(torch.rand_like(tensor))
            elif isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                tensor.data += 0.3 * torch.randn_like(tensor.data)
        model.save_pretrained(folder)
        change = call(model.eval(), kind.inputs()) - call(kind.base(), kind.inputs())
        return bool(change.abs().max() > 1e-3)
    return False


# ---- what is right

#: the beginning of each message with which something may be refused, and when that is right
RIGHT_REFUSALS: dict[str, Callable[[Case], bool]] = {
    # rows
    r"The layer .* can't have another adapter in each row": lambda case: case.on_mixed_layers or case.on_odd_layers,
    r"The adapter .* can't be another one in each row": lambda case: case.structure != "plain",
    # pools
    r"A pool is for LoRA alone": lambda case: case.structure in ("bias", "tokens", "any"),
    r"There is nothing to undo": lambda case: not case.history,
    r"The adapter .* is in the model": lambda case: case.removing_one_in_use,
    r"The adapter .* does not fit into the pool's memory": lambda case: case.is_limited,
    r"The mix of .* needs more rank": lambda case: case.target_rank is None,
    r"The adapters .* can't be mixed": lambda case: case.structure == "dora",
    r"The strength of .* can't be set": lambda case: case.structure != "plain",
    # prepared models, and those that are not
    r"The adapter in the model came with base weights": lambda case: case.base_weights is None and case.on_base_weights,
    r"A model can't be prepared for the loaded adapter": lambda case: case.structure in ("bias", "tokens", "any"),
    r"Adapters with and without DoRA": lambda case: case.structure == "any",
    r"The model can't be prepared for an adapter that is of another kind": lambda case: case.structure == "any",
    r"The adapter .* has other whole modules": lambda case: case.structure == "any",
    r"(The model's adapter is no longer where|The weights of .* are not where)": lambda case: case.was_moved,
}


#: what differs from one refusal of a kind to another
NAMES = r"'[^']*'|[^ ]+[.][^ ]+[.][^ ]+|[0-9]+"


class Reference(Truth):
    """Fresh loads, each kept as a model."""

    def __init__(self, kind: Architecture, folders: dict[str, str]):
        self.kind, self.folders = kind, folders
        self.models: dict[tuple, nn.Module] = {}

    def loaded(self, weights: tuple[tuple[str, float], ...], strength: float = 1.0) -> nn.Module:
        if (weights, strength) not in self.models:
            self.models[weights, strength] = self.model(weights, strength) if weights else self.kind.base()
        return self.models[weights, strength]


@dataclass(eq=False)
class Member:
    """An adapter of a pool, and whose weights it has now."""

    label: str


@dataclass(frozen=True)
class Row:
    """What a row should have: how much of which, all of it at a strength."""

    shares: tuple[tuple[Member, float], ...] = ()
    strength: float = 1.0

    @property
    def weights(self) -> tuple[tuple[str, float], ...]:
        found: defaultdict[str, float] = defaultdict(float)
        for member, weight in self.shares:
            found[member.label] += weight
        return tuple(sorted(found.items()))


@dataclass(frozen=True)
class Now:
    """What the model should have: one row for all of a batch, whatever its size, or one for each."""

    rows: tuple[Row, ...]
    assigned: bool = False
    strength: float = 1.0

    @property
    def differs(self) -> bool:
        return len({(row.weights, row.strength) for row in self.rows}) > 1


@dataclass
class Report:
    figures: Counter = field(default_factory=Counter)
    refused: Counter = field(default_factory=Counter)
    names: set[str] = field(default_factory=set)
    #: by what went wrong: by architecture, the seeds
    failures: dict[str, dict[str, list[int]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))

    def __str__(self) -> str:
        lines = [", ".join(f"{count} {what}" for what, count in self.figures.items())]
        lines += [f"{self.refused.total()} refused as they should be:"]
        lines += [f"{count:6}  {message}" for message, count in self.refused.most_common()]
        lines += [f"{sum(len(s) for each in self.failures.values() for s in each.values())} failures:"]
        for what, found in sorted(self.failures.items()):
            count, (name, seeds) = sum(map(len, found.values())), next(iter(found.items()))
            lines.append(f"{count:6}  {what}  ({', '.join(found)})")
            check = what.partition(":")[0]
            lines.append(f"        {COMMAND} --only {name} --checks {check} --seed {seeds[0]} --cases 1")
        return "\n".join(lines)


COMMAND = "python tests/robustness/architectures.py"


class Case:
    """One check of one architecture with one random family."""

    def __init__(self, name: str, check: str, seed: int, report: Report):
        self.name, self.check, self.seed, self.report = name, check, seed, report
        self.draw = random.Random(f"{seed}/{name}/{check}")
        self.kind = ARCHITECTURES[name]
        self.history: list[Now] = []
        self.is_limited = self.was_moved = self.removing_one_in_use = self.on_odd_layers = False
        self.has_mixed = False
        self.target_rank: int | None = None
        self.base_weights: dict | None = None
        self.walk: Walk | None = None

    @property
    def on_base_weights(self) -> bool:
        """Whether adapters of the family bring base weights of their own."""
        layers = [layer for _, layer in base_layers(load_all(self))]
        return self.structure in ("bias", "any") or any(isinstance(layer, nn.Embedding) for layer in layers)

    @property
    def on_mixed_layers(self) -> bool:
        return self.has_mixed and self.walk is not None and self.walk.now.differs

    def run(self) -> None:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.folder = folder
            try:
                CHECKS[self.check](self)
            except Exception as error:
                if os.environ.get("HARNESS_RAISES"):
                    raise
                self.wrong(f"{type(error).__name__}: {str(error)[:150]}")

    def family(self, structures: tuple[str, ...], count: int = 3) -> list[str]:
        self.structure = self.draw.choice(structures)
        common, kind = draw_structure(self.draw, self.kind, self.structure), self.kind
        if self.draw.random() < 0.4:  # all of them on the same few layers
            first = self.draw.randrange(len(kind.modules))
            kind = replace(kind, modules=kind.modules[first : first + 2])
        self.folders: dict[str, str] = {}
        for number in range(40):
            each = draw_structure(self.draw, self.kind, self.draw.choice(STRUCTURES)) if self.structure == "any" else {}
            settings = draw_lora(self.draw, kind) | common | each
            folder = f"{self.folder}/{number}"
            if save_random(self.kind, settings, folder, number):
                self.folders["abcd"[len(self.folders)]] = folder
            if len(self.folders) == count:
                break
        # where PEFT makes target_parameters of "all-linear", in mixtures of experts
        if any(LoraConfig.from_pretrained(each).target_parameters for each in self.folders.values()):
            self.structure = "any"
        self.report.figures["families"] += 1
        self.reference = Reference(self.kind, self.folders)
        return list(self.folders)

    # ---- what becomes of it

    def wrong(self, what: str) -> None:
        self.report.failures[f"{self.check}: {what}"][self.name].append(self.seed)

    def done(self, what: str, action: Callable[[], object], model: nn.Module) -> bool:
        """Whether it was done; otherwise it was refused, and the model is untouched."""
        before = snapshot(model)
        try:
            action()
        except HotswapError as error:
            summary = str(error).partition("\n")[0]
            right = next((each for each in RIGHT_REFUSALS if re.match(each, summary)), None)
            if right is None or not RIGHT_REFUSALS[right](self):
                self.wrong(f"{what} refused: {re.sub(NAMES, '…', summary)[:120]}")
            else:
                self.report.refused[right] += 1
            try:
                assert_untouched(model, before)
            except AssertionError as error:
                self.wrong(f"{what} refused, and the model was changed: {str(error)[:80]}")
            return False
        return True

    def same(self, what: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
        is_like = actual.shape == expected.shape
        off = float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30)) if is_like else math.inf
        if not off <= tolerance:
            self.wrong("numbers were rounded to float32" if off <= ROUNDED else f"{what} is wrong")
        return off <= max(tolerance, ROUNDED)

    def equals(self, what: str, model: nn.Module, name: str, prepared: bool = False) -> None:
        """Outputs, config, scalars, tensors and files are those of a fresh load."""
        kind, fresh = self.kind.of(2, 5), load(self.kind, self.folders[name])
        self.report.figures["results compared"] += 1
        if self.same(what, call(model, kind.inputs()), call(fresh, kind.inputs())):
            try:
                assert_equals(model, fresh, kind, prepared=prepared, tolerance=TOLERANCE, margin=1)
            except AssertionError as error:
                line = traceback.extract_tb(error.__traceback__)[-1].line
                self.wrong(f"{what} differs from a fresh load: {line} {str(error).partition(chr(10))[0]}"[:150])

    # ---- swaps

    def swaps(self) -> None:
        """From any adapter to any other, with add_layers and base_weights."""
        names = self.family(STRUCTURES, 4)
        self.walk_swaps(load(self.kind, self.folders[names[0]]), names)

    def prepared(self) -> None:
        names = self.family(STRUCTURES)
        model = load(self.kind, self.folders[names[0]])
        rank = self.draw.choice([None, 12])
        if self.done("preparing", lambda: prepare(model, target_rank=rank, adapters=self.folders.values()), model):
            self.walk_swaps(model, names, prepared=True)

    def walk_swaps(self, model: nn.Module, names: list[str], prepared: bool = False) -> None:
        for name in self.draw.choices(names, k=3):
            self.base_weights = self.kind.base().state_dict() if self.draw.random() < 0.7 else None
            options = dict(base_weights=self.base_weights, add_layers=not prepared)
            new = Adapter.load(self.folders[name])
            if self.draw.random() < 0.3:
                action = partial(hotswap_adapter_from_state_dict, model, new.tensors, "default", new.config, **options)
            else:
                action = partial(hotswap_adapter, model, self.folders[name], "default", **options)
            if self.done("a swap", action, model):
                self.report.figures["swaps"] += 1
                self.equals("a swap", model, name, prepared)
            strength = self.draw.choice([0.5, -2, 0])
            if self.structure == "plain" and self.done("a strength", partial(set_strength, model, strength), model):
                expected = call(self.reference.loaded(((name, 1.0),), strength), self.kind.inputs())
                self.same("a strength", call(model, self.kind.inputs()), expected)

    def half(self) -> None:
        """Bit for bit, since the same numbers go through the same operations; but a DoRA that is off is rounded."""
        self.kind = replace(self.kind, dtype=self.draw.choice([torch.bfloat16, torch.float16]))
        names, cast = self.family(("plain", "plain", "dora")), dict(autocast_adapter_dtype=self.draw.random() < 0.5)
        model = load(self.kind, self.folders[names[0]], **cast)
        for name in self.draw.choices(names, k=3):
            if self.done(
                "a swap", partial(hotswap_adapter, model, self.folders[name], "default", add_layers=True), model
            ):
                self.report.figures["swaps in half precision"] += 1
                fresh = load(self.kind, self.folders[name], **cast)
                one, two = (call(each, self.kind.inputs()) for each in (model, fresh))
                self.same("a swap", one.double(), two.double(), 0.05 if self.structure == "dora" else 0)

    def shared(self) -> None:
        """A model in shared memory: a swap is seen by a process that was forked before."""
        names, way = (
            self.family(("plain",)),
            self.draw.choice(["prepared first", "shared first", "a pool, shared first"]),
        )
        model = load(self.kind, self.folders[names[0]])
        make = partial(prepare, model, adapters=self.folders.values())
        if "pool" in way:
            make = partial(AdapterPool, model, adapters=self.folders, progress=False)
        for step in (make, model.share_memory) if way == "prepared first" else (model.share_memory, make):
            if not self.done(f"{way}: {getattr(step, '__name__', 'preparing')}", step, model):
                return
        with forked(partial(call, model, self.kind.inputs())) as compute:
            hotswap_adapter(model, self.folders[names[1]], "default")
            seen = compute()
        self.report.figures["swaps for another process"] += 1
        expected = call(load(self.kind, self.folders[names[1]]), self.kind.inputs())
        self.same(f"{way}: another process's output", seen, expected)

    # ---- pools and rows

    def pool(self) -> None:
        self.family(("plain", "plain", "plain", "dora", "saved", "bias"))
        Walk(self, 1).run()

    def rows(self) -> None:
        self.family(("plain",) * 9 + ("dora",))
        Walk(self, ROWS).run()

    def generate(self) -> None:
        names = self.family(("plain",))
        model = load(self.kind, self.folders[names[0]]).requires_grad_(False)
        walk = Walk(self, ROWS)
        if not self.kind.ways or not walk.make(model):
            return
        for _ in range(2):
            way, count = self.draw.choice(self.kind.ways), self.draw.choice([1, ROWS])
            now, wanted = walk.draw_rows(count)
            if not self.done("assign", partial(walk.pool.assign, wanted), model):
                continue
            walk.now = now
            inputs = {key: each for key, each in self.kind.of(count, 4).inputs().items() if "decoder" not in key}
            options = dict(max_new_tokens=5, min_new_tokens=5, pad_token_id=0, **WAYS[way])
            answers: list[torch.Tensor] = []
            if self.done(f"{way} generate", lambda: answers.append(model.generate(**inputs, **options)), model):
                for number, row in enumerate(now.rows):
                    each = self.reference.loaded(row.weights, row.strength).generate(**inputs, **options)
                    own = slice(number * len(each) // count, (number + 1) * len(each) // count)
                    self.report.figures["generated rows"] += 1
                    if not torch.equal(answers[0][own], each[own]):
                        self.wrong(f"{way} generate is wrong")


class Walk:
    """A pool, and what it has been told to do so far."""

    def __init__(self, case: Case, rows: int):
        self.case, self.draw, self.rows, self.foreign = case, case.draw, rows, 0
        self.members = {name: Member(name) for name in case.folders}
        self.now = Now((Row(((self.members["a"], 1.0),)),))

    def make(self, model: nn.Module) -> bool:
        case, self.model = self.case, model
        options: dict = dict(target_rank=self.draw.choice([None, 40]), progress=False)
        case.target_rank = options["target_rank"]
        if self.rows == 1 and self.draw.random() < 0.5:
            case.is_limited = True
            with contextlib.suppress(HotswapError):
                whole = AdapterPool(load(case.kind, case.folders["a"]), adapters=case.folders, **options)
                options["max_bytes"] = whole.nbytes * 2 // 3
        layers = {path: each for path, each in base_layers(load_all(case))}
        case.on_odd_layers = self.rows > 1 and not all(map(has_rows, layers.values()))
        case.has_mixed = any(re.search(case.kind.mixed, path) for path in layers)
        case.walk = self

        def make() -> None:
            self.pool = AdapterPool(model, adapters=case.folders, rows=self.rows, **options)

        return case.done("a pool", make, model)

    def run(self) -> None:
        if not self.make(load(self.case.kind, self.case.folders["a"]).requires_grad_(False)):
            return
        operations = [self.swap, self.swap, self.strength, self.off, self.update, self.update, self.undo, self.undo]
        operations += [self.using, self.remove, self.add, self.hotswap, self.hotswap]
        operations += [self.assign, self.assign, self.assign, self.assigned] if self.rows > 1 else []
        is_right = self.compare("of a new pool")
        for operation in self.draw.choices(operations, k=8):
            if not is_right:  # what follows is wrong as well
                return
            operation()
            self.case.report.figures["pool operations"] += 1
            is_right = self.compare(f"after {operation.__name__}")
        if self.draw.random() < 0.3:
            self.move()

    # ---- what the model computes

    def compare(self, what: str) -> bool:
        """Whether nothing is wrong."""
        case, now = self.case, self.now
        count = len(now.rows) if now.assigned else self.draw.randint(1, max(self.rows, 2))
        kind = case.kind.of(count, self.draw.choice([4, 5]))
        if now.assigned and now.differs and self.draw.random() < 0.3:
            self.refuses(self.draw.choice([1, *[each for each in range(1, count + 2) if each % count]]))
        output: list[torch.Tensor] = []
        rows = f"a batch of {'rows that differ' if now.differs else 'equal rows' if now.assigned else 'any size'}"
        if not case.done(rows, lambda: output.append(call(self.model, kind.inputs())), self.model):
            return True
        case.report.figures["row batches" if now.assigned else "results compared"] += 1
        for number in range(count):
            row = now.rows[number if now.assigned else 0]
            truth = call(case.reference.loaded(row.weights, row.strength * now.strength), kind.inputs())
            if not case.same(f"{rows} {what}", output[0][number], truth[number]):
                return False
        return True

    def refuses(self, count: int) -> None:
        size = len(self.now.rows)
        with contextlib.suppress(HotswapError):
            call(self.model, self.case.kind.of(count, size).inputs())
            self.case.wrong(f"a batch of {count} with {size} tokens each is accepted where {size} rows are assigned")

    def move(self) -> None:
        """Both are accepted, the swap and what follows, or both are refused."""
        case, name = self.case, self.draw.choice(list(self.case.folders))
        self.model.to(torch.bfloat16)
        case.was_moved, case.kind = True, replace(case.kind, dtype=torch.bfloat16)
        if case.done("moved: a swap", partial(hotswap_adapter, self.model, case.folders[name], "default"), self.model):
            case.was_moved = False
            kind, output = case.kind.of(2, 4), []
            if case.done("moved: a batch", lambda: output.append(call(self.model, kind.inputs())), self.model):
                expected = call(load(case.kind, case.folders[name]).to(torch.bfloat16), kind.inputs())
                case.same("moved: a batch", output[0].double(), expected.double(), 0.1)

    # ---- operations

    def put(self, now: Now) -> None:
        self.case.history.append(self.now)
        self.now = now

    def draw_wanted(self) -> tuple[Row, str | dict[str, float]]:
        names = list(self.members)
        if self.case.structure == "plain" and self.draw.random() < 0.25:
            some = self.draw.sample(names, self.draw.randint(1, len(names)))
            mix = {name: self.draw.choice([0.7, 0.3, -1.0, 2.0]) for name in some}
            return Row(tuple((self.members[name], weight) for name, weight in mix.items())), mix
        name = self.draw.choice(names)
        return Row(((self.members[name], 1.0),)), name

    def draw_rows(self, count: int) -> tuple[Now, list]:
        drawn = [self.draw_wanted() if self.draw.random() < 0.8 else (Row(), None) for _ in range(count)]
        drawn = drawn[:1] * count if self.draw.random() < 0.25 else drawn
        return Now(tuple(row for row, _ in drawn), assigned=True), [each for _, each in drawn]

    def draw_strength(self) -> float:
        return self.draw.choice([1.0, 1.0, 0.5, -2.0]) if self.case.structure == "plain" else 1.0

    def swap(self) -> None:
        (row, wanted), strength = self.draw_wanted(), self.draw_strength()
        if self.case.done("swap", partial(self.pool.swap, wanted, strength), self.model):
            self.put(Now((row,), strength=strength))

    def strength(self) -> None:
        strength = self.draw.choice([0.5, 1.0, -2.0, 0.0])
        if self.case.done("strength", partial(setattr, self.pool, "strength", strength), self.model):
            self.put(replace(self.now, strength=strength))

    def off(self) -> None:
        if self.case.done("off", self.pool.off, self.model):
            self.put(replace(self.now, strength=0.0))

    def update(self) -> None:
        """New weights, and it is in use if it can be."""
        used = [member for row in self.now.rows for member, _ in row.shares if member in self.members.values()]
        member = self.draw.choice(used if used and self.draw.random() < 0.7 else list(self.members.values()))
        name = next(name for name, each in self.members.items() if each is member)
        label = self.draw.choice(list(self.case.folders))
        new = Adapter.load(self.case.folders[label])
        if self.case.done("update", partial(self.pool.update, name, new.tensors, new.config), self.model):
            member.label = label

    def undo(self) -> None:
        if self.case.done("undo", self.pool.undo, self.model):
            self.now = self.case.history.pop()

    def using(self) -> None:
        (row, wanted), strength = self.draw_wanted(), self.draw_strength()
        self.in_a_block(partial(self.pool.using, wanted, strength), Now((row,), strength=strength))

    def assigned(self) -> None:
        now, wanted = self.draw_rows(self.draw.randint(1, self.rows))
        self.in_a_block(partial(self.pool.assigned, wanted), now)

    def in_a_block(self, make: Callable, now: Now) -> None:
        before = self.now

        def block() -> None:
            with make():
                self.now = now
                self.compare("in a block")
                self.now = before

        self.case.done("a block", block, self.model)

    def assign(self) -> None:
        now, wanted = self.draw_rows(self.draw.randint(1, self.rows))
        strengths = [self.draw_strength() for _ in now.rows]
        if wanted.count(wanted[0]) == len(wanted):
            strengths = strengths[:1] * len(wanted)
        rows = tuple(replace(row, strength=by) for row, by in zip(now.rows, strengths, strict=True))
        if self.case.done("assign", partial(self.pool.assign, wanted, strengths), self.model):
            self.put(replace(now, rows=rows))

    def remove(self) -> None:
        name = self.draw.choice(list(self.members))
        used = self.members[name] in [member for row in self.now.rows for member, _ in row.shares]
        if len(self.members) > 1 or used:
            self.case.removing_one_in_use = used
            if self.case.done("remove", partial(self.pool.remove, name), self.model):
                del self.members[name]
                if used:
                    self.case.wrong("remove: one that is in use is removed")

    def add(self) -> None:
        name, label = self.draw.choice("abce"), self.draw.choice(list(self.case.folders))
        if name not in self.members and self.case.done(
            "add", partial(self.pool.add, name, self.case.folders[label]), self.model
        ):
            self.members[name] = Member(label)

    def hotswap(self) -> None:
        """What the pool knows nothing of: it keeps four of these for undo."""
        label, self.foreign = self.draw.choice(list(self.case.folders)), self.foreign + 1
        action = partial(hotswap_adapter, self.model, self.case.folders[label], "default")
        if self.foreign < 4 and self.case.done("hotswap", action, self.model):
            self.now = Now((Row(((Member(label), 1.0),)),))


def load_all(case: Case) -> nn.Module:
    """All adapters of the family beside one another, on all of their layers."""
    (first, folder), *others = case.folders.items()
    model = load(case.kind, folder, first)
    for name, folder in others:
        with contextlib.suppress(ValueError):  # only one adapter with a bias
            model.load_adapter(folder, name)
    return model


def base_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield path, module.get_base_layer()


def has_rows(layer: nn.Module) -> bool:
    """Whether this kind of layer can have another adapter in each row at all."""
    is_linear = isinstance(layer, (nn.Linear, nn.Embedding, transformers.pytorch_utils.Conv1D))
    return is_linear or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


@contextlib.contextmanager
def forked(action: Callable[[], torch.Tensor]) -> Iterator[Callable[[], torch.Tensor]]:
    """Lets another process, a copy of this one as it is now, do something later."""
    (ready, go), (answer, give) = os.pipe(), os.pipe()
    if (child := os.fork()) == 0:
        with contextlib.suppress(BaseException):
            os.read(ready, 1)
            torch.save(action(), buffer := io.BytesIO())
            os.write(give, buffer.getvalue())
        os._exit(0)
    os.close(give)

    def compute() -> torch.Tensor:
        os.write(go, b".")
        pieces = []
        while select.select([answer], [], [], 60)[0] and (piece := os.read(answer, 1 << 16)):
            pieces.append(piece)
        return torch.load(io.BytesIO(b"".join(pieces)))

    try:
        yield compute
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for each in (ready, go, answer):
            os.close(each)


CHECKS: dict[str, Callable[[Case], None]] = {
    each.__name__: each
    for each in (Case.swaps, Case.prepared, Case.half, Case.shared, Case.pool, Case.rows, Case.generate)
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Random adapters on many architectures, against fresh loads.")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--cases", type=int, help="how many, instead of minutes")
    parser.add_argument("--seed", type=int, default=0, help="the first case's; each further one's is one more")
    parser.add_argument("--only", nargs="+", choices=ARCHITECTURES, metavar="ARCHITECTURE")
    parser.add_argument("--checks", nargs="+", choices=CHECKS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    report, start = Report(), time.monotonic()
    for seed in itertools.count(arguments.seed):
        minutes = (time.monotonic() - start) / 60
        if minutes > arguments.minutes if arguments.cases is None else seed == arguments.seed + arguments.cases:
            break
        draw = random.Random(seed)
        name, check = draw.choice(arguments.only or [*ARCHITECTURES]), draw.choice(arguments.checks or [*CHECKS])
        Case(name, check, seed, report).run()
        report.figures["cases"] += 1
        report.names.add(name)
    print(f"{len(report.names)} architectures, {report}\n{minutes:.1f} minutes")
    sys.exit(bool(report.failures))


if __name__ == "__main__":
    main()
