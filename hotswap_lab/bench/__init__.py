"""How long a swap takes, each way of doing it, in one run on one machine.

python -m hotswap_lab.bench
python -m hotswap_lab.bench --model tiny --rank 4 --n 5
python -m hotswap_lab.bench --rank 64 --compiled --spread --memory 10000 --json bench.json --plot bench.svg

The weights are random: a swap copies them and never looks at what they mean. The ways take turns, a few calls each, so
that whatever else the machine does in between hits all of them alike. Each goes back and forth between two adapters,
and is checked before against ``PeftModel.from_pretrained`` of both.
"""

from __future__ import annotations

from .benchmark import run, versions
from .compiled import RECOMPILES, measure_first_outputs, measure_forward
from .memory import measure_memory, resident_mb
from .models import make_base, randomize
from .report import Report
from .rounds import PER_ROUND, Way, in_rounds
from .rows import MEMCPY, PEFT_STATE_DICT, Extra, Row, Size
from .scene import MODULES, TOLERANCE, Scene
from .settings import DTYPES, MODELS, Settings
from .spread import Chain, chain_pool, measure_spread
from .terminal import main
from .turns import measure_turns
from .waiting import BUSY, measure_waiting, waited_for_a_core
from .ways import (
    adapter_way,
    disk_way,
    make_ways,
    measure_ways,
    memcpy_way,
    peft_hotswap_way,
    peft_load,
    peft_load_way,
    peft_state_dict_way,
    pool_way,
    state_dict_way,
)

__all__ = [
    "BUSY",
    "DTYPES",
    "MEMCPY",
    "MODELS",
    "MODULES",
    "PEFT_STATE_DICT",
    "PER_ROUND",
    "RECOMPILES",
    "TOLERANCE",
    "Chain",
    "Extra",
    "Report",
    "Row",
    "Scene",
    "Settings",
    "Size",
    "Way",
    "adapter_way",
    "chain_pool",
    "disk_way",
    "in_rounds",
    "main",
    "make_base",
    "make_ways",
    "measure_first_outputs",
    "measure_forward",
    "measure_memory",
    "measure_spread",
    "measure_turns",
    "measure_waiting",
    "measure_ways",
    "memcpy_way",
    "peft_hotswap_way",
    "peft_load",
    "peft_load_way",
    "peft_state_dict_way",
    "pool_way",
    "randomize",
    "resident_mb",
    "run",
    "state_dict_way",
    "versions",
    "waited_for_a_core",
]
