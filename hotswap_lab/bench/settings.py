"""What to measure."""

from __future__ import annotations

from dataclasses import dataclass

#: hidden size, the MLP's, layers, heads, heads for keys and values
SHAPES = {"smollm2": (576, 1536, 30, 9, 3), "demo": (128, 448, 4, 4, 4), "tiny": (32, 64, 2, 4, 2)}
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Parameters
    ----------
    model:
        The shape: ``"smollm2"`` (SmolLM2-135M, with a small vocabulary), ``"demo"`` (the embedded model), ``"tiny"``.
    layers:
        Another number of layers than the model has.
    ranks:
        The ranks of the adapters; one table for each.
    target_rank:
        The rank that prepared models have room for. Default: that of the adapters.
    dtype:
        Of model and adapters: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
    device:
        Where the model is. The adapters are in files, or in the CPU's memory.
    threads:
        How many threads torch may use.
    n:
        Timed calls of each way.
    compiled:
        Whether to time compiled models too. This forgets everything that was compiled in the process before.
    backend:
        The compiler. Default: what :func:`hotswap_lab.pick_backend` finds.
    tokens:
        The length of the input where a forward call is timed.
    rows:
        Whether to time batches in which each row has its own adapter. This forgets what was compiled before, too.
    cold:
        Measures only how a process starts, with the embedded model on the CPU, this many times for each way.
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
