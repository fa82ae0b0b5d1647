"""Summaries of adapters for ``hotswap-lab show``: the config, and the shapes of the weights.

Tests: ``tests/files/test_sources.py`` and ``tests/test_main.py``.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

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
        ranks = " ".join(map(str, self.ranks)) or "-"
        alphas = " ".join(f"{alpha:g}" for alpha in self.alphas) or "-"
        return self.name, self.method, ranks, alphas, str(self.layers), readable_bytes(self.nbytes), self.base or "-"


def summary_of(source: str | Path) -> Summary:
    """Summarize an adapter in a folder or on the Hub.

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

    folder, name = find_source(source, {}), str(source)
    config = read_config(folder)
    if damaged := damaged_values(config):
        raise HotswapError(*(replace(refusal, found=f"{name}: {refusal.found}") for refusal in damaged))
    try:
        shapes, nbytes = _header(Path(folder.folder_with_weights(), "adapter_model.safetensors"))
    except Exception:  # of any type: the file has an older format, or is damaged
        adapter = Adapter.load(name)
        shapes, nbytes = {key: tuple(tensor.shape) for key, tensor in adapter.tensors.items()}, adapter.nbytes
    keys = {key: key.partition(".lora_") for key in shapes}
    layers = {layer if is_lora else key.rpartition(".")[0] for key, (layer, is_lora, _) in keys.items()}
    ranks = {shapes[key][0] for key, (*_, end) in keys.items() if end.split(".")[0] in ("A", "embedding_A")}
    alphas = {getattr(config, field, None) for field in ("lora_alpha", "alpha")} - {None}
    alphas |= {*(getattr(config, "alpha_pattern", None) or {}).values()}
    base = config.base_model_name_or_path
    return Summary(
        name=Path(name).name if Path(name).is_dir() else name,
        method=config.peft_type.value,
        ranks=tuple(sorted(ranks)),
        alphas=tuple(sorted(alphas)),
        layers=len(layers),
        base=base if isinstance(base, str) else None,
        nbytes=nbytes,
    )


def _header(path: Path) -> tuple[dict[str, tuple[int, ...]], int]:
    """Read the shapes of a safetensors file by name, and the bytes of all tensors, from its header alone."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, 100_000_000)))
    header.pop("__metadata__", None)
    nbytes = path.stat().st_size - length - 8
    if max((entry["data_offsets"][1] for entry in header.values()), default=0) != nbytes:
        raise ValueError("the file is incomplete")
    return {key: tuple(entry["shape"]) for key, entry in header.items()}, nbytes
