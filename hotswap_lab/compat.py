"""Private names of PyTorch, PEFT and diffusers, which a new version may rename. No other file uses one.

Each name is fetched when it is first needed, so a version without it breaks only the code that needs it.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import Any

#: the names that the package uses, and their locations: a module, and a path inside of it
NAMES = {
    "foreach_copy": "torch:_foreach_copy_",
    "tree_leaves": "torch.utils._pytree:tree_leaves",
    "tree_flatten": "torch.utils._pytree:tree_flatten",
    "tree_unflatten": "torch.utils._pytree:tree_unflatten",
    "treespec_dumps": "torch.utils._pytree:treespec_dumps",
    "treespec_loads": "torch.utils._pytree:treespec_loads",
    "aot_compile": "torch._inductor:aot_compile",
    "package_aoti": "torch._inductor.package:package_aoti",
    "AOTICompiledModel": "torch.export.pt2_archive._package:AOTICompiledModel",
    "AOTIModelPackageLoader": "torch._C._aoti:AOTIModelPackageLoader",
    "DynamoContext": "torch._dynamo.eval_frame:_TorchDynamoContext",
    "eval_frame": "torch._dynamo:eval_frame",
    "cache_entries": "torch._dynamo.eval_frame:_debug_get_cache_entry_list",
    "dynamo_callbacks": "torch._dynamo.callback:callback_handler",
    "register_bytecode_hook": "torch._dynamo.convert_frame:register_bytecode_hook",
    "set_guard_complete_hook": "torch._C._dynamo.eval_frame:set_guard_complete_hook",
    "maybe_mark_dynamic": "torch._dynamo:maybe_mark_dynamic",
    "dynamo_metrics": "torch._dynamo.utils:get_metrics_context",
    "inductor_config": "torch._inductor:config",
    "fresh_inductor_cache": "torch._inductor.utils:fresh_inductor_cache",
    "BufferDict": "peft.tuners._buffer_dict:BufferDict",
    "AdaptedAttention": "peft.tuners.adaption_prompt.layer:_BaseAdaptedAttention",
    "find_minimal_target_modules": "peft.tuners.tuners_utils:_find_minimal_target_modules",
    "include_all_linear_layers": "peft.tuners.tuners_utils:_maybe_include_all_linear_layers",
    "create_lora_config": "diffusers.utils.peft_utils:_create_lora_config",
    "is_group_offload_enabled": "diffusers.hooks.group_offloading:_is_group_offload_enabled",
}
#: attributes of transformers' models after ``enable_peft_hotswap``: whether it was called, and its arguments
HOTSWAP_ENABLED, HOTSWAP_SETTINGS = "_hotswap_enabled", "_prepare_peft_hotswap_kwargs"
#: the method of transformers' models that makes the steps of ``generate`` from a ``generation_config``, and what it
#: needs there: the tokens that end an answer
LOGITS_PROCESSOR, ENDS = "_get_logits_processor", "_eos_token_tensor"
#: the modules whose ``generate`` repeats each row of a batch, and whether it has all rows once more for a guidance
GENERATES = {
    "transformers.generation.utils": False,
    "transformers.models.musicgen.modeling_musicgen": True,
    "transformers.models.musicgen_melody.modeling_musicgen_melody": True,
}
#: its local variables with the batch as given, and as it is after that
EXPANDED = ("inputs_tensor", "input_ids")
#: the modules whose ``generate`` repeats each row itself before it calls another one, by the variable with the number
REPEATS = {"transformers.models.whisper.generation_whisper": "num_return_sequences"}
#: attributes of PEFT's layers, whose properties are too slow for a look at each call
ADAPTER_STATE = ("_disable_adapters", "merged_adapters", "_active_adapter")
#: the versions that have them
KNOWN = {"torch": "2.8 to 2.15", "peft": "0.20 and 0.21", "diffusers": "0.36 to 0.42"}


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = NAMES[name].partition(":")
    try:
        value = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"hotswap_lab needs {module}.{attribute}, which {package} {version(package)} does not have: "
            f"install {package} {KNOWN[package]}"
        ) from error
    globals()[name] = value
    return value


def is_a(value: object, name: str) -> bool:
    """Whether ``value`` is an instance of a private class; False in a version without that class.

    >>> import torch
    >>> is_a(torch.nn.Linear(1, 1), "BufferDict")
    False
    """
    try:
        return isinstance(value, __getattr__(name) if name not in globals() else globals()[name])
    except ImportError:
        return False
