"""How long a swap takes, each way of doing it, in one run on one machine.

python -m hotswap_lab.bench
python -m hotswap_lab.bench --model tiny --rank 4 --n 5
python -m hotswap_lab.bench --rank 64 --compiled --spread --memory 10000 --json bench.json --plot bench.svg

The weights are random: a swap copies them and never looks at what they mean. The ways take turns, a few calls each, so
that whatever else the machine does in between hits all of them alike. Each goes back and forth between two adapters,
and is checked before against ``PeftModel.from_pretrained`` of both.
"""

from __future__ import annotations

import platform
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version

import torch

from .. import __version__
from .compiled import measure_compiled
from .extras import measure_memory, measure_spread, measure_turns, measure_waiting
from .report import MEMCPY as MEMCPY
from .report import PEFT_STATE_DICT as PEFT_STATE_DICT
from .report import Report
from .report import Row as Row
from .rows import measure_rows
from .scene import Scene, make_base
from .scene import Way as Way
from .settings import Settings
from .timing import in_rounds as in_rounds
from .timing import machine
from .ways import disk_way as disk_way
from .ways import measure_ways
from .ways import memcpy_way as memcpy_way
from .ways import peft_hotswap_way as peft_hotswap_way
from .ways import peft_load_way as peft_load_way
from .ways import peft_state_dict_way as peft_state_dict_way
from .ways import pool_way as pool_way

#: what goes beyond the table, by the setting that asks for it
FURTHER = {
    "compiled": measure_compiled,
    "rows": measure_rows,
    "memory": measure_memory,
    "spread": measure_spread,
    "turns": measure_turns,
}


def run(
    settings: Settings,
    say: Callable[[str], object] = lambda text: None,
    make: Callable[[Scene], list[Way]] | None = None,
) -> Report:
    """Measures what ``settings`` ask for.

    Parameters
    ----------
    settings:
        Shape, ranks, dtype, device, repeats and the further measurements.
    say:
        Is told what is being done.
    make:
        Makes the ways that are measured, each on a model of its own; all of them by default.

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
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's and transformers', on random adapters
            base = make_base(settings)
            for rank in settings.ranks:
                with tempfile.TemporaryDirectory() as folder:
                    say(f"rank {rank}: making two adapters, timing each way {settings.n} times")
                    scene = Scene(base, settings, rank, folder)
                    sizes.append(scene.size)
                    extras += measure_waiting(rank, lambda scene=scene: rows.extend(measure_ways(scene, make)))
                    for name, measure in FURTHER.items():
                        if getattr(settings, name):
                            say(f"rank {rank}: {name}")
                            extras += measure(scene)
        return Report(machine(), versions(), settings, tuple(sizes), tuple(rows), tuple(extras))
    finally:
        torch.set_num_threads(threads)


def versions() -> dict[str, str]:
    """Of Python and every package that takes part."""
    packages = {name: version(name) for name in ("peft", "transformers", "safetensors")}
    return {"python": platform.python_version(), "hotswap_lab": __version__, "torch": torch.__version__, **packages}
