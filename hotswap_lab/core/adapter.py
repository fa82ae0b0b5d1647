"""Adapter: what comes in. A config and named tensors, read and checked once, knowing nothing of a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.save_and_load import load_peft_weights

from ..files.hub import commit_of, folder_with_config, folder_with_weights, hub_arguments
from ..files.paths import is_folder, is_there
from .errors import HotswapError, listing, refuse
from .weights_file import check_archive, check_file, in_one_piece, read_weights

#: how deep a config's values may be nested; PEFT writes three levels at most, and Python can't copy hundreds
MAX_DEPTH = 20
#: torch sums up to this many numbers in the thread that asks for it
GRAIN = 32768
#: how many numbers are looked at without other threads
FOR_ONE_THREAD = 16 * GRAIN


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter in memory: its config and its tensors by the names of its file.

    Make one with :meth:`load` or :meth:`from_state_dict`; both check it.

    Parameters
    ----------
    config:
        What ``adapter_config.json`` says.
    tensors:
        Keys as in the file, such as ``base_model.model.<layer>.lora_A.weight`` of shape ``(rank, in_features)``.
    source:
        Where it came from, for messages.
    revision:
        The commit of the Hub repository that it was read from. None if it came from elsewhere.
    """

    config: PeftConfig
    tensors: Mapping[str, torch.Tensor]
    source: str
    revision: str | None = None

    @classmethod
    def load(
        cls,
        source: str | os.PathLike,
        *,
        torch_device: str | torch.device | None = None,
        key_mapping: dict[str, str] | None = None,
        allow_nonfinite: bool = False,
        **hub: object,
    ) -> Adapter:
        """Reads an adapter from a folder or from the Hugging Face Hub.

        ``adapter_model.safetensors`` is preferred; ``adapter_model.bin`` is read with ``weights_only=True``, so
        nothing in it is executed. The tensors are copies: whatever happens to the files later does not reach them.

        Parameters
        ----------
        source:
            A folder with ``adapter_config.json``, or the id of a Hub repository.
        torch_device:
            The device to read the tensors to. Default: CPU.
        key_mapping:
            Regular expressions and replacements for keys, as in ``PeftModel.from_pretrained``.
        allow_nonfinite:
            Whether NaN and infinity among the weights are let through.
        **hub:
            ``subfolder``, ``revision``, ``token``, ``cache_dir`` and what else ``hf_hub_download`` takes.

        Raises
        ------
        HotswapError
            If the files can't be found or read, or are damaged.

        Examples
        --------
        >>> from hotswap_lab import demo
        >>> adapter = Adapter.load(demo.adapter_path("double"))
        >>> adapter.config.r, len(adapter.tensors)
        (2, 32)
        """
        return cls._load(source, torch_device, key_mapping, allow_nonfinite, hub, mapped=False)

    @classmethod
    def load_for_one_swap(
        cls,
        source: str | os.PathLike,
        *,
        torch_device: str | torch.device | None = None,
        key_mapping: dict[str, str] | None = None,
        allow_nonfinite: bool = False,
        **hub: object,
    ) -> Adapter:
        """:meth:`load`, faster, for an adapter that is let go of at once: its tensors may be the file itself."""
        return cls._load(source, torch_device, key_mapping, allow_nonfinite, hub, mapped=True)

    @classmethod
    def _load(cls, source, torch_device, key_mapping, allow_nonfinite: bool, hub: dict, mapped: bool) -> Adapter:
        hub = hub_arguments("Adapter.load", hub)
        source = _as_path(source)
        folder = _find_config(source, hub)
        config = _read_config(source, folder)
        tensors = _read_tensors(source, _find_weights(source, folder, hub), torch_device or "cpu", key_mapping, mapped)
        adapter = cls(config, tensors, source, None if is_folder(source) else commit_of(folder, hub))
        adapter._check_tensors(allow_nonfinite)
        return adapter

    @classmethod
    def from_state_dict(
        cls, state_dict: Mapping[str, torch.Tensor], config: PeftConfig, *, allow_nonfinite: bool = False
    ) -> Adapter:
        """Takes an adapter from memory. The tensors are only read, never kept in the model or changed.

        Keys may hold the adapter's name (``lora_A.default.weight``) or not (``lora_A.weight``), and may start
        with ``base_model.model.`` or not.

        Examples
        --------
        >>> import torch
        >>> from peft import LoraConfig
        >>> tensors = {"lin.lora_A.weight": torch.ones(2, 3), "lin.lora_B.weight": torch.ones(4, 2)}
        >>> len(Adapter.from_state_dict(tensors, LoraConfig(r=2, target_modules=["lin"])).tensors)
        2
        """
        if not isinstance(config, PeftConfig):
            raise refuse(
                "The adapter's config is missing.",
                found=f"config={config!r}",
                expected="a PeftConfig such as LoraConfig: it gives the rank and the scaling of each layer",
                next_step="pass the config the adapter was trained with",
            )
        adapter = cls(config, dict(state_dict), "a state dict")
        adapter._check_tensors(allow_nonfinite)
        return adapter

    @property
    def label(self) -> str:
        """A short name for tables: the last part of a folder's path, a Hub id as it is."""
        return os.path.basename(os.path.normpath(self.source)) if os.path.isdir(self.source) else self.source

    @property
    def nbytes(self) -> int:
        """The size of all tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def _check_tensors(self, allow_nonfinite: bool) -> None:
        # some methods save indices, too
        only_weights = self.config.peft_type == PeftType.LORA
        for key, tensor in self.tensors.items():
            plain = type(key) is str and type(tensor) is torch.Tensor and tensor.is_floating_point()
            if plain and tensor.layout is torch.strided and not (tensor.is_meta or tensor.is_nested):
                continue
            if not isinstance(key, str):
                raise self._damaged(f"a {type(key).__name__} as the name of a tensor", "names of tensors")
            if kind := _what_is_wrong(tensor, only_weights and ".lora_" in key):
                raise self._damaged(f"{kind} under {key!r}", "a floating point tensor under each key")
        if not self.tensors:
            raise self._damaged("no tensors at all", "at least one lora_A and one lora_B")
        if not allow_nonfinite and (bad := self._nonfinite_keys()):
            raise self._damaged(
                f"NaN or infinity in {listing(map(repr, bad))}",
                "finite weights",
                "get an undamaged copy, or pass allow_nonfinite=True to Adapter.load if it is meant to be so",
            )

    def _nonfinite_keys(self) -> list[str]:
        # NaN and infinity make a sum NaN or infinite: one fast pass over all of them. So may very large weights,
        # hence the second, exact look at whatever is suspicious.
        keys = [key for key, tensor in self.tensors.items() if tensor.numel() and tensor.is_floating_point()]
        tensors = [each.detach() if each.requires_grad else each for each in map(self.tensors.get, keys)]
        if not tensors:
            return []
        whole = in_one_piece(tensors) if tensors[0].dtype.itemsize > 1 else None
        if whole is not None and _has_finite_sum(whole):
            return []
        sums = [_exact(tensor).sum(dtype=_sum_dtype(tensor)) for tensor in tensors]
        finite = torch.stack([each.to("cpu", torch.float64) for each in sums]).isfinite().tolist()
        return [
            key
            for key, tensor, good in zip(keys, tensors, finite, strict=True)
            if not good and not _exact(tensor).isfinite().all()
        ]

    def _damaged(self, found: str, expected: str, next_step: str = "get an undamaged copy of it") -> HotswapError:
        return refuse(f"The adapter from {self.source} is damaged.", found, expected, next_step)


def find_folder(source: str | os.PathLike) -> str:
    """The folder on this machine that has an adapter's config and weights; from the Hub they are downloaded.

    >>> from hotswap_lab import demo
    >>> os.path.samefile(find_folder(demo.adapter_path("double")), demo.adapter_path("double"))
    True
    """
    source = _as_path(source)
    return _find_weights(source, _find_config(source, {}), {})


def load_config(source: str | os.PathLike, **hub: object) -> PeftConfig:
    """The config of the adapter in a folder or Hub repository, without its weights.

    >>> from hotswap_lab import demo
    >>> load_config(demo.adapter_path("double")).r
    2
    """
    source = _as_path(source)
    return _read_config(source, _find_config(source, hub_arguments("load_config", hub)))


def _as_path(source: object) -> str:
    if not isinstance(source, (str, os.PathLike)):
        raise refuse(
            "There is no adapter to read.",
            found=f"a {type(source).__name__}: {source!r}"[:200],
            expected="a folder with an adapter, or the id of a Hub repository with one",
            next_step="pass one of these as a string or a path",
        )
    return os.fspath(source)


def _what_is_wrong(tensor: object, only_weights: bool) -> str | None:
    """What stands where a plain tensor should; None if one does."""
    if not isinstance(tensor, torch.Tensor):
        return type(tensor).__name__
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
        return f"a tensor in the form {tensor.layout if tensor.layout != torch.strided else tensor.dtype}"
    if tensor.is_meta:
        return "a tensor without data (on the meta device)"
    if only_weights and not tensor.is_floating_point():
        return str(tensor.dtype)
    return None


def _has_finite_sum(whole: torch.Tensor) -> bool:
    if whole.numel() > FOR_ONE_THREAD or torch.get_num_threads() == 1:
        return bool(whole.sum(dtype=_sum_dtype(whole)).isfinite())
    # waking torch's other threads takes longer than these sums do, and milliseconds where the machine is busy
    sums = [piece.sum(dtype=_sum_dtype(piece)) for piece in whole.split(GRAIN)]
    return bool(torch.stack(sums).sum().isfinite())


def _sum_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in a precision that reductions are implemented for: 8-bit floats have none."""
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor


def _find_config(source: str, hub: dict) -> str:
    try:
        return folder_with_config(source, hub)
    except Exception as error:  # of many kinds: no such file or repository, no access, no network, no space, ...
        raise _not_found(
            f"Can't find 'adapter_config.json' at '{source}'",
            error,
            expected="a folder with an adapter, or the id of a Hub repository with one",
            next_step="check the path, the id, `subfolder`, `revision` and `token`",
        ) from error


def _find_weights(source: str, folder: str, hub: dict) -> str:
    try:
        return folder_with_weights(source, folder, hub)
    except Exception as error:
        raise _not_found(
            f"Can't find weights for {source}",
            error,
            expected="adapter_model.safetensors or adapter_model.bin beside adapter_config.json",
            next_step="check the folder or repository, and get a complete copy of it",
        ) from error


def _not_found(summary: str, error: Exception, expected: str, next_step: str) -> HotswapError:
    # huggingface_hub speaks of the cache there, and has the reason in the cause
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    if constants.HF_HUB_OFFLINE and isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        next_step = "unset HF_HUB_OFFLINE and start anew, so that it can be downloaded, or pass a folder that has it"
    return refuse(summary, f"{type(cause).__name__}: {_first_line(cause)}", expected, next_step)


def _read_config(source: str, folder: str) -> PeftConfig:
    try:
        peft_type = PeftConfig._get_peft_type(folder)
        if peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
            raise refuse(
                f"The adapter from {source} is of an unknown kind.",
                found=f"peft_type={peft_type!r}",
                expected="a PEFT type that the installed version of PEFT knows",
                next_step="upgrade PEFT, or get an undamaged copy of adapter_config.json",
            )
        config = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type].from_pretrained(folder)
        if (depth := _depth(vars(config))) > MAX_DEPTH:
            raise ValueError(f"lists or tables within one another, {depth} deep")
        return config
    except HotswapError:
        raise
    except Exception as error:  # of any kind: PEFT takes a config from a file without looking at it
        raise refuse(
            f"The adapter_config.json of {source} can't be read.",
            found=f"{type(error).__name__}: {error}",
            expected="a JSON object as PEFT writes it",
            next_step="get an undamaged copy of it",
        ) from error


def _depth(value: object) -> int:
    """How deep lists and tables lie within one another."""
    depth, level = 0, [value]
    while level:
        level = [
            inner
            for each in level
            if isinstance(each, (dict, list, tuple, set))
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        depth += 1
    return depth


def _read_tensors(
    source: str, folder: str, device: str | torch.device, key_mapping, mapped: bool
) -> dict[str, torch.Tensor]:
    try:
        path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
        if is_there(path):
            return _read_safetensors(folder, path, device, key_mapping, mapped)
        return _read_bin(folder, os.path.join(folder, WEIGHTS_NAME), device, key_mapping)
    except Exception as error:  # of any kind: a damaged file leads its readers astray
        raise refuse(
            f"The weights of {source} can't be read.",
            found=f"{type(error).__name__}: {_first_line(error)}",
            expected="adapter_model.safetensors, or adapter_model.bin with nothing in it but tensors",
            next_step="get an undamaged copy; convert a .bin with other objects in it to safetensors",
        ) from error


def _read_safetensors(
    folder: str, path: str, device: str | torch.device, key_mapping, mapped: bool
) -> dict[str, torch.Tensor]:
    """What ``load_peft_weights`` gives, read faster where that is possible."""
    check_file(path)
    on_cpu = torch.device(device).type == "cpu"
    if not key_mapping and on_cpu and (tensors := read_weights(path, mapped=mapped)) is not None:
        return tensors
    tensors = load_peft_weights(folder, device=device, key_mapping=key_mapping)
    return tensors if mapped or not on_cpu else {key: tensor.clone() for key, tensor in tensors.items()}


def _read_bin(folder: str, path: str, device: str | torch.device, key_mapping) -> dict[str, torch.Tensor]:
    check_file(path)
    check_archive(path)
    tensors = load_peft_weights(folder, device=device, key_mapping=key_mapping)
    if not isinstance(tensors, Mapping):
        raise TypeError(f"a {type(tensors).__name__}, and no table of tensors")
    size = os.path.getsize(path)
    for key, tensor in tensors.items():
        # a tensor may say that its few bytes are repeated, as often as it likes
        if isinstance(tensor, torch.Tensor) and tensor.numel() * tensor.itemsize > size:
            raise ValueError(f"{key!r} of shape {tuple(tensor.shape)} in a file of {size:,} bytes")
    return dict(tensors)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
