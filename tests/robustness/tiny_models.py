"""Tiny models of many architectures, made from their configs, and random adapters for them, made by PEFT alone."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import random
from dataclasses import dataclass, replace
from functools import partial

import torch
import transformers
from models import TINY, Kind, call
from peft import LoraConfig, get_peft_model
from torch import nn


@dataclass(frozen=True)
class Architecture(Kind):
    """A kind of model whose batches can have any number of rows and tokens."""

    #: the names of its inputs
    takes: str = "input_ids"
    #: layers whose rows are not the batch's: it is right to refuse another adapter in each row
    mixed: str = "^$"
    #: modules that can be saved with an adapter
    saved: str = ""
    #: ways to generate
    ways: tuple[str, ...] = ()

    def of(self, rows: int, tokens: int) -> Architecture:
        return replace(self, make_inputs=partial(batch, self.takes, rows, tokens))


def batch(takes: str, rows: int, tokens: int) -> dict:
    """Random inputs. Images: one in each row; with five tokens, two in the first row and none in the second one."""
    images = [2, 0, 1, 1][:rows] if tokens == 5 else [1] * rows
    made = {
        "input_ids": torch.randint(3, 39, (rows, tokens)),
        "decoder_input_ids": torch.randint(3, 39, (rows, 3)),
        "pixel_values": torch.randn(rows, 3, 16, 16),
        "input_values": torch.randn(rows, 80),
        "input_features": torch.randn(rows, 8, 20),
    }
    if takes == "images":
        ids = torch.randint(3, 39, (rows, 4 * max(images) + tokens))
        for row, count in zip(ids, images, strict=True):
            row[: 4 * count] = 39
        return {"input_ids": ids, "pixel_values": torch.randn(sum(images), 3, 16, 16)}
    return {key: made[key] for key in takes.split()}


WAYS: dict[str, dict] = {
    "greedy": {},
    "beams": dict(num_beams=3),
    "several": dict(num_beams=4, num_return_sequences=2),
    "sampled": dict(do_sample=True, num_return_sequences=3, top_k=1),
}
#: what all of them call their sizes; whatever a config doesn't know does no harm
SIZES: dict = TINY | dict(max_position_embeddings=40, embedding_size=12, d_model=16, d_ff=24, d_kv=8, num_layers=2)
SIZES |= {f"{half}_{each}": 2 for half in ("encoder", "decoder") for each in ("layers", "attention_heads")}
SIZES |= dict(encoder_ffn_dim=24, decoder_ffn_dim=24, image_size=16, patch_size=8, depths=[1, 1], num_heads=2)
SIZES |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
WAVES = dict(conv_dim=[8, 8], conv_stride=[4, 2], conv_kernel=[4, 3], num_feat_extract_layers=2)
WAVES |= dict(num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, feat_extract_norm="layer")
FEW = dict(num_key_value_heads=1)
EXPERTS = FEW | dict(num_local_experts=4, num_experts=4, moe_intermediate_size=12, experts_implementation="eager")
RELATIVE = dict(relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=8)
MELS = dict(num_mel_bins=8, max_source_positions=10, max_target_positions=40)
MELS |= dict(suppress_tokens=None, begin_suppress_tokens=None)
SWIN = dict(patch_size=2, window_size=2, embed_dim=8, num_heads=[1, 2], num_attention_heads="")
STAGES = dict(hidden_sizes=[8, 12], embedding_size=8, num_attention_heads="")
SEEING = dict(image_size=16, patch_size=8, **{key: value for key, value in TINY.items() if key != "vocab_size"})
LLAVA = dict(text_config=dict(model_type="llama", **TINY, **FEW), image_token_index=39, vision_feature_layer=-1)
LLAVA |= dict(vision_config=dict(model_type="clip_vision_model", **SEEING))
BLIP = dict(text_config=dict(**TINY, encoder_hidden_size=16, projection_dim=16), image_text_hidden_size=16)
BLIP |= dict(vision_config=dict(**SEEING, projection_dim=16), projection_dim=16)
BLIP |= dict(takes="input_ids pixel_values", ways=())
SHARED = EXPERTS | dict(shared_expert_intermediate_size=20)
XLNET = dict(mixed="layer_", ways=(), d_head=8, max_position_embeddings="")
CONVNEXT = STAGES | dict(num_stages=2, patch_size=2)
LLAVA |= dict(takes="images", mixed="vision_tower|projector", ways=("greedy",), saved="linear_2")
WHISPER = MELS | dict(saved="proj_out", takes="input_features decoder_input_ids")


def tiny(config: str, head: str, modules: str, saved: str = "", takes="input_ids", mixed="^$", ways=None, **settings):
    """A model from its config; every weight random, and large enough to matter."""

    @functools.cache
    def pristine() -> nn.Module:
        sizes = {key: value for key, value in (SIZES | settings).items() if value != ""}
        made = transformers.AutoConfig.for_model(config, **sizes)
        model = getattr(transformers, f"AutoModel{'For' if head else ''}{head}").from_config(made).double()
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter.data) * (0.3 if parameter.dim() > 1 else 0.1)
        return model

    if ways is None:
        ways = tuple(WAYS) if head in ("CausalLM", "Seq2SeqLM", "SpeechSeq2Seq") else ()
    inputs, names = partial(batch, takes, 2, 5), tuple(modules.split())
    return Architecture(lambda: copy.deepcopy(pristine()), inputs, names, takes, mixed, saved, ways)


QKV = "q_proj k_proj v_proj"
LLAMA, BART = f"{QKV} o_proj gate_proj up_proj down_proj", f"{QKV} out_proj fc1 fc2"
NEOX, BERT = "query_key_value dense dense_h_to_4h dense_4h_to_h", "query key value output.dense intermediate.dense"
vision = partial(tiny, head="ImageClassification", takes="pixel_values", saved="classifier")

ARCHITECTURES: dict[str, Architecture] = {
    "llama": tiny("llama", "CausalLM", f"{LLAMA} embed_tokens", "lm_head", **FEW),
    "qwen2": tiny("qwen2", "CausalLM", LLAMA, "lm_head", **FEW),
    # positions are embedded once for all rows
    "gpt2": tiny("gpt2", "CausalLM", "c_attn attn.c_proj c_fc mlp.c_proj wpe", "ln_f", mixed="wpe"),
    "gpt_neox": tiny("gpt_neox", "CausalLM", NEOX, "lm_head"),
    # its tokens are flattened in fc1 and fc2
    "opt": tiny("opt", "CausalLM", BART, "final_layer_norm", word_embed_proj_dim=16, ffn_dim=24),
    "bloom": tiny("bloom", "CausalLM", NEOX, "ln_f"),
    "mamba": tiny("mamba", "CausalLM", "in_proj x_proj out_proj", state_size=4, time_step_rank=2),
    # where it has a cache, transformers 5.24 mixes the rows of a batch by itself
    "rwkv": tiny("rwkv", "CausalLM", "key value receptance output", "head", ways=()),
    "mixtral": tiny("mixtral", "CausalLM", f"{QKV} o_proj", "lm_head", **EXPERTS),
    # and in its shared expert
    "qwen2_moe": tiny("qwen2_moe", "CausalLM", f"{LLAMA} shared_expert_gate", "lm_head", **SHARED),
    # the sequence comes first
    "xlnet": tiny("xlnet", "CausalLM", "layer_1 layer_2", "lm_loss", **XLNET),
    "longformer": tiny("longformer", "MaskedLM", BERT, mixed="query|key|value", attention_window=4),
    "bert": tiny("bert", "MaskedLM", f"{BERT} word_embeddings", "transform"),
    "albert": tiny("albert", "MaskedLM", "query key value attention.dense ffn ffn_output"),
    "roberta": tiny("roberta", "MaskedLM", BERT, "lm_head"),
    # a table of relative positions goes through some layers
    "deberta": tiny("deberta", "MaskedLM", "in_proj pos_proj pos_q_proj intermediate.dense", mixed="pos_", **RELATIVE),
    "t5": tiny("t5", "Seq2SeqLM", "q k v o wi wo", "lm_head", "input_ids decoder_input_ids"),
    "bart": tiny("bart", "Seq2SeqLM", BART, "lm_head", "input_ids decoder_input_ids"),
    "whisper": tiny("whisper", "SpeechSeq2Seq", f"{BART} conv1", **WHISPER),
    "wav2vec2": tiny("wav2vec2", "", f"{QKV} out_proj intermediate_dense projection", "", "input_values", **WAVES),
    "hubert": tiny("hubert", "", f"{QKV} output_dense conv_layers.1.conv", "", "input_values", **WAVES),
    "clip_vision": tiny("clip_vision_model", "", f"{BART} patch_embedding", "", "pixel_values"),
    "vit": vision("vit", modules=f"{QKV} o_proj fc1 fc2 projection"),
    # windows of an image are flattened
    "swin": vision("swin", modules=f"{QKV} o_proj fc1 fc2 reduction", **SWIN),
    # BatchNorm in every layer; it has a buffer of integers
    "resnet": vision("resnet", modules="convolution", saved="classifier normalization", **STAGES, layer_type="basic"),
    "convnext": vision("convnext", modules="pwconv1 pwconv2 dwconv patch_embeddings", **CONVNEXT),
    "llava": tiny("llava", "ImageTextToText", f"{LLAMA} vision_tower.*fc1 vision_tower.*fc2 linear_1", **LLAVA),
    "blip": tiny("blip", "ImageTextToText", "query key value qkv fc1 fc2", **BLIP),
}


# ---- families of adapters

#: what the adapters of a family have beside LoRA; "any": each of them something else
STRUCTURES = ("plain", "plain", "plain", "dora", "saved", "bias", "lora_bias", "tokens", "any")


def draw_structure(draw: random.Random, kind: Architecture, structure: str) -> dict:
    return {
        "dora": dict(use_dora=True),
        "saved": dict(modules_to_save=[draw.choice(kind.saved.split())] if kind.saved else None),
        "bias": dict(bias=draw.choice(["all", "lora_only"])),
        "lora_bias": dict(lora_bias=True),
        "tokens": dict(trainable_token_indices=draw.sample(range(3, 39), 3) if "input_ids" in kind.takes else None),
    }.get(structure, {})


def draw_lora(draw: random.Random, modules: tuple[str, ...]) -> dict:
    some = draw.sample(modules, draw.randint(1, len(modules)))
    way = draw.choice(["list", "list", "regex", "all-linear"])
    if way == "all-linear" and len(modules) > 2:
        targets = dict(target_modules=way)
    elif way == "regex" or any("*" in each for each in some):
        targets = dict(target_modules=rf".*\.({'|'.join(some)})")
    else:
        targets = dict(target_modules=some, layers_to_transform=draw.choice([None, None, None, 0, [1], [0, 1]]))
        targets["exclude_modules"] = some[:1] if len(some) > 1 and draw.random() < 0.2 else None
    maybe = dict(
        use_rslora=True,
        lora_dropout=0.1,
        fan_in_fan_out=True,
        init_lora_weights=draw.choice(["gaussian", False]),
        rank_pattern={draw.choice(some): draw.randint(1, 9)},
        alpha_pattern={draw.choice(some): draw.choice([2, 7])},
    )
    maybe = {key: value for key, value in maybe.items() if draw.random() < 0.3}
    return dict(r=draw.randint(1, 8), lora_alpha=draw.choice([1, 3, 5, 8, 16])) | targets | maybe


def save_random(kind: Architecture, settings: dict, folder: str, seed: int) -> bool:
    """Makes an adapter with PEFT alone; False where PEFT can't, or it changes nothing."""
    with torch.random.fork_rng(), contextlib.suppress(ValueError, TypeError, NotImplementedError, AttributeError):
        torch.manual_seed(seed)
        model = get_peft_model(kind.base(), LoraConfig(**settings)).eval()
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            if "running_" in name and "modules_to_save" in name:
                tensor.add_(torch.rand_like(tensor))
            elif tensor.requires_grad:
                tensor.data += 0.3 * torch.randn_like(tensor.data)
        model.save_pretrained(folder)
        output = call(model, kind.inputs())
        with model.disable_adapter():
            return bool((output - call(model, kind.inputs())).abs().max() > 1e-3)
    return False
