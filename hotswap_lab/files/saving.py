"""Saving a swapped adapter as ``save_pretrained`` would after a fresh load, all or nothing."""

import contextlib
import copy
import errno
import os
import secrets
import shutil
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftType
from peft.tuners.adaption_prompt import AdaptionPromptModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, AuxiliaryTrainingWrapper, get_peft_model_state_dict
from safetensors.torch import save_file

from ..core.compiled import COMPILED
from ..core.errors import refused
from ..core.journal import interrupts_held
from ..core.lora import is_targeted
from ..core.prepared import is_marked_off, is_off
from ..core.slot import Slot, room_of
from ..core.state_dict_hooks import strange_padding
from ..core.wrappers import EMBEDDINGS, has_adapter, inside, is_table, is_wrapper
from .sources import LOCK

try:
    import fcntl
except ImportError:  # on Windows
    fcntl: Any = None

#: the attributes of wrappers that have the wrapped module
INSIDE = ("base_layer", "original_module")

#: held while files are replaced, for threads that save to one folder
_replacing = threading.Lock()
#: how many seconds to wait for another process that saves to the folder: it replaces its files in milliseconds
PATIENCE = 10.0


def files_of(slot: Slot) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
    """Return the config and the tensors that ``PeftModel.save_pretrained`` would write after a fresh load.

    Refuses an adapter that would not be the one in the model.
    """
    config, tensors = copy.deepcopy(slot.config), saved_tensors(slot, embeddings=True)
    check_saved(slot, tensors)
    _check_targets(slot)
    config.inference_mode = True
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = slot.host.base.__dict__.get("name_or_path") or None
    if config.task_type is None:
        base_class = type(slot.host.base)
        config.auto_mapping = {"base_model_class": base_class.__name__, "parent_library": base_class.__module__}
    return config, tensors


def check_saved(slot: Slot, tensors: dict[str, torch.Tensor]) -> None:
    """Refuse tensors that were read from a model to be saved if they differ from the adapter in it."""
    if (room := room_of(slot.host.base, slot.adapter_name)) and room.assigned:
        raise refused("rows_differ", adapter_name=slot.adapter_name)
    for layer in slot.layers:
        for tensor in layer.tensors:
            of_lora = layer.tensors if slot.method.is_lora else ()
            if reason := strange_padding(layer.module, slot.adapter_name, tensor, of_lora):
                raise refused("saved_with_padding", adapter_name=slot.adapter_name, reason=reason)
    # merging LN tuning swaps its module and the base model's
    with_base = slot.config.peft_type == PeftType.LN_TUNING or any(".base_layer." in key for key in tensors)
    tuners = (module for module in slot.host.base.modules() if isinstance(module, BaseTunerLayer))
    if with_base and (merged := {name for module in tuners for name in module.merged_adapters}):
        raise refused("saved_with_merged", adapter_name=slot.adapter_name, merged=", ".join(sorted(merged)))


def _check_targets(slot: Slot) -> None:
    """Refuse an adapter with weights on a layer that was off and that its config lacks: a fresh load ignores them."""
    name = slot.adapter_name
    for layer in slot.layers if slot.method.is_lora else ():
        is_filled = is_marked_off(layer.module, name) and not is_off(layer.module, name, layer.tensors)
        if is_filled and not is_targeted(slot.config, layer.path):
            targets = slot.config.target_modules
            raise refused("saved_not_targeted", path=layer.path, adapter_name=name, target_modules=targets)


# ---- the tensors that PEFT would write


def saved_tensors(slot: Slot, *, embeddings: bool = False) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors by the keys of its file, copied to the CPU, without layers that are off.

    ``embeddings`` includes the weights of embeddings that have the adapter, as ``save_pretrained`` does.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns if it finds no embeddings, as in a model that has none
        alone, name = LoadedAlone(slot), slot.adapter_name
        embeddings = "auto" if embeddings else False
        tensors = get_peft_model_state_dict(alone, adapter_name=name, save_embedding_layers=embeddings)
    # PEFT takes these from the layers, for all adapters, so those of the others are removed here
    strange = tuple(f".shira_indices.{other}" for other in slot.host.configs if other != name)
    own = {key: tensor.detach() for key, tensor in tensors.items() if not key.endswith(strange)}
    # one at a time, because the whole of all may need more memory than this device has
    return {key: _whole(tensor).cpu().clone(memory_format=torch.contiguous_format) for key, tensor in own.items()}


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a tensor from the processes that it is spread over. All of them have to call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class LoadedAlone:
    """A view of a model for PEFT's saving, with the names that modules have after a fresh load of one adapter.

    PEFT's saving uses the live names. But these have another beginning if the model isn't a ``PeftModel``, and extra
    levels if modules are compiled or wrapped for other adapters. It also leaves out tensors with another adapter's name
    anywhere in their own.
    """

    #: tells PEFT that the model isn't spread over processes: otherwise it would gather all of its weights
    _tp_plan = _tp_size = None

    def __init__(self, slot: Slot):
        host, adapter_name = slot.host, slot.adapter_name
        config = copy.copy(slot.config)
        config.base_model_name_or_path = None  # otherwise PEFT asks the Hub whether the vocabulary has grown
        self.peft_config: dict[str, PeftConfig] = {adapter_name: config}
        self._carrier, self._adapter_name, self._method = host.carrier, adapter_name, slot.method
        self._others = host.configs.keys() - {adapter_name}
        is_tuner = isinstance(host.carrier, (BaseTuner, AdaptionPromptModel))
        self._start = [] if host.is_peft_model else ["base_model"] if is_tuner else ["base_model", "model"]

    def __getattr__(self, attribute: str) -> object:
        value = getattr(self._carrier, attribute)
        # PEFT saves the weights of wrapped embeddings
        return (lambda: self._as_loaded(value())) if attribute in EMBEDDINGS else value

    def _as_loaded(self, module: torch.nn.Module | None) -> torch.nn.Module | None:
        """Return a module without the wrappers that a fresh load would not make."""
        while self._is_missing(module):
            module = inside(module)
        return module

    def state_dict(self) -> dict[str, torch.Tensor]:
        named = ((self._fresh_name(key), tensor) for key, tensor in self._carrier.state_dict().items())
        return {name: tensor for name, tensor in named if name is not None}

    def named_modules(self) -> Iterator[tuple[str, torch.nn.Module]]:
        for path, module in self._carrier.named_modules():
            if isinstance(module, AuxiliaryTrainingWrapper) and not has_adapter(module, self._adapter_name):
                continue  # PEFT 0.21 expects trained tokens of this adapter wherever another adapter has some
            if (name := self._fresh_name(path)) is not None:
                yield name, module

    def _fresh_name(self, live_name: str) -> str | None:
        """Return the name after a fresh load; None for a module or tensor of another adapter."""
        parts = list(self._start)
        owner, module = None, self._carrier
        for part in live_name.split(".") if live_name else ():
            of_peft = is_wrapper(owner) or (isinstance(owner, BaseTuner) and module is not owner.model)
            if part in self._others and of_peft and is_table(module):
                return None
            if part != COMPILED and not (part in INSIDE and self._is_missing(module)):
                parts.append(part)
            owner, module = module, None if module is None else module._modules.get(part)
        return ".".join(parts)

    def _is_missing(self, module: torch.nn.Module | None) -> bool:
        """Whether the module is a wrapper that is not in a fresh load."""
        if not is_wrapper(module):
            return False
        if not has_adapter(module, self._adapter_name):
            return True
        return is_off(module, self._adapter_name, self._method.tensors_of(module, self._adapter_name) or ())


# ---- the two files


def write_adapter(folder: str | os.PathLike[str], config: PeftConfig, tensors: dict[str, torch.Tensor]) -> None:
    """Write config and tensors to a folder that no other process reads yet."""
    save_file(tensors, Path(folder, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
    config.save_pretrained(folder)


def check_folder(folder: Path) -> None:
    """Refuse a path where a file is in the place of a folder, or something else in the place of a file."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise refused("not_a_folder", folder=folder, file=path)
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if (folder / name).exists() and not (folder / name).is_file():
            raise refused("not_a_file", folder=folder, name=name)


def save(folder: Path, config: PeftConfig, tensors: dict[str, torch.Tensor]) -> None:
    """Write the adapter next to an older one in the same folder, then replace that one."""
    temporary, lock = folder / f".hotswap-save-{secrets.token_hex(4)}", folder / LOCK
    new, old = temporary / "new", temporary / "old"
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    # so that Ctrl-C leaves no temporary files behind
    with interrupts_held(), _cleaned_up(temporary, lock, created) as opened:
        new.mkdir(parents=True)
        old.mkdir()
        write_adapter(new, config, tensors)
        with _replacing:
            end = time.monotonic() + PATIENCE
            while not _is_locked(lock, opened):
                if time.monotonic() > end:
                    raise refused("being_saved", folder=folder, lock=lock, seconds=PATIENCE)
                time.sleep(0.01)
            check_folder(folder)
            _replace_files(folder, new, old)


@contextlib.contextmanager
def _cleaned_up(temporary: Path, lock: Path, created: list[Path]) -> Iterator[contextlib.ExitStack]:
    """Remove temporary files after a block, the lock file, which the block may open in a stack, and empty folders."""
    try:
        with contextlib.ExitStack() as opened:
            yield opened
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        # another process may have locked it since, and removes it then
        with contextlib.suppress(OSError), contextlib.ExitStack() as opened:
            if _is_locked(lock, opened):
                lock.unlink()
        for path in created:
            with contextlib.suppress(OSError):  # the folder is not empty
                path.rmdir()


def _is_locked(path: Path, opened: contextlib.ExitStack) -> bool:
    """Lock a file until ``opened`` is closed or the process ends, unless another process has it.

    filelock can't be used here: it doesn't report that another process removed the file that it has locked.
    """
    try:
        if fcntl is None:  # on Windows, where the system removes the file when it is closed
            opened.enter_context(os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_TEMPORARY)))
            return True
        file = opened.enter_context(path.open("ab"))
    except (FileExistsError, PermissionError):
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError as error:  # others: a file system without locks, where processes are not kept apart
        is_ours = error.errno not in (errno.EAGAIN, errno.EACCES, errno.ENOENT)
    if not is_ours:
        file.close()
    return is_ours


def _replace_files(folder: Path, new: Path, old: Path) -> None:
    """Move the old files out before the new ones are moved in, so a killed process leaves no mixture of both."""
    names = os.listdir(new)
    try:
        for name in names:
            if os.path.lexists(folder / name):
                os.replace(folder / name, old / name)
        for name in names:
            os.replace(new / name, folder / name)
    except BaseException:
        for name in names:
            if os.path.lexists(old / name):
                os.replace(old / name, folder / name)
            elif not os.path.lexists(new / name):
                (folder / name).unlink()
        raise
