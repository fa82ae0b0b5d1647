"""Where adapters come from and go to: the Hub (``hub``), its search (``search``), saving (``saving``)."""

from pathlib import Path

from ..core.errors import TEXTS
from . import hub  # noqa: F401 - adapters are found on the Hub from here on

TEXTS.append(Path(__file__).with_name("refusals.ini"))
