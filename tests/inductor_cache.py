"""The folder in which a test run's compiled code is kept."""

import os
import tempfile


def choose() -> None:
    """Give each worker, and each ``ATEN_CPU_CAPABILITY``, a cache of its own, in this process and those that it starts.

    Two workers that build the same code at the same time get into each other's way. And PyTorch 2.13 and 2.15 reuse
    generated code regardless of the capability: a loop in steps of 16 numbers, written for AVX-512 and built for AVX2,
    skips half of them, so outputs are NaN or tokens differ. Without vectors, the code doesn't compile.
    """
    parts = [os.environ.get(name) for name in ("PYTEST_XDIST_WORKER", "ATEN_CPU_CAPABILITY")]
    if any(parts):
        folder = "-".join(["inductor-of", *filter(None, parts)])
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), folder)
