"""Switch the adapter inside a live model, in place, without reloading it.

>>> from hotswap_lab import demo, hotswap_adapter, verify_hotswap
>>> model, tokenizer = demo.load("reverse")            # a PeftModel with one adapter
>>> demo.ask(model, tokenizer, "hotswap")
'pawstoh'
>>> hotswap_adapter(model, demo.adapter_path("pig_latin"), adapter_name="default")
>>> demo.ask(model, tokenizer, "hotswap")
'otswaphay'
>>> verify_hotswap(model, demo.adapter_path("pig_latin"), base=demo.load_base)
matches a fresh load: True

Look before you swap      ``plan_hotswap``, then ``commit``; ``verify_hotswap`` is the proof afterwards
From tensors in memory    ``hotswap_adapter_from_state_dict``; ``Adapter.load`` reads an adapter once for many swaps
A compiled model          ``prepare_model_for_compiled_hotswap`` first; ``RecompileWatch`` counts, ``pick_backend``
Without a compiler        ``aoti_compile`` writes a prepared model to a file, ``aoti_load`` binds it in any process
Many adapters             ``AdapterPool``; ``set_strength``, ``get_strength``; threads: ``in_use``, ``waiting_at_most``
Code that calls PEFT      ``patch_peft`` makes it, diffusers and transformers swap with this package
Diffusion pipelines       ``hotswap_pipeline``, ``plan_pipeline_hotswap``, ``read_pipeline_lora``, ``PipelinePool``
What is in a model now    ``loaded``; each swap and refusal is a record of ``logging.getLogger("hotswap_lab")``
Files                     ``save_adapter``
Many users                ``hotswap_lab.serving``: OpenAI's API in front, Ray Serve around it

``help(hotswap_lab.hotswap_adapter)`` has the arguments, errors and an example, as has the help of each of these. The
notebooks teach all of it from the start, and ``hotswap_lab.core`` says in which order to read the engine's code. A
refused swap raises ``HotswapError``, which says what was found, what was expected, and what to do next.
"""

__version__ = "0.1.0.dev0"

import importlib as _importlib
import sys as _sys
import typing as _typing

# What is public, by its module. A name is imported when it is first used: torch, transformers and PEFT take two seconds
# to import, and `hotswap-lab --help` doesn't need them. A test compares this with the imports below for type checkers.
_PUBLIC = {
    "ahead": "aoti_compile aoti_load",
    "core.errors": "HotswapError",
    "core.plan": "Plan",
    "files.reading": "Adapter",
    "pipelines.lora_files": "read_pipeline_lora",
    "pipelines.patching": "patch_peft",
    "pipelines.pool": "PipelinePool",
    "pipelines.pipeline": "PipelinePlan hotswap_pipeline plan_pipeline_hotswap prepare_pipeline_for_compiled_hotswap",
    "pools.adapter_pool": "AdapterPool",
    "swap": "commit get_strength hotswap_adapter hotswap_adapter_from_state_dict loaded plan_hotswap "
    "prepare_model_for_compiled_hotswap resolve_slot save_adapter set_strength",
    "threads": "ModelInUseError in_use waiting_at_most",
    "verify": "Verification verify_hotswap",
    "watch": "RecompileError RecompileWatch pick_backend",
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names.split()}

# Public names that are gone, each with its replacement. docs/upgrading.md lists the other changes that break code.
_REMOVED = {
    "hotswap_lab.demo.exact_match": "compare demo.ask_all(model, tokenizer, words) with demo.tasks.TASKS",
    "hotswap_lab.demo.voices.ask_all": "call demo.voices.ask for each question",
    "hotswap_lab.demo.voices.score": "it is in the repository, in training/voice_scores.py",
    "hotswap_lab.widgets.StrengthLattice": "use widgets.SwapPanel, whose slider sets the strength",
}


def _raise_missing(module: str, name: str) -> _typing.NoReturn:
    """Raise the error for a name that a module doesn't have."""
    if instead := _REMOVED.get(f"{module}.{name}"):
        raise ImportError(f"{module}.{name} was removed: {instead}")
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


def __getattr__(name: str) -> object:
    if name in _MODULE_OF:
        value = getattr(_importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
    # for `from hotswap_lab import *`, but not for help(hotswap_lab), which would print the help of every name in it
    if name == "__all__" and _sys._getframe(1).f_globals.get("__name__") != "pydoc":
        return sorted({*_MODULE_OF, "demo"})
    if name == "demo":
        return _importlib.import_module(f"{__name__}.demo")
    _raise_missing(__name__, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF, "demo"})


if _typing.TYPE_CHECKING:
    from . import demo as demo
    from .ahead import aoti_compile as aoti_compile
    from .ahead import aoti_load as aoti_load
    from .core.errors import HotswapError as HotswapError
    from .core.plan import Plan as Plan
    from .files.reading import Adapter as Adapter
    from .pipelines.lora_files import read_pipeline_lora as read_pipeline_lora
    from .pipelines.patching import patch_peft as patch_peft
    from .pipelines.pipeline import PipelinePlan as PipelinePlan
    from .pipelines.pipeline import hotswap_pipeline as hotswap_pipeline
    from .pipelines.pipeline import plan_pipeline_hotswap as plan_pipeline_hotswap
    from .pipelines.pipeline import prepare_pipeline_for_compiled_hotswap as prepare_pipeline_for_compiled_hotswap
    from .pipelines.pool import PipelinePool as PipelinePool
    from .pools.adapter_pool import AdapterPool as AdapterPool
    from .swap import commit as commit
    from .swap import get_strength as get_strength
    from .swap import hotswap_adapter as hotswap_adapter
    from .swap import hotswap_adapter_from_state_dict as hotswap_adapter_from_state_dict
    from .swap import loaded as loaded
    from .swap import plan_hotswap as plan_hotswap
    from .swap import prepare_model_for_compiled_hotswap as prepare_model_for_compiled_hotswap
    from .swap import resolve_slot as resolve_slot
    from .swap import save_adapter as save_adapter
    from .swap import set_strength as set_strength
    from .threads import ModelInUseError as ModelInUseError
    from .threads import in_use as in_use
    from .threads import waiting_at_most as waiting_at_most
    from .verify import Verification as Verification
    from .verify import verify_hotswap as verify_hotswap
    from .watch import RecompileError as RecompileError
    from .watch import RecompileWatch as RecompileWatch
    from .watch import pick_backend as pick_backend
