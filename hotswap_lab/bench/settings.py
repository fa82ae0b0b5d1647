"""The settings of the benchmark."""

from __future__ import annotations

from dataclasses import dataclass

#: for each model: hidden size, intermediate size, layers, heads, heads for keys and values
SHAPES = {"smollm2": (576, 1536, 30, 9, 3), "demo": (128, 448, 4, 4, 4), "tiny": (32, 64, 2, 4, 2)}
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Settings:
    """The settings of a run of the benchmark.

    Parameters
    ----------
    model:
        The shape: ``"smollm2"`` (SmolLM2-135M, with a small vocabulary), ``"demo"`` (the embedded model), ``"tiny"``.
    layers:
        The number of layers. Default: the model's.
    ranks:
        The ranks of the adapters; one table for each.
    target_rank:
        The rank that prepared models have room for. Default: that of the adapters.
    dtype:
        The dtype of model and adapters: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
    device:
        The device of the model. The adapters are in files, or in the CPU's memory.
    threads:
        How many threads torch may use.
    n:
        Timed calls of each way.
    compiled:
        Whether to time compiled models, too. This discards everything compiled in the process before.
    backend:
        The backend of ``torch.compile``. Default: the result of :func:`hotswap_lab.pick_backend`.
    tokens:
        The length of the input for timed forward calls.
    rows:
        Whether to time batches in which each row has its own adapter. This discards compiled code, too.
    cold:
        If not 0, measure only cold starts, with the embedded model on the CPU, this many times for each way.
    """

    model: str = "smollm2"
    layers: int | None = None
    ranks: tuple[int, ...] = (8, 64)
    target_rank: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 2
    n: int = 25
    compiled: bool = False
    backend: str | None = None
    tokens: int = 64
    rows: bool = False
    cold: int = 0

    def __post_init__(self) -> None:
        if self.model not in SHAPES or self.dtype not in DTYPES:
            raise ValueError(f"model must be one of {[*SHAPES]}, dtype one of {DTYPES}: {self.model}, {self.dtype}")
        if not self.ranks or (self.target_rank is not None and self.target_rank < max(self.ranks)):
            raise ValueError(f"ranks must hold one rank or more, none above target_rank: got {self.ranks}")
        numbers = (*self.ranks, self.n, self.threads, self.tokens, 1 if self.layers is None else self.layers)
        if min(numbers) < 1 or self.cold < 0:
            raise ValueError("ranks, n, threads, tokens and layers must be 1 or more, cold 0 or more")
