"""All of it: every rank, every way, and what was asked for beyond the table."""

from __future__ import annotations

import contextlib
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version

import torch

from .. import __version__
from .compiled import measure_first_outputs, measure_forward
from .memory import measure_memory
from .models import make_base
from .report import Report
from .rows import Extra
from .scene import Scene
from .settings import Settings
from .spread import measure_spread
from .timing import machine
from .turns import measure_turns
from .waiting import measure_waiting
from .ways import measure_ways


def run(settings: Settings, say: Callable[[str], object] = lambda text: None) -> Report:
    """Measures what ``settings`` ask for.

    Parameters
    ----------
    settings:
        Shape, ranks, dtype, device, repeats and the further measurements.
    say:
        Is told what is being done.

    Returns
    -------
    Report
        Shows itself as a table; ``rows``, ``extras``, ``to_json()`` and ``figure()`` give the rest.

    Examples
    --------
    >>> report = run(Settings(model="tiny", ranks=(2,), n=1))
    >>> len(report.rows), {row.state for row in report.rows}
    (9, {'right'})
    >>> report.timing("hotswap_lab, pool", rank=2).n
    1
    """
    sizes, rows, extras = [], [], []
    with _set_up(settings.threads):
        base = make_base(settings)
        for rank in settings.ranks:
            with tempfile.TemporaryDirectory() as folder:
                say(f"rank {rank}: making two adapters")
                scene = Scene(base, settings, rank, folder)
                sizes.append(scene.size)
                say(f"rank {rank}: timing each way {settings.n} times")
                table, waiting = measure_waiting(rank, lambda scene=scene: measure_ways(scene))
                rows += table
                extras += waiting
                extras += _further(scene, say)
        return Report(machine(), versions(), settings, tuple(sizes), tuple(rows), tuple(extras))


def _further(scene: Scene, say: Callable[[str], object]) -> Iterator[Extra]:
    settings = scene.settings
    if settings.compiled:
        say(f"rank {scene.rank}: compiled models; this takes minutes if they are large")
        yield from measure_first_outputs(scene)
        yield measure_forward(scene, compiled=False)
        yield measure_forward(scene, compiled=True)
    if settings.memory:
        say(f"rank {scene.rank}: memory over {settings.memory} swaps")
        yield measure_memory(scene, settings.memory)
    if settings.spread:
        say(f"rank {scene.rank}: the same bytes over more tensors")
        yield measure_spread(scene)
    if settings.turns:
        say(f"rank {scene.rank}: threads that take turns")
        yield measure_turns(scene)


@contextlib.contextmanager
def _set_up(threads: int) -> Iterator[None]:
    """The threads asked for, and none of PEFT's and transformers' warnings; both as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(before)


def versions() -> dict[str, str]:
    """Of Python and every package that takes part."""
    packages = {name: version(name) for name in ("peft", "transformers", "safetensors")}
    return {"python": platform.python_version(), "hotswap_lab": __version__, "torch": torch.__version__, **packages}
