"""Adapter: what comes in. A config and named tensors, read and checked once, knowing nothing of a model."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.save_and_load import load_peft_weights
from safetensors import SafetensorError

from .errors import HotswapError, listing, refuse
from .weights_file import in_one_piece, read_weights

#: what a caller may pass on to huggingface_hub; the first two arguments, repository and file name, are ours
HUB_ARGUMENTS = (*list(inspect.signature(hf_hub_download).parameters)[2:], "use_auth_token")


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
    """

    config: PeftConfig
    tensors: Mapping[str, torch.Tensor]
    source: str

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
        nothing in it is executed. The tensors are views of the file where that is possible, as safetensors does it:
        don't write into a file that is in use, replace it.

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
        hub = _hub_arguments("Adapter.load", hub)
        source = os.fspath(source)
        config = _read_config(source, hub)
        tensors = _read_tensors(source, torch_device or "cpu", key_mapping, hub)
        adapter = cls(config, tensors, source)
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
        wrong = [
            key
            for key, tensor in self.tensors.items()
            if not (isinstance(tensor, torch.Tensor) and (tensor.is_floating_point() or not only_weights))
        ]
        if wrong:
            key = wrong[0]
            value = self.tensors[key]
            kind = str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__
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
        tensors = [self.tensors[key].detach() for key in keys]
        whole = in_one_piece(tensors) if tensors and tensors[0].dtype.itemsize > 1 else None
        if whole is not None and whole.sum(dtype=_sum_dtype(whole)).isfinite():
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


def load_config(source: str | os.PathLike, **hub: object) -> PeftConfig:
    """The config of the adapter in a folder or Hub repository, without its weights.

    >>> from hotswap_lab import demo
    >>> load_config(demo.adapter_path("double")).r
    2
    """
    return _read_config(os.fspath(source), _hub_arguments("load_config", hub))


def _hub_arguments(function: str, arguments: Mapping[str, object]) -> dict[str, object]:
    if unknown := sorted(set(arguments) - set(HUB_ARGUMENTS)):
        raise TypeError(f"{function}() got unexpected keyword arguments: {', '.join(unknown)}")
    return {key: value for key, value in arguments.items() if value is not None}


def _sum_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in a precision that reductions are implemented for: 8-bit floats have none."""
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor


def _read_config(source: str, hub: dict) -> PeftConfig:
    try:
        peft_type = PeftConfig._get_peft_type(source, **hub)
        if peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
            raise refuse(
                f"The adapter from {source} is of an unknown kind.",
                found=f"peft_type={peft_type!r}",
                expected="a PEFT type that the installed version of PEFT knows",
                next_step="upgrade PEFT, or get an undamaged copy of adapter_config.json",
            )
        return PEFT_TYPE_TO_CONFIG_MAPPING[peft_type].from_pretrained(source, **hub)
    except HotswapError:
        raise
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError, AttributeError) as error:
        raise refuse(
            f"The adapter_config.json of {source} can't be read.",
            found=f"{type(error).__name__}: {error}",
            expected="a JSON object as PEFT writes it",
            next_step="get an undamaged copy of it",
        ) from error
    except (ValueError, OSError) as error:
        # PEFT hides the reason (not found, no access, no network) in the cause
        cause = error.__cause__ or error.__context__ or error
        raise refuse(
            f"Can't find 'adapter_config.json' at '{source}'",
            found=f"{type(cause).__name__}: {_first_line(cause)}",
            expected="a folder with an adapter, or the id of a Hub repository with one",
            next_step="check the path, the id, `subfolder`, `revision` and `token`",
        ) from error


def _read_tensors(source: str, device: str | torch.device, key_mapping, hub: dict) -> dict[str, torch.Tensor]:
    try:
        if (tensors := _read_folder(source, device, key_mapping, hub)) is not None:
            return tensors
        return load_peft_weights(source, device=device, key_mapping=key_mapping, **hub)
    except (SafetensorError, RuntimeError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise refuse(
            f"The weights of {source} can't be read.",
            found=f"{type(error).__name__}: {_first_line(error)}",
            expected="adapter_model.safetensors, or adapter_model.bin with nothing in it but tensors",
            next_step="get an undamaged copy; convert a .bin with other objects in it to safetensors",
        ) from error
    except (ValueError, OSError, HFValidationError) as error:
        raise refuse(
            f"Can't find weights for {source}",
            found=f"{type(error).__name__}: {_first_line(error)}",
            expected="adapter_model.safetensors or adapter_model.bin beside adapter_config.json",
            next_step="check the folder or repository, and get a complete copy of it",
        ) from error


def _read_folder(source: str, device: str | torch.device, key_mapping, hub: dict) -> dict[str, torch.Tensor] | None:
    """What ``load_peft_weights`` gives for a plain folder, read faster; None for anything else."""
    path = os.path.join(source, hub.get("subfolder") or "", SAFETENSORS_WEIGHTS_NAME)
    if key_mapping or torch.device(device).type != "cpu" or not os.path.exists(path):
        return None
    return read_weights(path)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
