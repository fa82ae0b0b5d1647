"""Code that calls PEFT's hotswap, or passes ``hotswap=True`` to diffusers or transformers, uses this engine instead."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from types import MethodType, SimpleNamespace
from typing import Any

from peft.utils import hotswap as peft_hotswap
from transformers.integrations import PeftAdapterMixin

from .. import compat
from ..core import prepare, swap
from ..core.engine import Engine


def check_hotswap_configs_compatible(engine: Engine, config0: object, config1: object) -> None:
    """Accept any two configs: whether a swap can be right is decided by its plan, which sees the tensors too."""


OURS: Mapping[str, Callable[..., Any]] = {
    "hotswap_adapter": swap.hotswap_adapter,
    "hotswap_adapter_from_state_dict": swap.hotswap_adapter_from_state_dict,
    "prepare_model_for_compiled_hotswap": prepare.prepare_model_for_compiled_hotswap,
    "check_hotswap_configs_compatible": check_hotswap_configs_compatible,
}
# read on import, since they are replaced later
THEIRS: Mapping[str, Callable[..., Any]] = {name: getattr(peft_hotswap, name) for name in OURS}
LOAD_ADAPTER: Callable[..., Any] = PeftAdapterMixin.load_adapter


class Patch:
    """What :func:`patch_peft` replaced. As a context manager, it puts everything back at the end of the block."""

    def __init__(self) -> None:
        self._replaced: list[tuple[Any, str, object]] = []

    def replace(self, owner: Any, name: str, value: object) -> None:
        self._replaced.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Put back everything that was replaced. Models keep the adapters that were swapped in."""
        while self._replaced:
            setattr(*self._replaced.pop())

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()


def patch_peft(engine: Engine) -> Patch:
    """Make existing code swap with this engine: replace the functions of ``peft.utils.hotswap`` in this process.

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
    error comes after the first adapter was loaded, and it stays loaded. diffusers refuses LoRAs of text encoders by
    itself; :func:`hotswap_lab.hotswap_pipeline` swaps them.
    """
    patch = Patch()
    by_id = {id(THEIRS[name]): MethodType(function, engine) for name, function in OURS.items()}
    for name, module in list(sys.modules.items()):
        # the package itself keeps them
        if name.partition(".")[0] != __name__.partition(".")[0]:
            for attribute, value in list(getattr(module, "__dict__", {}).items()):
                if id(value) in by_id:
                    patch.replace(module, attribute, by_id[id(value)])
    if PeftAdapterMixin.load_adapter is LOAD_ADAPTER:
        patch.replace(PeftAdapterMixin, "load_adapter", _load_adapter(engine))
    return patch


def _load_adapter(engine: Engine) -> Callable[..., Any]:
    """``load_adapter`` of transformers' models, with this engine wherever it would hotswap."""
    signature = inspect.signature(LOAD_ADAPTER)

    @functools.wraps(LOAD_ADAPTER)
    def load_adapter(self: Any, *arguments: Any, **keywords: Any) -> Any:
        given: dict[str, Any] = {"kwargs": {}, **signature.bind(self, *arguments, **keywords).arguments}
        name, hotswap = given.get("adapter_name"), given.get("hotswap", "auto")
        loaded = name in getattr(self, "peft_config", {})
        if hotswap == "auto":
            hotswap = loaded and getattr(self, compat.HOTSWAP_ENABLED, False)
        if not hotswap or not loaded:  # transformers says what is wrong with a hotswap into nothing
            result = LOAD_ADAPTER(self, *arguments, **keywords)
            _prepare(engine, self)
            return result
        source, tensors, config = (given.get(key) for key in ("peft_model_id", "adapter_state_dict", "peft_config"))
        if tensors is None:
            hub = {**(given["kwargs"].get("download_kwargs") or {}), **(given.get("adapter_kwargs") or {})}
            if given.get("local_files_only"):
                hub["local_files_only"] = True
            if config is None:
                swap.hotswap_adapter(engine, self, source, name, **hub)
            else:
                tensors = engine.read(source, **hub).tensors
        if tensors is not None:
            swap.hotswap_adapter_from_state_dict(engine, self, tensors, name, config)
        # what transformers returns: a report of the load, in which nothing is missing after a swap
        nothing = dict(missing_keys=set(), unexpected_keys=set(), mismatched_keys=set(), conversion_errors={})
        return SimpleNamespace(**nothing, error_msgs=[])

    return load_adapter


def _prepare(engine: Engine, model: Any) -> None:
    """Make the room that ``enable_peft_hotswap`` asked for, once, after the first adapter was loaded."""
    settings = getattr(model, compat.HOTSWAP_SETTINGS, None)
    if settings:
        setattr(model, compat.HOTSWAP_SETTINGS, None)
        prepare.prepare_model_for_compiled_hotswap(engine, model, **settings)
