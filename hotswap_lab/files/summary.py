"""What an adapter is, read without torch: its config, and the header of its weights."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from ..core.errors import refused
from ..core.report import readable_bytes


@dataclass(frozen=True)
class Summary:
    """An adapter in a few words. ``layers`` counts the modules with tensors; ``ranks`` and ``alphas`` are sorted."""

    name: str
    method: str
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    layers: int
    base: str | None
    nbytes: int

    @property
    def row(self) -> tuple[str, ...]:
        """The columns of ``hotswap-lab show``."""
        ranks, alphas = (" ".join(f"{each:g}" for each in numbers) or "-" for numbers in (self.ranks, self.alphas))
        return self.name, self.method, ranks, alphas, str(self.layers), readable_bytes(self.nbytes), self.base or "-"


def summary_of(source: str | Path) -> Summary:
    """The summary of an adapter in a folder or on the Hub.

    Raises
    ------
    HotswapError
        If there is no adapter, or its files can't be read.

    Examples
    --------
    >>> from hotswap_lab import demo
    >>> summary = summary_of(demo.adapter_path("sort"))
    >>> summary.method, summary.ranks, summary.layers
    ('LORA', (6, 16, 24), 28)
    """
    name = str(source)
    try:
        config = json.loads(Path(source, "adapter_config.json").read_text(encoding="utf-8"))
        shapes, nbytes = _header(Path(source, "adapter_model.safetensors"))
        return _summary(name, config, shapes, nbytes)
    except Exception:  # of any type: it is on the Hub, has an older format, or is damaged
        from .reading import Adapter

        adapter = Adapter.load(name)
        shapes = {key: tuple(each.shape) for key, each in adapter.tensors.items()}
        try:
            return _summary(name, adapter.config.to_dict(), shapes, adapter.nbytes)
        except Exception as error:
            raise refused("config_unreadable", source=name, error=error) from error


def _header(path: Path) -> tuple[dict[str, tuple[int, ...]], int]:
    """Each tensor's name and shape, and the bytes of all, from the first bytes of a safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, 100_000_000)))
    header.pop("__metadata__", None)
    nbytes = path.stat().st_size - length - 8
    if max((each["data_offsets"][1] for each in header.values()), default=0) != nbytes:
        raise ValueError("a part of a file")
    return {key: tuple(each["shape"]) for key, each in header.items()}, nbytes


def _summary(name: str, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], nbytes: int) -> Summary:
    parts = {key: key.partition(".lora_") for key in shapes}
    ranks = {shapes[key][0] for key, (_, _, tensor) in parts.items() if tensor.split(".")[0] in ("A", "embedding_A")}
    layers = {layer if found else key.rpartition(".")[0] for key, (layer, found, _) in parts.items()}
    base, method, pattern = (config.get(each) for each in ("base_model_name_or_path", "peft_type", "alpha_pattern"))
    _check("base_model_name_or_path", base, isinstance(base, (str, NoneType)))
    _check("peft_type", method, isinstance(method, str))
    _check("alpha_pattern", pattern, isinstance(pattern, (dict, NoneType)))
    alphas = {key: config[key] for key in ("lora_alpha", "alpha") if config.get(key) is not None}
    alphas |= {f"alpha_pattern.{key}": each for key, each in (pattern or {}).items()}
    for key, each in alphas.items():
        # JSON has any number of digits, and Python also reads NaN and Infinity
        _check(key, each, isinstance(each, (int, float)) and abs(each) <= sys.float_info.max)
    name = Path(name).name if Path(name).is_dir() else name
    method = str(getattr(method, "value", method))
    return Summary(name, method, tuple(sorted(ranks)), tuple(sorted({*alphas.values()})), len(layers), base, nbytes)


def _check(name: str, value: object, is_right: bool) -> None:
    if not is_right:
        raise ValueError(f"{name} = {value!r:.80}")
