"""The public functions for a model: they read an adapter, take the model's lock, plan, and write.

:mod:`hotswap_lab.beyond.passes` lists all code that decides a swap, in the order of the calls.

Tests: ``tests/core/test_swap.py``.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig

from .beyond.configs import changes_while_computing
from .beyond.passes import METHODS, PASSES
from .core.adapter import Adapter
from .core.change import apply
from .core.errors import HotswapError, refusal
from .core.host import Config, Host, carriers, find_host, hosts_in, name_in
from .core.loaded import LoadedList, loaded_of
from .core.log import log_event
from .core.plan import Plan
from .core.planner import make_plan
from .core.prepare import as_list, changes_to_prepare, check_not_compiled, raise_ranks, slots_to_prepare
from .core.slot import Slot, slot_for, slot_in
from .core.strength import change_strength, strength_of
from .files.reading import read
from .files.saving import check_folder, files_of, save
from .threads import in_use, is_shared, locked

RECOMPILES = (
    "this changes shapes or numbers that the model was compiled for, and its next call compiles again; to swap without "
    "recompiling, call prepare_model_for_compiled_hotswap after loading the first adapter and before compiling"
)
TRAINED = (
    "the adapter requires gradients: if it is trained, call optimizer.state.clear() after the swap, because an "
    "optimizer keeps the moments of the old weights, and nothing shows it"
)
#: a folder, a Hub id, or an adapter that was read before
Source = str | os.PathLike[str] | Adapter
#: the warnings that were shown already, by base model
_shown: weakref.WeakKeyDictionary[torch.nn.Module, set[str]] = weakref.WeakKeyDictionary()


def hotswap_adapter(
    model: torch.nn.Module,
    model_name_or_path: str | os.PathLike[str] | Adapter,
    adapter_name: str | None = None,
    torch_device: str | torch.device | None = None,
    *,
    add_layers: bool = False,
    base_weights: Mapping[str, torch.Tensor] | None = None,
    **kwargs: Any,
) -> None:
    """Replace a loaded adapter with another one, in place.

    The adapter keeps its name. Afterwards the model is the same as one into which ``PeftModel.from_pretrained`` loaded
    the new adapter: same outputs, config, scalings and saved files. Ranks, alphas, rsLoRA and the patterns of both may
    differ. Layers that the new adapter lacks are turned off. If the rank stays the same, so do the memory addresses; in
    a prepared model they always do. A scale that was set before (``set_scale``, ``scale_layer``) is reset, as after a
    fresh load: set it again if you still want it. If the model is trained, call ``optimizer.state.clear()`` after a
    swap: without it, an optimizer keeps the moments of the old weights. With a different rank these have a different
    shape; with the same rank nothing shows it. PEFT's LoRA-FA has also read the old scalings, so make a new one.

    Parameters
    ----------
    model:
        A ``PeftModel``, a model with injected adapters, or either of them compiled.
    model_name_or_path:
        A folder with the new adapter, the id of a Hub repository, or an :class:`Adapter` read before.
    adapter_name:
        The name of the loaded adapter to replace, such as ``"default"``. It may be active, inactive or
        disabled, but not merged. Default: the only adapter in the model, or of several the one named ``"default"``.
    torch_device:
        The device to read the file to. Default: CPU; the tensors are copied to the model's devices anyway.
    add_layers:
        Whether layers that the loaded adapter lacks are added. Not possible in a compiled model.
    base_weights:
        The base model's own values by name, such as a copy of its ``state_dict()`` from before an adapter was loaded;
        weights that are not among them count as the base model's own. Only needed for the first swap, and only if PEFT
        overwrote weights of the base model when it loaded an adapter. It does that with all base weights in the
        adapter's file: biases with ``bias="all"`` or ``"lora_only"``, embeddings that the adapter is on (changed or
        not), embeddings of a vocabulary that was resized, and whatever else was saved there. The first two are
        refused without ``base_weights``; nothing in a model shows the others. Values that a swap overwrites are
        stored.
    **kwargs:
        ``key_mapping`` and ``allow_nonfinite`` of :meth:`Adapter.load`; ``subfolder``, ``revision``, ``token``,
        ``cache_dir`` and the other arguments of ``huggingface_hub.hf_hub_download``.

    Raises
    ------
    HotswapError
        If the swap is refused. The model is untouched then. The error is both a ``ValueError`` and a ``RuntimeError``.

    Examples
    --------
    >>> from hotswap_lab import demo, hotswap_adapter
    >>> model, tokenizer = demo.load("reverse")
    >>> demo.ask(model, tokenizer, "hotswap")
    'pawstoh'
    >>> hotswap_adapter(model, demo.adapter_path("pig_latin"), adapter_name="default")
    >>> demo.ask(model, tokenizer, "hotswap")
    'otswaphay'

    Notes
    -----
    Same call as ``peft.utils.hotswap.hotswap_adapter`` of PEFT 0.21, which this replaces.
    """
    if adapter_name is None:
        adapter_name = name_in(model, None)
    with refusals_logged(model, adapter_name, model_name_or_path):
        host = find_host(model, adapter_name)
        # while other threads compute, the swap may wait; a mapped file must not be kept that long
        adapter = _read(host, model_name_or_path, torch_device, kwargs, for_one_swap=not is_shared(host.base))
        with locked(host.base):
            slot = slot_for(METHODS, host, adapter_name)
            carry_out([make_plan(slot, adapter, passes=PASSES, add_layers=add_layers, base_weights=base_weights)])


def hotswap_adapter_from_state_dict(
    model: torch.nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    adapter_name: str,
    config: PeftConfig,
    parameter_prefix: str = "lora_",
    *,
    add_layers: bool = False,
    base_weights: Mapping[str, torch.Tensor] | None = None,
    allow_nonfinite: bool = False,
) -> None:
    """Replace a loaded adapter with tensors from memory, in place.

    Parameters
    ----------
    model:
        As in :func:`hotswap_adapter`.
    state_dict:
        ``lora_A`` of shape ``(rank, in_features)`` and ``lora_B`` of shape ``(out_features, rank)`` for each
        layer. Keys with or without the adapter's name, with or without ``base_model.model.``. It is only read. But if
        it is the dict that the model was loaded from without a copy (by diffusers, or with ``low_cpu_mem_usage=True``),
        its tensors are the model's own, and every swap writes to them, also where another model was loaded from it:
        clone them before the first swap.
    adapter_name:
        The name of the loaded adapter to replace.
    config:
        Gives rank, alpha and the patterns. The keys of ``state_dict`` decide which layers are targeted; if ``config``
        says otherwise, the model's copy of it is made to agree.
    parameter_prefix:
        Accepted because PEFT has it. Keys are matched exactly, so it is not needed.
    add_layers, base_weights:
        As in :func:`hotswap_adapter`.
    allow_nonfinite:
        Whether NaN and infinity are accepted.

    Raises
    ------
    HotswapError
        If the swap is refused. The model is untouched then.

    Examples
    --------
    >>> from hotswap_lab import Adapter, demo, hotswap_adapter_from_state_dict
    >>> model, tokenizer = demo.load("reverse")
    >>> new = Adapter.load(demo.adapter_path("caesar"))
    >>> hotswap_adapter_from_state_dict(model, new.tensors, "default", new.config)
    >>> demo.ask(model, tokenizer, "abc")
    'def'

    Notes
    -----
    Same call as ``peft.utils.hotswap.hotswap_adapter_from_state_dict`` of PEFT 0.21.
    """
    with refusals_logged(model, adapter_name, "a state dict"):
        host = find_host(model, adapter_name)
        adapter = Adapter.from_state_dict(state_dict, config, allow_nonfinite=allow_nonfinite)
        with locked(host.base):
            slot = slot_for(METHODS, host, adapter_name)
            how: dict[str, Any] = dict(check_targets=False, base_weights=base_weights)
            carry_out([make_plan(slot, adapter, passes=PASSES, add_layers=add_layers, **how)])


def plan_hotswap(
    model: torch.nn.Module,
    model_name_or_path: str | os.PathLike[str] | Adapter,
    adapter_name: str | None = None,
    torch_device: str | torch.device | None = None,
    *,
    add_layers: bool = False,
    base_weights: Mapping[str, torch.Tensor] | None = None,
    **kwargs: Any,
) -> Plan:
    """The dry run of :func:`hotswap_adapter`: a plan of what would be written, or why the swap would be refused.

    Takes the same arguments and never changes the model. A swap that can't be done is reported in
    ``Plan.refusals``; only files that can't be read at all, or an unknown adapter name, raise an error.

    Parameters
    ----------
    model, model_name_or_path, adapter_name, torch_device, add_layers, base_weights, **kwargs:
        As for :func:`hotswap_adapter`. The default of ``adapter_name`` is the only adapter in the model.

    Returns
    -------
    Plan
        Prints as a table, as text and in a notebook; ``commit(plan)`` carries it out.

    Raises
    ------
    HotswapError
        If the files can't be read or the model has no such adapter.

    Examples
    --------
    >>> from hotswap_lab import demo, plan_hotswap
    >>> model, _ = demo.load("caesar")
    >>> plan = plan_hotswap(model, demo.adapter_path("pig_latin"))
    >>> plan.ok
    False
    >>> print(plan.refusals[0].next_step)
    pass add_layers=True to add them, or load the adapter that targets the most layers first
    """
    adapter_name = name_in(model, adapter_name)
    host = find_host(model, adapter_name)
    adapter = _read(host, model_name_or_path, torch_device, kwargs)
    with locked(host.base) if any(map(changes_while_computing, host.configs.values())) else contextlib.nullcontext():
        slot = slot_for(METHODS, host, adapter_name)
        plan = make_plan(slot, adapter, passes=PASSES, add_layers=add_layers, base_weights=base_weights).kept()
    if any(parameter.requires_grad for parameter in slot.parameters):
        plan.notes.append(TRAINED)
    return plan


def _read(
    host: Host, source: Source, device: str | torch.device | None, arguments: dict[str, Any], for_one_swap: bool = False
) -> Adapter:
    if isinstance(source, Adapter):
        if arguments or device is not None:
            raise TypeError("arguments for reading an adapter were passed with an Adapter that is already read")
        return source
    # some transformers models bring a mapping from the keys of their older versions; a fresh load applies it
    arguments.setdefault("key_mapping", getattr(host.base, "_checkpoint_conversion_mapping", None) or None)
    return read(source, for_one_swap=for_one_swap, torch_device=device, **arguments)


# ---- carrying plans out


def commit(*plans: Plan) -> None:
    """Apply one or more plans atomically, such as one for each component of a pipeline.

    Parameters
    ----------
    *plans:
        Results of :func:`hotswap_lab.plan_hotswap`. Each was made for the model as it was then, so it is decided again
        now, and refused if the outcome differs.

    Raises
    ------
    HotswapError
        If a plan was refused. After any error, of this or another kind, every model is as it was.

    Examples
    --------
    >>> from hotswap_lab import commit, demo, plan_hotswap
    >>> model, tokenizer = demo.load("reverse")
    >>> commit(plan_hotswap(model, demo.adapter_path("caesar"), "default"))
    >>> demo.ask(model, tokenizer, "abc")
    'def'
    """
    for plan in plans:
        if not isinstance(plan, Plan):
            raise TypeError(f"commit() takes plans from plan_hotswap: got a {type(plan).__name__}")
    if not plans:
        return
    wanted = ", ".join(plan.adapter.source for plan in plans)
    with refusals_logged(plans[0].slot.host.root, plans[0].slot.adapter_name, wanted):
        for plan in plans:
            plan.raise_if_refused()
        with locked(*(plan.slot.host.base for plan in plans)):
            carry_out([_decided_again(plan) for plan in plans])


def _decided_again(plan: Plan) -> Plan:
    name = plan.slot.adapter_name
    slot = slot_for(METHODS, find_host(plan.slot.host.root, name), name)
    now = make_plan(
        slot,
        plan.adapter,
        passes=PASSES,
        add_layers=plan.add_layers,
        check_targets=plan.check_targets,
        base_weights=plan.base_weights,
    )
    if plan.first_answer not in (None, now.answer):
        changed = refusal("model_changed_since_plan", adapter_name=name, verdict=now.verdict)
        raise HotswapError(changed, *now.refusals)
    return now


def carry_out(plans: Sequence[Plan]) -> None:
    """Write plans that were just made. The caller has kept other threads out of the models since before that."""
    for plan in plans:
        plan.raise_if_refused()
        warn_of(plan)
    apply([plan.change() for plan in plans], log=lambda: log_event("swap", [plan.slot for plan in plans]))


@contextlib.contextmanager
def refusals_logged(model: Any, adapter_name: str | None, wanted: object = None) -> Iterator[None]:
    """Log the refusal that ends this block, with what is in the model, which is what was in it before."""
    try:
        yield
    except HotswapError as error:
        if "is_logged" not in vars(error):  # by a block inside of this one
            vars(error)["is_logged"], slot = True, None
            with contextlib.suppress(Exception):  # the model may have no such adapter
                slot = resolve_slot(model, name_in(model, adapter_name))
            log_event("refusal", [slot], error, wanted)
        raise


def warn_of(plan: Plan) -> None:
    """Show the warnings of a plan, each once for each model."""
    shown = _shown.setdefault(plan.slot.host.base, set())
    for text in [*plan.warnings, *([RECOMPILES] if plan.will_recompile else [])]:
        if text not in shown:
            shown.add(text)
            warnings.warn(f"{plan.title}: {text}. (Shown once for this model.)", stacklevel=4)


# ---- preparing


def prepare_model_for_compiled_hotswap(
    model: torch.nn.Module,
    *,
    target_rank: int | None = None,
    config: Config | Mapping[str, PeftConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
    adapters: Iterable[str | os.PathLike[str] | Adapter | PeftConfig] = (),
    adapter_name: str | None = None,
    **hub: Any,
) -> None:
    """Make a model ready for swaps that never recompile it. Call it after loading the first adapter, before compiling.

    The outputs stay the same up to rounding: the added zeros make sums longer. ``save_adapter`` and
    ``save_pretrained`` save the adapter with its own rank and scaling, as if nothing had been prepared. Two cases need
    ``save_adapter``: if an embedding is reserved, ``save_pretrained`` adds its base weight to the file of an adapter
    that is on another embedding; and with ``bias="all"``, it saves the bias of a layer that is off under a name that no
    fresh load uses. To reserve more rank, call it again before compiling again. After an error the model is unchanged.
    Make an optimizer only afterwards: the parameters stay the same objects but get other shapes.

    To train a prepared model, make the optimizer with ``foreach=True`` (``optim="adamw_torch"`` in a ``Trainer``): the
    parameters are views of one memory, which a fused optimizer can't write to. Its first step is refused. Adafactor and
    Muon also look at the zeros beyond the adapter's rank, so their steps differ from those in an unprepared model.
    FSDP2's ``fully_shard`` refuses such views: shard a model that isn't prepared. PyTorch's ``parameters_to_vector``
    fails on them: use ``torch.cat([p.reshape(-1) for p in parameters])``, and ``p.data.copy_`` to write back,
    because ``vector_to_parameters`` moves parameters out of that memory, after which a pool refuses to swap.

    The scaling of each layer becomes a buffer that is not part of ``state_dict()``. If the model is in shared memory
    (``model.share_memory()``, before or after), or is passed to a new process, then all processes that compute with it
    see a swap in one of them: its weights, ranks and scalings, but not its config, which stays as it was elsewhere.
    No lock holds another process back, so you must synchronize the processes yourself.

    Parameters
    ----------
    model:
        A model with at least one LoRA adapter. All of its LoRA adapters are prepared.
    target_rank:
        The rank to reserve in every layer: the highest of all adapters that will be swapped in.
    config:
        Configs whose ``r`` and ``rank_pattern`` are set to ``target_rank``, as PEFT does, for code that makes or
        compares further adapters with them. The live configs in ``model.peft_config`` describe the loaded adapter and
        are saved with it: these are never changed, even when they are passed here.
    check_compiled:
        What to do if the model is compiled already: ``"error"``, ``"warn"`` or ``"ignore"``.
    adapters:
        The family: folders, Hub ids, :class:`Adapter` objects or configs. Each layer reserves the highest rank in
        the family, and layers that the loaded adapter lacks are reserved, so that any of these adapters can be swapped
        in, in any order. For folders and Hub ids, only the configs are read.
    adapter_name:
        The name of the only adapter to prepare. Default: all that can be prepared.
    **hub:
        ``subfolder``, ``revision``, ``token`` and the other arguments of ``huggingface_hub.hf_hub_download``.

    Raises
    ------
    HotswapError
        If the model is compiled already, has no LoRA adapter, or can't be prepared for these ranks and layers.

    Examples
    --------
    >>> from hotswap_lab import demo, hotswap_adapter, prepare_model_for_compiled_hotswap
    >>> model, tokenizer = demo.load("caesar")                     # adapts the MLP only
    >>> family = [demo.adapter_path(name) for name in demo.adapter_names()]
    >>> prepare_model_for_compiled_hotswap(model, adapters=family)
    >>> hotswap_adapter(model, demo.adapter_path("pig_latin"), "default")   # adapts the attention only
    >>> demo.ask(model, tokenizer, "hotswap")
    'otswaphay'

    Notes
    -----
    Same call as ``peft.utils.hotswap.prepare_model_for_compiled_hotswap`` of PEFT 0.21, with its errors and
    warnings; ``adapters`` and ``adapter_name`` are new here.
    """
    # PEFT's wording
    found = "prepare_model_for_compiled_hotswap was called with a model that is already compiled, or has compiled parts"
    with refusals_logged(model, adapter_name):
        bases = [host.base for host in carriers(model)]
        check_not_compiled(model, check_compiled, found)
        family = [read(source, only_config=True, **hub) for source in as_list(adapters)]
        with locked(*bases):
            changes = changes_to_prepare(METHODS, model, family, target_rank=target_rank, adapter_name=adapter_name)
            if config and target_rank is not None:
                configs = config.values() if isinstance(config, Mapping) else [config]
                changes[0].steps.append(functools.partial(raise_ranks, model, configs, target_rank))
            apply(changes, log=lambda: log_event("prepare", slots_to_prepare(METHODS, model, adapter_name)))


# ---- around a swap


def resolve_slot(model: torch.nn.Module, adapter_name: str) -> Slot:
    """Find everything in ``model`` that belongs to the adapter called ``adapter_name``.

    Parameters
    ----------
    model:
        A PEFT model, compiled or not, or a module that contains one.
    adapter_name:
        The name under which the adapter was loaded.

    Returns
    -------
    Slot

    Raises
    ------
    HotswapError
        If there is no such adapter, or several.

    Examples
    --------
    >>> from hotswap_lab import demo, resolve_slot
    >>> model, _ = demo.load("caesar")
    >>> slot = resolve_slot(model, "default")
    >>> len(slot.layers), slot.layers[0].path
    (12, 'model.layers.0.mlp.gate_proj')
    """
    return slot_in(METHODS, find_host(model, adapter_name), adapter_name)


def set_strength(model: torch.nn.Module, strength: float, adapter_name: str | None = None) -> None:
    """Set how strongly an adapter acts: its trained scaling times ``strength``, in every layer.

    Strengths don't add up: each call starts from the trained scaling. A swap sets the strength back to 1. It is
    never saved. A prepared model is never recompiled by this.

    Parameters
    ----------
    model:
        A model with the adapter, compiled or not.
    strength:
        0 gives the base model's output, 1 the adapter as it was trained; anything between, beyond or below is possible.
    adapter_name:
        The adapter's name in the model. It must not be merged. Default: the only adapter in the model.

    Raises
    ------
    HotswapError
        If there is no such adapter, it is merged, the strength is not a finite number, or the adapter is more than
        LoRA: a DoRA magnitude, a saved module, trained tokens or biases would stay at full strength.

    Examples
    --------
    >>> from hotswap_lab import demo, set_strength
    >>> model, tokenizer = demo.load("reverse")
    >>> set_strength(model, 0)
    >>> demo.ask(model, tokenizer, "hotswap")      # the base model copies
    'hotswap'
    >>> set_strength(model, 1)
    >>> demo.ask(model, tokenizer, "hotswap")
    'pawstoh'
    """
    adapter_name = name_in(model, adapter_name)
    with refusals_logged(model, adapter_name), locked((host := find_host(model, adapter_name)).base):
        slot = slot_for(METHODS, host, adapter_name)
        apply([change_strength(slot, strength)], log=lambda: log_event("strength", [slot]))


def get_strength(model: torch.nn.Module, adapter_name: str | None = None) -> float:
    """Return the strength that :func:`set_strength`, or PEFT's ``set_scale`` and ``scale_layer``, gave to an adapter.

    Raises
    ------
    HotswapError
        If there is no such adapter, or its layers have different strengths.

    Examples
    --------
    >>> from hotswap_lab import demo, get_strength, set_strength
    >>> model, _ = demo.load("reverse")
    >>> set_strength(model, 0.25)
    >>> get_strength(model)
    0.25
    """
    adapter_name = name_in(model, adapter_name)
    return strength_of(slot_for(METHODS, find_host(model, adapter_name), adapter_name))


def loaded(model: object) -> LoadedList:
    """List the adapters in a model now: a :class:`~hotswap_lab.core.loaded.Loaded` for each.

    Parameters
    ----------
    model:
        A model with adapters, compiled or not, or an object that has such models as attributes: an
        :class:`~hotswap_lab.AdapterPool`, a diffusers pipeline.

    Returns
    -------
    list
        Prints as one line for each adapter, and as a table in a notebook. Each has ``adapter_name``, ``method``,
        ``ranks``, ``strength``, ``source``, ``revision``, ``when`` and, in a pool, ``member``, ``mix`` or ``rows``;
        ``note``, if it was made for another base model; ``sha256``, which reads the adapter's file when it is asked
        for; and ``as_dict()``. A source is named only if its weights are those in the model: they are compared with its
        file, which takes as long as reading it, or with what a pool has packed. It is ``"unknown"`` after training or
        PEFT's ``load_adapter``, and if the file is gone; then ``note`` names the source of the last swap.

    Examples
    --------
    >>> from hotswap_lab import demo, hotswap_adapter, loaded
    >>> model, _ = demo.load("reverse")
    >>> loaded(model)  # PEFT doesn't note where it loaded an adapter from
    default: LORA of rank 8, strength 1, from unknown, since -
    >>> hotswap_adapter(model, demo.adapter_path("sort"))
    >>> now = loaded(model)[0]
    >>> now.ranks, now.source == demo.adapter_path("sort"), len(now.sha256)
    ((6, 16, 24), True, 64)

    Notes
    -----
    If other threads swap, call it inside of ``with in_use(model):``; it shows a swap half done otherwise.
    A swap notes only a source and a time, on the adapter's config in the model, and never in a file. Each swap,
    refusal and preparation is also a record of ``logging.getLogger("hotswap_lab")`` with the same fields as attributes,
    and ``event`` and ``error``: swaps at level INFO, refusals at WARNING. So a handler is a history.
    """
    return LoadedList(loaded_of(slot_for(METHODS, host, name)) for host in hosts_in(model) for name in host.configs)


def save_adapter(model: torch.nn.Module, folder: str | os.PathLike[str], adapter_name: str | None = None) -> None:
    """Save one adapter to a folder, with the same files as after a fresh load.

    Layers that are turned off and the padding of a prepared model are left out. Both files are written next to those of
    an older adapter and then replace them: after an error the folder has the old adapter. Other files in the folder are
    left alone. Threads and processes that save to one folder wait for one another, and :meth:`Adapter.load` reads
    no mixture of two; on a file system without locks, processes are not kept apart.

    Parameters
    ----------
    model:
        A model with the adapter, compiled or not.
    folder:
        The folder for ``adapter_config.json`` and ``adapter_model.safetensors``. Created if it doesn't exist.
    adapter_name:
        The adapter to save. Default: the only one in the model.

    Raises
    ------
    HotswapError
        If the model has no such adapter, if other code has written to its padding (in a prepared model), if the file
        would contain base weights that an adapter is merged into, if some of the adapter isn't in the model, if rows of
        a batch may have different adapters, if the folder has a folder or a pipe in the place of one of the two files,
        or if other processes save there for ten seconds.

    Examples
    --------
    >>> import tempfile
    >>> from hotswap_lab import demo, hotswap_adapter, save_adapter, verify_hotswap
    >>> model, _ = demo.load("reverse")
    >>> hotswap_adapter(model, demo.adapter_path("double"), "default")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_adapter(model, folder)
    ...     bool(verify_hotswap(model, folder))
    True

    Notes
    -----
    The format is that of ``PeftModel.save_pretrained``, which also works and leaves out the same layers. This function
    also takes models that aren't a ``PeftModel``, and never mixes several adapters in one folder.
    """
    check_folder(Path(folder))
    adapter_name = name_in(model, adapter_name)
    resolve_slot(model, adapter_name)  # raises if there is no such adapter
    with in_use(model):
        config, tensors = files_of(resolve_slot(model, adapter_name))  # again: in_use may have waited for a swap
    save(Path(folder), config, tensors)
