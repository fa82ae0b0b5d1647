"""Reading and saving adapters: folders (``sources``, ``reading``), the Hub (``hub``), a fast reader of weights
(``weights_file``), PEFT's older format (``bin_file``) and saving (``saving``).
"""

from pathlib import Path

_LINES = (Path(__file__).parent / "advice.txt").read_text("utf-8").splitlines()
#: the advice of a refusal, in Python, and what it is for those who have only a terminal, of advice.txt
ADVICE: dict[str, str] = {python: there.strip() for python, there in (each.split(" ->") for each in _LINES)}
