"""Whole diffusers pipelines: after a swap they are what a fresh pipeline is after ``load_lora_weights``."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import refusals
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.hooks import apply_group_offloading
from lengths import long
from models import in_float64, randn
from oracle import assert_same_tables, assert_same_tensors, config_of, untouched
from partial import some_of
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from row_truth import assert_close
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from hotswap_lab import (
    Adapter,
    HotswapError,
    RecompileWatch,
    get_strength,
    hotswap_adapter,
    hotswap_pipeline,
    plan_pipeline_hotswap,
    prepare_pipeline_for_compiled_hotswap,
    read_pipeline_lora,
    set_strength,
    verify_hotswap,
)
from hotswap_lab.core.compiled import unwrap_compiled
from hotswap_lab.pipelines.lora_files import components_of

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore:.*did not match any targeted module.*"),
]

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj")


# ---- pipelines


def text_encoder(cls: type = CLIPTextModel):
    # with a smaller range, adapters hardly change the outputs
    sizes = dict(vocab_size=54, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    special = dict(bos_token_id=52, eos_token_id=53, pad_token_id=53, max_position_embeddings=8)
    return cls(CLIPTextConfig(**sizes, **special, projection_dim=16, initializer_factor=5.0))


def tokenizer() -> CLIPTokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=8)


def unet(**config) -> UNet2DConditionModel:
    sizes = dict(sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16))
    sizes |= dict(norm_num_groups=4, attention_head_dim=4)
    blocks = dict(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"))
    blocks |= dict(up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    return UNet2DConditionModel(**(sizes | blocks | config))


def stable_diffusion() -> StableDiffusionPipeline:
    parts = dict(vae=None, text_encoder=text_encoder(), tokenizer=tokenizer(), unet=unet(cross_attention_dim=16))
    no_checker = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return StableDiffusionPipeline(**parts, **no_checker, scheduler=DDIMScheduler(clip_sample=False))


def stable_diffusion_xl() -> StableDiffusionXLPipeline:
    added = dict(addition_embed_type="text_time", addition_time_embed_dim=8)
    added |= dict(projection_class_embeddings_input_dim=6 * 8 + 16)
    parts = dict(vae=None, text_encoder=text_encoder(), tokenizer=tokenizer())
    parts |= dict(text_encoder_2=text_encoder(CLIPTextModelWithProjection), tokenizer_2=tokenizer())
    parts |= dict(unet=unet(cross_attention_dim=32, **added), scheduler=DDIMScheduler(clip_sample=False))
    return StableDiffusionXLPipeline(**parts, add_watermarker=False)


def flux() -> FluxPipeline:
    sizes = dict(in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2)
    sizes |= dict(joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(2, 2, 4))
    transformer = FluxTransformer2DModel(**sizes)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # its gates start at zero
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, text_encoder(), tokenizer(), None, None, transformer)


def latents(pipe, prompt: str = "a cat", **kwargs) -> torch.Tensor:
    """A whole call of the pipeline, short of the picture."""
    if isinstance(pipe, FluxPipeline):
        ids = pipe.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            encoded = pipe.text_encoder(ids)
        kwargs |= dict(prompt_embeds=encoded.last_hidden_state, pooled_prompt_embeds=encoded.pooler_output)
    else:
        kwargs["prompt"] = prompt
    pipe.set_progress_bar_config(disable=True)
    kwargs |= dict(height=64, width=64, num_inference_steps=2, generator=torch.Generator().manual_seed(7))
    return pipe(output_type="latent", **kwargs).images.clone()


@dataclass(frozen=True, eq=False)
class Kind:
    make_random: Callable[[], object]
    #: the components, and the ends of the names of modules that LoRA goes on
    components: dict[str, tuple[str, ...]]

    def __call__(self):
        """A fresh pipeline; the same weights every time."""
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            pipe = self.make_random()
        for model in components_of(pipe).values():
            in_float64(model.eval())
        return pipe

    def loaded(self, source, name: str = "style", **kwargs):
        """The truth: a fresh pipeline with diffusers' own loading.

        Of a dict it gets clones: diffusers makes the tensors the model's own, and swaps would overwrite the dict.
        """
        pipe = self()
        if isinstance(source, dict):
            source = {key: tensor.clone() for key, tensor in source.items()}
        pipe.load_lora_weights(source, adapter_name=name, **kwargs)
        return pipe


KINDS = {
    "sd": Kind(stable_diffusion, {"unet": (*ATTENTION, "conv1", "ff.net.2"), "text_encoder": (*TEXT, "fc1")}),
    "sdxl": Kind(stable_diffusion_xl, {"unet": ATTENTION, "text_encoder": TEXT, "text_encoder_2": (*TEXT, "fc2")}),
    "flux": Kind(flux, {"transformer": (*ATTENTION, "proj_mlp", "x_embedder"), "text_encoder": TEXT}),
}
SD = KINDS["sd"]


# ---- LoRA files, made without any library


def matrices(model, ends: tuple[str, ...], rank: int, seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B, both random, for each module whose name ends like that. Every third one has one rank more."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for path, module in model.named_modules():
        if not any(path == end or path.endswith(f".{end}") for end in ends):
            continue
        out_features, in_features, *kernel = module.weight.shape
        r = rank + (len(found) % 3 == 2)
        shapes = (r, in_features, *kernel), (out_features, r, *(1 for _ in kernel))
        found[path] = tuple(torch.randn(shape, generator=generator).double() * 0.3 for shape in shapes)
    assert found
    return found


def keys_of(key_format: str, component: str, path: str) -> tuple[str, str, str]:
    """The names of A, of B and of alpha in a file."""
    if key_format == "peft":
        return f"{component}.{path}.lora_A.weight", f"{component}.{path}.lora_B.weight", ""
    if component == "text_encoder":
        path = f"text_model.{path.removeprefix('text_model.')}"  # as before a version 5 of transformers
    if key_format == "diffusers":
        infix = "lora_linear_layer" if component.startswith("text") else "lora"
        return f"{component}.{path}.{infix}.down.weight", f"{component}.{path}.{infix}.up.weight", ""
    prefix = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[component]
    name = f"{prefix}_{path.replace('.', '_')}"
    return f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"


def lora(kind: Kind, key_format="peft", *, rank=4, seed=1, alpha=None, components=None) -> dict[str, torch.Tensor]:
    """A LoRA as a state dict. Alphas are for kohya's format; every second layer has another one."""
    pipe, tensors = kind(), {}
    for component, ends in (kind.components if components is None else components).items():
        for number, (path, pair) in enumerate(matrices(getattr(pipe, component), ends, rank, seed).items()):
            *names, own = keys_of(key_format, component, path)
            tensors |= dict(zip(names, pair, strict=True))
            if own and alpha is not None:
                tensors[own] = torch.tensor(alpha + number % 2)
    return tensors


def file_with_metadata(kind: Kind, folder: Path, configs: dict[str, LoraConfig], seed: int) -> str:
    """What diffusers' training scripts write: adapters added, (not) trained, and saved with their configs."""
    pipe = kind()
    for component, config in configs.items():
        model = getattr(pipe, component)
        inject_adapter_in_model(config, model)
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator).double() * 0.3)
    saved = {}
    for component in configs:
        model = getattr(pipe, component)
        saved[f"{component}_lora_layers"] = get_peft_model_state_dict(model, adapter_name="default")
        saved[f"{component}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    pipe.save_lora_weights(folder, **saved)
    return str(folder)


# ---- the comparison


def assert_same_latents(pipe, fresh, **options) -> None:
    assert_close(latents(pipe, **options), latents(fresh, **options))


def assert_like_fresh(pipe, fresh, kind: Kind, name: str = "style") -> None:
    expected, without = latents(fresh), latents(kind())
    scale = expected.abs().max().item()
    assert (expected - without).abs().max() > 1e-2 * scale, "the LoRA changes next to nothing"
    assert_close(latents(pipe), expected)
    live, active = pipe.get_active_adapters(), fresh.get_active_adapters()
    # diffusers 0.36 looks at the denoiser alone, in which a fresh load of a text encoder's LoRA has nothing
    assert live == active or (version("diffusers").startswith("0.36.") and (live, active) == ([name], []))
    for component, model in components_of(fresh).items():
        assert_same_component(getattr(pipe, component), model, name)


def assert_same_component(model, fresh, name: str) -> None:
    """Config, tables and saved tensors. A component without the adapter saves nothing for it."""
    if name not in getattr(fresh, "peft_config", {}):
        if name in getattr(model, "peft_config", {}):
            assert get_peft_model_state_dict(model, adapter_name=name) == {}
        return
    assert config_of(model.peft_config[name]) == config_of(fresh.peft_config[name])
    assert_same_tables(model, fresh, name, prepared=True)
    assert_same_tensors(
        get_peft_model_state_dict(model, adapter_name=name), get_peft_model_state_dict(fresh, adapter_name=name)
    )


# ---- swaps


@pytest.mark.parametrize(
    ("kind_name", "old", "new"),
    [
        ("sd", "peft", "kohya"),
        long("sd", "kohya", "diffusers"),
        long("sd", "diffusers", "peft"),
        long("sdxl", "kohya", "peft"),
        long("sdxl", "diffusers", "kohya"),
        ("flux", "peft", "peft"),
    ],
)
@pytest.mark.parametrize("ranks", [(3, 6), long((6, 3))], ids=["grows", "shrinks"])
def test_formats(tmp_path, kind_name, old, new, ranks):
    kind = KINDS[kind_name]
    first = lora(kind, old, rank=ranks[0], seed=1, alpha=3.0)
    second = lora(kind, new, rank=ranks[1], seed=2, alpha=5.0)
    path = tmp_path / "new.safetensors"
    save_file(second, path)
    pipe, copies = kind.loaded(first), {key: tensor.clone() for key, tensor in second.items()}
    read = read_pipeline_lora(pipe, second)
    assert all(isinstance(adapter, Adapter) for adapter in read.values())
    with pytest.raises(TypeError, match="already read"):
        hotswap_pipeline(pipe, read, "style", weight_name="x")
    # a file has its tensors in another order, and of alphas that are equally frequent diffusers takes the first
    sources = [(str(path), str(path)), (second, second)]
    if (kind_name, old) == ("sd", "peft"):
        sources += [(first, first), (read, second)]
    for source, told in sources:
        hotswap_pipeline(pipe, source, "style")
        assert_like_fresh(pipe, kind.loaded(told), kind)
    assert_same_tensors(second, copies)


@pytest.mark.long
def test_files_with_metadata(tmp_path):
    """The config comes from the file: alphas, patterns and rsLoRA, for each component."""
    unet, text = list(ATTENTION), list(TEXT)
    configs = [
        {
            "unet": LoraConfig(r=4, lora_alpha=6, target_modules=unet),
            "text_encoder": LoraConfig(r=4, lora_alpha=3, target_modules=text),
        },
        {
            "unet": LoraConfig(r=2, lora_alpha=7, use_rslora=True, target_modules=unet[:2], rank_pattern={"to_k": 5}),
            "text_encoder": LoraConfig(r=6, lora_alpha=5, target_modules=text[:1], alpha_pattern={"1.*q_proj": 9}),
        },
    ]
    old, new = (file_with_metadata(SD, tmp_path / str(seed), each, seed) for seed, each in enumerate(configs))
    pipe = SD.loaded(old)
    plan = plan_pipeline_hotswap(pipe, new, "style")
    assert plan.plans["unet"].counts == {"copy": 0, "pad": 0, "resize": 16, "off": 16, "add": 0}
    plan.commit()
    assert_like_fresh(pipe, SD.loaded(new), SD)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*lora_bias.*", "ignore:.*invalid shape.*")
@pytest.mark.parametrize("option", ["use_dora", "lora_bias"])
def test_other_kinds_of_lora(tmp_path, option):
    """DoRA and biases in PEFT's format: in, off, and out again."""
    configs = {
        "unet": LoraConfig(r=4, target_modules=["to_q"], **{option: True}),
        "text_encoder": LoraConfig(r=3, target_modules=["q_proj"]),
    }
    other = file_with_metadata(SD, tmp_path, configs, seed=2)
    plain = lora(SD, components={"unet": ("to_q",), "text_encoder": ("q_proj",)})
    text_only = lora(SD, seed=3, components={"text_encoder": ("q_proj",)})
    pipe = SD.loaded(plain)
    for source in (other, load_file(tmp_path / "pytorch_lora_weights.safetensors"), text_only, other, plain):
        hotswap_pipeline(pipe, source, "style")
        assert_like_fresh(pipe, SD.loaded(source), SD)


@pytest.mark.long
def test_metadata_that_names_other_layers_than_the_file_has(tmp_path):
    """The tensors decide for diffusers' own models, in a fresh load and here."""
    kind, name = SD, "pytorch_lora_weights.safetensors"
    folder = Path(file_with_metadata(kind, tmp_path, {"unet": LoraConfig(r=4, target_modules=["to_q"])}, seed=2))
    config = LoraConfig(r=4, target_modules=["to_k"]).to_dict()
    metadata = {
        "lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()}, default=list)
    }
    save_file(load_file(folder / name), folder / name, metadata=metadata)
    pipe = kind.loaded(lora(kind))
    hotswap_pipeline(pipe, folder, "style")
    with pytest.warns(RuntimeWarning, match="inconsistency"):
        fresh = kind.loaded(str(folder))
    assert_same_latents(pipe, fresh)


def test_a_component_that_the_new_file_has_nothing_for_is_off_until_one_comes_that_has():
    both, unet_only = lora(SD, seed=1), lora(SD, seed=2, components={"unet": ATTENTION})
    text_only = lora(SD, seed=3, rank=2, components={"text_encoder": ("q_proj",)})
    pipe = SD.loaded(both)
    for source, off in ((unet_only, "text_encoder"), (text_only, "unet"), (both, None), (unet_only, "text_encoder")):
        plan = plan_pipeline_hotswap(pipe, source, "style")
        if off:
            assert {row[0] for row in plan.plans[off].rows} == {"off"}
        plan.commit()
        assert_like_fresh(pipe, SD.loaded(source), SD)


@pytest.mark.long
def test_some_components_of_some():
    """Those that are chosen are as after a fresh load, or off; the others are left alone."""
    both = {"unet": ("to_q",), "text_encoder": ("q_proj",)}
    files = {names: lora(SD, seed=2, components={name: both[name] for name in names}) for names in some_of(both)}
    for (names, source), chosen in itertools.product(files.items(), some_of(both)):
        pipe = SD.loaded(lora(SD, components=both))
        if not {*names} & {*chosen}:
            refused(pipe, source, "components without an adapter", components=chosen)
            continue
        with untouched(*[getattr(pipe, name) for name in both if name not in chosen]):
            hotswap_pipeline(pipe, source, "style", components=chosen)
        fresh = SD.loaded(source)
        for name in chosen:
            assert_same_component(getattr(pipe, name), getattr(fresh, name), "style")


@pytest.mark.long
def test_layers_that_the_loaded_one_lacks():
    small, large = lora(SD, components={"unet": ("to_q",), "text_encoder": ("q_proj",)}), lora(SD, seed=2)
    pipe = SD.loaded(small)
    refused(pipe, large, "unet: Hot swapping the adapter did not succeed, unexpected keys")
    hotswap_pipeline(pipe, large, "style", add_layers=True)
    assert_like_fresh(pipe, SD.loaded(large), SD)


@pytest.mark.long
def test_one_of_several_adapters():
    """Two names, one inside the other, both active, with weights; and names that diffusers gives."""
    first, other, new = (lora(SD, seed=seed, rank=seed + 1) for seed in range(3))
    pipes = SD.loaded(first, "default"), SD.loaded(new, "default")
    for pipe in pipes:
        pipe.load_lora_weights(other)
        pipe.set_adapters(["default", "default_1"], [1.0, 0.4])
    hotswap_pipeline(pipes[0], new, "default")
    assert pipes[0].get_list_adapters() == pipes[1].get_list_adapters()
    assert_like_fresh(*pipes, SD, "default")
    assert_same_component(pipes[0].unet, pipes[1].unet, "default_1")
    for pipe in pipes:
        pipe.delete_adapters("default_1")
    assert_like_fresh(*pipes, SD, "default")
    pipe = SD()
    pipe.load_lora_weights(first)
    hotswap_pipeline(pipe, new)
    assert_like_fresh(pipe, SD.loaded(new, None), SD, "default_0")


def test_a_dict_that_a_swap_has_overwritten_is_refused():
    """diffusers makes the tensors of the dict the model's own."""
    old, new = lora(SD, seed=1), lora(SD, seed=2)
    clones, pipe = {key: tensor.clone() for key, tensor in old.items()}, SD()
    pipe.load_lora_weights(old, adapter_name="style")
    hotswap_pipeline(pipe, new, "style")
    assert not any(torch.equal(old[key], clones[key]) for key in old)
    refused(pipe, old, r"unet: [\s\S]*an earlier swap has overwritten them[\s\S]*read its file again")
    hotswap_pipeline(pipe, clones, "style")
    assert_like_fresh(pipe, SD.loaded(clones), SD)


@pytest.mark.parametrize("dtype", [torch.bfloat16, long(torch.float16)])
def test_half_precision(dtype):
    """The pipeline's components and both files in it; then a file in float64, which is rounded, and said so."""
    old, new = ({key: tensor.to(dtype) for key, tensor in lora(SD, seed=seed).items()} for seed in (1, 2))
    pipes = SD().to(dtype), SD().to(dtype)
    for pipe, source in zip(pipes, (old, new), strict=True):
        pipe.load_lora_weights(source, adapter_name="style")
    plan = plan_pipeline_hotswap(pipes[0], new, "style")
    assert "rounded" not in str(plan)
    plan.commit()
    for component, model in components_of(pipes[1]).items():
        assert_same_component(getattr(pipes[0], component), model, "style")
    plan = plan_pipeline_hotswap(pipes[0], lora(SD, seed=2), "style")
    assert all("the file has torch.float64, which is rounded" in str(each) for each in plan.plans.values())


def test_hooks_of_offloading_stay():
    """Reading a file must not do what a load does, which takes hooks off and puts others on."""
    from accelerate import cpu_offload_with_hook

    pipe = SD.loaded(lora(SD))
    for model in components_of(pipe).values():
        cpu_offload_with_hook(model, "cpu")
    hooks = [model._hf_hook for model in components_of(pipe).values()]
    new = lora(SD, seed=2, rank=2)
    hotswap_pipeline(pipe, new, "style")
    assert [model._hf_hook for model in components_of(pipe).values()] == hooks
    assert_like_fresh(pipe, SD.loaded(new), SD)


# ---- strengths


@pytest.mark.long
@pytest.mark.parametrize("prepared", [False, True])
def test_adapter_weights(prepared):
    """A weight from before the swap is gone, as after a fresh load; one that is set afterwards acts as usual."""
    old, new = lora(SD, seed=1), lora(SD, "kohya", seed=2, rank=2, alpha=3.0)
    pipe = SD.loaded(old)
    if prepared:
        prepare_pipeline_for_compiled_hotswap(pipe, [new])
    pipe.set_adapters(["style"], [0.5])
    hotswap_pipeline(pipe, new, "style")
    fresh = SD.loaded(new)
    assert [get_strength(model, "style") for model in components_of(pipe).values()] == [1, 1]
    assert_like_fresh(pipe, fresh, SD)
    for weights in (0.5, {"unet": 0.3, "text_encoder": 0.0}, {"unet": {"down": 2.0, "up": 0.2}}, 1.0):
        for each in (pipe, fresh):
            each.set_adapters(["style"], [weights])
        assert_same_latents(pipe, fresh)
    scaled = latents(fresh, cross_attention_kwargs={"scale": 0.3})
    assert (scaled - latents(fresh)).abs().max() > 0.01
    assert_same_latents(pipe, fresh, cross_attention_kwargs={"scale": 0.3})
    # that scale is a pipeline's last one now; a swap doesn't take it over, nor does a load into a fresh pipeline
    hotswap_pipeline(pipe, old, "style")
    assert_like_fresh(pipe, SD.loaded(old), SD)
    pipe.disable_lora()
    hotswap_pipeline(pipe, new, "style")
    assert_same_latents(pipe, SD())
    pipe.enable_lora()
    assert_like_fresh(pipe, SD.loaded(new), SD)


# ---- refusals


#: how all refusals begin that are of diffusers, or of what it leaves over
UNFIT = "can't be loaded into this StableDiffusionPipeline"


def refused(pipe, source, match: str, name: str = "style", **kwargs) -> HotswapError:
    """The swap is refused, the components are untouched, and the error says what to do."""
    config = dict(pipe.config)
    error = refusals.refused(match, hotswap_pipeline, pipe, source, name, **kwargs)
    assert dict(pipe.config) == config
    assert all(refusal.found and refusal.expected and refusal.next_step for refusal in error.refusals)
    return error


@pytest.mark.long
def test_fused_is_refused_for_all_components_or_for_those_that_are_to_be_swapped():
    pipe = SD.loaded(lora(SD))
    pipe.fuse_lora(components=["text_encoder"])  # one component is enough
    new = lora(SD, seed=2)
    refused(pipe, new, "text_encoder: Cannot hot-swap adapter 'style' because it is currently merged")
    with untouched(pipe.text_encoder):  # which keeps what it has
        hotswap_pipeline(pipe, new, "style", components=["unet"])
    assert_same_component(pipe.unet, SD.loaded(new).unet, "style")
    pipe.unfuse_lora(components=["text_encoder"])
    hotswap_pipeline(pipe, new, "style")
    assert_same_latents(pipe, SD.loaded(new))


def wrong_files(folder: Path) -> dict[str, tuple]:
    """What can be wrong: a source, the words of the refusal, and options."""
    good, kohya, damaged = lora(SD, seed=2), lora(SD, "kohya", alpha=2.0), folder / "damaged.safetensors"
    damaged.write_bytes(b"nonsense" * 100)
    key = next(key for key in good if key.startswith("text_encoder") and "lora_A" in key)
    xl, no_up = KINDS["sdxl"], {each: tensor for each, tensor in kohya.items() if "lora_up" not in each}
    return {
        "a shape": ({**good, key: good[key][:, :-1]}, "text_encoder: The adapter does not fit the base model"),
        "no numbers": ({**good, key: good[key] * float("nan")}, "damaged"),
        "whole numbers": ({**good, key: good[key].long()}, "damaged"),
        "half a pair": ({each: good[each] for each in good if each != key}, "text_encoder: .* incomplete"),
        "no such layer": ({**good, "unet.nowhere.lora_A.weight": torch.ones(2, 2)}, "unet: .* unexpected keys"),
        "nothing": ({}, UNFIT),
        "no LoRA": ({"unet.conv_in.weight": torch.ones(2, 2)}, UNFIT),
        "LoKr": ({**kohya, "lora_unet_x.lokr_w1": torch.ones(2)}, UNFIT),
        "half of kohya's pairs": (no_up, UNFIT),
        "damaged": (damaged, UNFIT),
        "missing": (folder / "missing", UNFIT),
        "another name": (folder, UNFIT, dict(weight_name="other.safetensors")),
        "XL's": (lora(xl), f"{UNFIT}(.|\\n)*text_encoder_2"),
        "XL's, read": (read_pipeline_lora(xl(), lora(xl)), "components without an adapter(.|\\n)*text_encoder_2"),
        "Flux's": (lora(KINDS["flux"], components={"transformer": ("to_q",)}), UNFIT),
        "nobody": (good, "Adapter nobody not found(.|\\n)*unet: 'style'; text_encoder: 'style'", dict(name="nobody")),
        "the VAE": (good, "Adapter style not found in vae", dict(components=["vae"])),
        "the VAE, too": (good, "Adapter style not found in unet, vae", dict(components=["unet", "vae"])),
    }


@pytest.mark.long
def test_what_is_wrong_with_the_file(tmp_path):
    pipe = SD.loaded(lora(SD))
    for source, match, *options in wrong_files(tmp_path).values():
        refused(pipe, source, match, **dict(*options))
    with pytest.raises(TypeError, match="hotswap"):
        hotswap_pipeline(pipe, lora(SD), "style", hotswap=True)
    halves = SimpleNamespace(load_lora_weights=print), SimpleNamespace(_lora_loadable_modules=["unet"])
    for other in (pipe.unet, object(), *halves):
        with pytest.raises(HotswapError, match="LoRA can't be loaded into this object"):
            hotswap_pipeline(other, lora(SD), "style")
    with pytest.raises(HotswapError, match="hotswap_pipeline"):
        hotswap_adapter(pipe, "somewhere", "style")


UNET_ONLY = {"unet": ATTENTION}


@pytest.mark.long
def test_a_component_without_the_adapter_is_refused():
    both = {**UNET_ONLY, "text_encoder": TEXT}
    pipe, new = SD.loaded(lora(SD, components=UNET_ONLY)), lora(SD, seed=2, components=both)
    error = refused(pipe, new, "components without an adapter")
    assert "tensors for unet, text_encoder; an adapter in unet" in str(error)
    with untouched(pipe.unet, pipe.text_encoder), pytest.raises(HotswapError, match="components without an adapter"):
        prepare_pipeline_for_compiled_hotswap(pipe, [lora(SD)])
    hotswap_pipeline(pipe, new, "style", components=["unet"])
    full, new = SD.loaded(lora(SD)), lora(SD, seed=3, rank=9, components=UNET_ONLY)
    prepare_pipeline_for_compiled_hotswap(full, [new])
    hotswap_pipeline(full, new, "style")
    assert_like_fresh(full, SD.loaded(new), SD)
    pipe.text_encoder = None
    refused(pipe, lora(SD), UNFIT)
    hotswap_pipeline(pipe, lora(SD, seed=2, components=UNET_ONLY), "style")


def test_a_control_lora_is_refused():
    """diffusers enlarges a layer of the base model for it, or overwrites norms: neither is a swap."""
    kind = KINDS["flux"]
    pipe, embedder = kind.loaded(lora(kind)), "transformer.x_embedder.lora_{}.weight"
    wide = {embedder.format("A"): torch.ones(2, 32), embedder.format("B"): torch.ones(16, 2)}
    refused(pipe, wide, "does not fit the base model")
    norm = {"transformer.transformer_blocks.0.attn.norm_q.weight": torch.ones(8)}
    refused(pipe, {**lora(kind), **norm}, "can't be loaded into this FluxPipeline.*\n.*base weights")


def offload_in_groups(model) -> None:
    cpu = torch.device("cpu")
    apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


@pytest.mark.long
def test_group_offloading_is_refused():
    pipe = SD.loaded(lora(SD))
    offload_in_groups(pipe.unet)
    refused(pipe, lora(SD, seed=2), "offloaded in groups")


def test_preparing_is_all_or_nothing():
    pipe = SD.loaded(lora(SD))
    pipe.text_encoder.compile(backend="eager")
    with untouched(pipe.unet, pipe.text_encoder), pytest.raises(HotswapError, match="before\\* compiling"):
        prepare_pipeline_for_compiled_hotswap(pipe, target_rank=8)
    more_layers = lora(SD, components={"text_encoder": (*TEXT, "fc2")})
    refused(pipe, more_layers, "prepare_pipeline_for_compiled_hotswap")


# ---- compiled


@pytest.mark.long
def test_compiled_swaps():
    """Every component compiled; ranks, layers, whole components and weights come and go without a recompile."""
    sources = [
        lora(SD, seed=1, rank=3),
        lora(SD, "kohya", seed=2, rank=6, alpha=2.0),
        lora(SD, seed=3, rank=2, components={"unet": ("conv2", "to_q"), "text_encoder": ("fc2", "q_proj")}),
        lora(SD, "diffusers", seed=4, rank=2, components={"unet": ATTENTION}),
    ]
    pipe = SD.loaded(sources[0])
    prepare_pipeline_for_compiled_hotswap(pipe, sources)
    # diffusers makes weights trainable when it sets adapter weights, so that is done once before compiling
    pipe.set_adapters(["style"])
    pipe.unet = torch.compile(pipe.unet, backend="aot_eager")
    pipe.text_encoder.compile()
    scaled = dict(cross_attention_kwargs={"scale": 0.25})
    for options in ({}, scaled):
        latents(pipe, **options)
    with RecompileWatch(allow=0):
        for number in (2, 3, 0, 1):
            plan = plan_pipeline_hotswap(pipe, sources[number], "style")
            assert not plan.will_recompile
            plan.commit()
            fresh = SD.loaded(sources[number])
            assert_same_latents(pipe, fresh)
        for weight in (0.5, 0.0, 2.0, 1.0):
            for each in (pipe, fresh):
                each.set_adapters(["style"], [weight])
            set_strength(pipe.unet, weight, "style")  # which diffusers doesn't find in its wrapper
            assert_same_latents(pipe, fresh)
        assert_same_latents(pipe, fresh, **scaled)
        assert_same_latents(pipe, fresh)
    for component, model in components_of(fresh).items():
        live = get_peft_model_state_dict(unwrap_compiled(getattr(pipe, component)), adapter_name="style")
        assert_same_tensors(live, get_peft_model_state_dict(model, adapter_name="style"))


# ---- around it


def test_what_a_plan_shows():
    pipe = SD.loaded(lora(SD))
    plan = plan_pipeline_hotswap(pipe, lora(SD, seed=2, rank=2, components={"unet": ATTENTION}), "style")
    assert plan.ok
    assert str(plan).startswith("unet: Swap a state dict into 'style': possible")
    assert "text_encoder: Swap" in str(plan)
    assert plan._repr_html_().count("<table") == 2
    pipe.fuse_lora()
    plan = plan_pipeline_hotswap(pipe, lora(SD, seed=2), "style")
    assert str(plan).count("refused, 1 reason") == 2
    assert "merged" in plan._repr_html_()
    with pytest.raises(HotswapError, match=r"unet: .*merged"):
        plan.commit()


@pytest.mark.long
def test_native_adapters_of_one_model():
    """``unet.load_lora_adapter`` and ``save_lora_adapter``: no pipeline, the same swap through an Adapter."""
    new = lora(SD, "kohya", seed=2, rank=2, alpha=3.0, components={"unet": ATTENTION})
    pipe = SD.loaded(lora(SD))
    adapter = read_pipeline_lora(pipe, new)["unet"]
    hotswap_adapter(pipe.unet, adapter, "style")
    assert_same_component(pipe.unet, SD.loaded(new).unet, "style")
    inputs = dict(sample=randn(1, 4, 8, 8), timestep=torch.tensor(3), encoder_hidden_states=randn(1, 5, 16))
    assert verify_hotswap(pipe.unet, adapter, "style", inputs=inputs)
