"""What an adapter is: its config, and the header of its weights."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.errors import HotswapError
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
        If there is no adapter, its files can't be read, or its config is refused for any base model.

    Examples
    --------
    >>> from hotswap_lab import demo
    >>> summary = summary_of(demo.adapter_path("sort"))
    >>> summary.method, summary.ranks, summary.layers
    ('LORA', (6, 16, 24), 28)
    """
    # here, because these import torch
    from ..core.settings import damaged_values
    from .reading import Adapter, find_source
    from .sources import read_config

    place, name = find_source(source, {}), str(source)
    config = read_config(place)
    if damaged := damaged_values(config):
        raise HotswapError(*(replace(each, found=f"{name}: {each.found}") for each in damaged))
    try:
        shapes, nbytes = _header(Path(place.folder_with_weights(), "adapter_model.safetensors"))
    except Exception:  # of any type: it has an older format, or is damaged
        adapter = Adapter.load(name)
        shapes, nbytes = {key: tuple(each.shape) for key, each in adapter.tensors.items()}, adapter.nbytes
    return _summary(name, vars(config), shapes, nbytes)


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
    alphas = [config[key] for key in ("lora_alpha", "alpha") if config.get(key) is not None]
    alphas += (config.get("alpha_pattern") or {}).values()
    base, method = config["base_model_name_or_path"], config["peft_type"].value
    base, name = base if isinstance(base, str) else None, Path(name).name if Path(name).is_dir() else name
    return Summary(name, method, tuple(sorted(ranks)), tuple(sorted({*alphas})), len(layers), base, nbytes)
