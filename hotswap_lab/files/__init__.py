"""Where adapters come from and go to: the Hub (``hub``), its search (``search``), PEFT's older format (``bin_file``),
saving (``saving``), and what ``state_dict`` shows of a model (``state_dicts``).
"""

from pathlib import Path

from ..core.errors import TEXTS
from . import bin_file, hub, state_dicts  # noqa: F401 - behind the engine's doors from here on

TEXTS.append(Path(__file__).with_name("refusals.ini"))
