"""Switch the adapter inside a live model, in place, without reloading it.

>>> from hotswap_lab import demo, hotswap_adapter, verify_hotswap
>>> model, tokenizer = demo.load("reverse")            # a PeftModel with one adapter
>>> demo.ask(model, tokenizer, "hotswap")
'pawstoh'
>>> hotswap_adapter(model, demo.adapter_path("pig_latin"), adapter_name="default")
>>> demo.ask(model, tokenizer, "hotswap")
'otswaphay'
>>> verify_hotswap(model, demo.adapter_path("pig_latin"))
matches a fresh load: True

What is where: ``core`` (the engine, and the order to read it in), ``beyond`` (all methods of PEFT but LoRA),
``files`` (the Hub, its search, saving), ``pipelines`` (diffusers), ``threads`` (that share a model), ``shards``
(parameters spread over processes), ``verify`` (the oracle), ``watch`` (recompiles, counted), ``backend`` (which
compiler works here), ``bench`` (how fast), ``demo`` (the embedded models and their adapters), ``lessons`` (the
notebooks' exercises), ``widgets`` (to look at). What speaks against a swap has its words in ``refusals.ini`` beside
each of these.
"""

__version__ = "0.1.0"

from . import beyond, demo, shards  # noqa: F401 - other methods and sharded tensors are known from here on
from .backend import pick_backend
from .core.adapter import Adapter
from .core.commit import commit
from .core.errors import HotswapError
from .core.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict, plan_hotswap
from .core.plan import Plan
from .core.pool import AdapterPool
from .core.prepare import prepare_model_for_compiled_hotswap
from .core.slot import resolve_slot
from .core.strength import get_strength, set_strength
from .files.saving import save_adapter
from .files.search import find_adapters
from .pipelines.lora_files import read_pipeline_lora
from .pipelines.pipeline import (
    PipelinePlan,
    hotswap_pipeline,
    plan_pipeline_hotswap,
    prepare_pipeline_for_compiled_hotswap,
)
from .threads import ModelInUseError, in_use, waiting_at_most
from .verify import Verification, verify_hotswap
from .watch import RecompileError, RecompileWatch

__all__ = [
    "Adapter",
    "AdapterPool",
    "HotswapError",
    "ModelInUseError",
    "PipelinePlan",
    "Plan",
    "RecompileError",
    "RecompileWatch",
    "Verification",
    "__version__",
    "commit",
    "demo",
    "find_adapters",
    "get_strength",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "hotswap_pipeline",
    "in_use",
    "pick_backend",
    "plan_hotswap",
    "plan_pipeline_hotswap",
    "prepare_model_for_compiled_hotswap",
    "prepare_pipeline_for_compiled_hotswap",
    "read_pipeline_lora",
    "resolve_slot",
    "save_adapter",
    "set_strength",
    "verify_hotswap",
    "waiting_at_most",
]
