"""Where adapters come from and go to: the Hub (``hub``), its search (``search``), a fast way to read weights
(``weights_file``), PEFT's older format (``bin_file``), saving (``saving``), and what ``state_dict`` shows of a model
(``state_dicts``).
"""

from pathlib import Path

from ..core.errors import TEXTS
from . import bin_file, hub, state_dicts, weights_file  # noqa: F401 - behind the engine's doors from here on

TEXTS.append(Path(__file__).with_name("refusals.ini"))
