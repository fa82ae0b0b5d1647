"""Code that calls PEFT's hotswap, or passes ``hotswap=True`` to diffusers or transformers, uses ours instead."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

from peft.utils import hotswap as peft_hotswap
from transformers.integrations import PeftAdapterMixin

from .. import compat, swap
from ..core.errors import HotswapError, advise, listing
from ..files.reading import read
from .lora_files import components_of, read_pipeline_lora
from .pipeline import IN_PIPELINES, hotswap_pipeline, is_offloaded

#: the advice of a refusal, and the one for users of transformers' ``load_adapter``
IN_TRANSFORMERS = {"pass add_layers=True": "call hotswap_adapter(model, ..., add_layers=True)"}
#: a list while diffusers loads a LoRA, for the error of the swap: if it got that error, it would delete the adapter
_kept: ContextVar[list[Exception] | None] = ContextVar("kept", default=None)


def check_hotswap_configs_compatible(config0: object, config1: object) -> None:
    """Accept any two configs: whether a swap can be right is decided by its plan, which sees the tensors too."""


@functools.wraps(swap.hotswap_adapter_from_state_dict)
def hotswap_adapter_from_state_dict(*arguments: Any, **keywords: Any) -> None:
    try:
        swap.hotswap_adapter_from_state_dict(*arguments, **keywords)
    except Exception as error:
        if (kept := _kept.get()) is None:
            raise
        kept.append(error)


def _copied(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a function: undoing a patch replaces this object, but not the function that users import from here."""
    return functools.update_wrapper(functools.partial(function), function)


#: the functions that replace those of ``peft.utils.hotswap``, and the replaced ones
OURS: dict[str, Callable[..., Any]] = {
    "hotswap_adapter": _copied(swap.hotswap_adapter),
    "hotswap_adapter_from_state_dict": hotswap_adapter_from_state_dict,
    "prepare_model_for_compiled_hotswap": _copied(swap.prepare_model_for_compiled_hotswap),
    "check_hotswap_configs_compatible": check_hotswap_configs_compatible,
}
THEIRS: dict[str, Callable[..., Any]] = {name: getattr(peft_hotswap, name) for name in OURS}

#: an original function, and the one that replaces it; and what makes our method from the original one
Pair = tuple[Callable[..., Any], Callable[..., Any]]
Maker = Callable[[Callable[..., Any]], Callable[..., Any]]


class Patch(contextlib.AbstractContextManager["Patch"]):
    """The replacements of :func:`patch_peft`. As a context manager, it undoes them at the end of the block."""

    def __init__(self) -> None:
        self.pairs: list[Pair] = [(THEIRS[name], function) for name, function in OURS.items()]
        self.pairs += [(theirs, make(theirs)) for _, theirs, make in _methods()]

    def undo(self) -> None:
        """Put back everything that was replaced. Models keep the adapters that were swapped in.

        If another patch is still active, its functions stay.
        """
        if self in _active:
            known = [*_active]
            _active.remove(self)
            _apply_last_patch(known)

    def __exit__(self, *error: object) -> None:
        self.undo()


#: in the order in which they were made
_active: list[Patch] = []


def _apply_last_patch(known: Iterable[Patch]) -> None:
    """Put the functions of the last active patch, or the original ones, into each module that has one of ``known``."""
    originals = {id(function): pair[0] for patch in known for pair in patch.pairs for function in pair}
    wanted = {id(theirs): ours for theirs, ours in _active[-1].pairs} if _active else {}
    # the package itself keeps the original ones
    names = [name for name in sys.modules if name.partition(".")[0] != __name__.partition(".")[0]]
    for owner in [*(sys.modules[name] for name in names), *(owner for owner, _, _ in _methods())]:
        for attribute, value in list(getattr(owner, "__dict__", {}).items()):
            if (theirs := originals.get(id(value))) is not None:
                setattr(owner, attribute, wanted.get(id(theirs), theirs))


@functools.cache
def _methods() -> list[tuple[type, Callable[..., Any], Maker]]:
    """The methods that load an adapter: the class, the method as it is before any patch, and the maker of ours."""
    methods: list[Any] = [(PeftAdapterMixin, PeftAdapterMixin.load_adapter, _load_adapter)]
    with contextlib.suppress(ImportError):  # diffusers is not installed
        from diffusers.loaders import lora_pipeline, peft

        methods.append((peft.PeftAdapterMixin, peft.PeftAdapterMixin.load_lora_adapter, _load_lora_adapter))
        for value in vars(lora_pipeline).values():
            if inspect.isclass(value) and "load_lora_weights" in vars(value):
                methods.append((value, value.load_lora_weights, _load_lora_weights))
    return methods


def patch_peft() -> Patch:
    """Make existing code swap with this package: replace the functions of ``peft.utils.hotswap`` in this process.

    Then ``pipe.load_lora_weights(..., hotswap=True)`` and ``enable_lora_hotswap`` of diffusers, and
    ``model.load_adapter(..., hotswap=True)`` and ``enable_peft_hotswap`` of transformers, use it too. Their arguments
    and checks stay the same. Modules that have imported a function of PEFT before get the new one. A second call
    replaces only what the first one could not know.

    Returns
    -------
    Patch
        ``patch.undo()`` puts PEFT's functions back, as does the end of ``with patch_peft():``.

    Examples
    --------
    >>> from peft.utils import hotswap
    >>> from hotswap_lab import demo, patch_peft
    >>> model, tokenizer = demo.load("reverse")
    >>> with patch_peft():
    ...     hotswap.hotswap_adapter(model, demo.adapter_path("caesar"), "default")
    >>> demo.ask(model, tokenizer, "abc")
    'def'

    Notes
    -----
    transformers 5 has its own hotswap, which refuses another rank, keeps the old scaling, and never makes the room that
    ``enable_peft_hotswap`` asks for: ``load_adapter`` of its models is replaced as well. If that room is too small, the
    error comes after the first adapter was loaded, and it stays loaded. In diffusers, a file with a text encoder's LoRA
    is swapped too, unless weights are offloaded.
    """
    patch = Patch()
    _active.append(patch)
    _apply_last_patch(_active)
    return patch


# ---- diffusers


def _load_lora_weights(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """``load_lora_weights`` of pipelines, which swaps all components, or none."""
    signature = inspect.signature(theirs)

    @functools.wraps(theirs)
    def load_lora_weights(self: Any, *arguments: Any, **keywords: Any) -> None:
        bound = signature.bind(self, *arguments, **keywords).arguments
        name = bound.get("adapter_name")
        loaded = {key: model for key, model in components_of(self).items() if name in getattr(model, "peft_config", {})}
        if not bound.get("hotswap") or not loaded:  # diffusers raises the error for a hotswap into nothing
            return theirs(self, *arguments, **keywords)
        reading = {key: value for key, value in bound.get("kwargs", {}).items() if key != "low_cpu_mem_usage"}
        adapters = read_pipeline_lora(self, bound["pretrained_model_name_or_path_or_dict"], **reading)
        if len(adapters) == 1 and any(map(is_offloaded, loaded.values())):
            # diffusers takes off the hooks that move weights, and puts them on again
            return theirs(self, *arguments, **keywords)
        hotswap_pipeline(self, adapters, name, components=list(adapters))
        if left := loaded.keys() - adapters.keys():
            text = f"{listing(sorted(left))} keep the adapter {name!r} that they had, as the new LoRA has no tensors"
            warnings.warn(f"{text} for them; hotswap_lab.hotswap_pipeline turns it off there", stacklevel=2)

    return load_lora_weights


def _load_lora_adapter(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """``load_lora_adapter`` of diffusers' models, which raises the error of a swap after diffusers has ended."""

    @functools.wraps(theirs)
    def load_lora_adapter(self: Any, *arguments: Any, **keywords: Any) -> None:
        token = _kept.set(kept := [])
        try:
            theirs(self, *arguments, **keywords)
        finally:
            _kept.reset(token)
        for error in kept:
            raise advise(error, IN_PIPELINES) if isinstance(error, HotswapError) else error

    return load_lora_adapter


# ---- transformers


def _load_adapter(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """``load_adapter`` of transformers' models, with this package wherever it would hotswap."""
    signature = inspect.signature(theirs)

    @functools.wraps(theirs)
    def load_adapter(self: Any, *arguments: Any, **keywords: Any) -> Any:
        bound: dict[str, Any] = {"kwargs": {}, **signature.bind(self, *arguments, **keywords).arguments}
        name, hotswap = bound.get("adapter_name"), bound.get("hotswap", "auto")
        loaded = name in getattr(self, "peft_config", {})
        if hotswap == "auto":
            hotswap = loaded and getattr(self, compat.HOTSWAP_ENABLED, False)
        if not hotswap or not loaded:  # transformers raises the error for a hotswap into nothing
            result = theirs(self, *arguments, **keywords)
            _prepare(self)
            return result
        try:
            source, tensors, config = (bound.get(key) for key in ("peft_model_id", "adapter_state_dict", "peft_config"))
            if tensors is None:
                hub = {**(bound["kwargs"].get("download_kwargs") or {}), **(bound.get("adapter_kwargs") or {})}
                if bound.get("local_files_only"):
                    hub["local_files_only"] = True
                if config is None:
                    swap.hotswap_adapter(self, source, name, **hub)
                else:
                    tensors = read(source, **hub).tensors
            if tensors is not None:
                swap.hotswap_adapter_from_state_dict(self, tensors, name, config)
        except HotswapError as error:
            raise advise(error, IN_TRANSFORMERS) from error.__cause__
        # transformers returns a report of the load. After a swap, nothing is missing there
        nothing = dict(missing_keys=set(), unexpected_keys=set(), mismatched_keys=set(), conversion_errors={})
        return SimpleNamespace(**nothing, error_msgs=[])

    return load_adapter


def _prepare(model: Any) -> None:
    """Make the room that ``enable_peft_hotswap`` asked for, once, after the first adapter was loaded."""
    if settings := getattr(model, compat.HOTSWAP_SETTINGS, None):
        setattr(model, compat.HOTSWAP_SETTINGS, None)
        swap.prepare_model_for_compiled_hotswap(model, **settings)
