"""Reading and saving adapters: folders (``sources``, ``reading``), the Hub (``hub``), a fast reader of weights
(``weights_file``), PEFT's older format (``bin_file``) and saving (``saving``).
"""

from pathlib import Path

_LINES = (Path(__file__).parent / "advice.txt").read_text("utf-8").splitlines()
#: advice in refusals that is for Python, and the advice to show on a command line instead
ADVICE: dict[str, str] = {python: shown.strip() for python, shown in (line.split(" ->") for line in _LINES)}
