"""Reading and saving adapters: folders (``sources``, ``reading``), the Hub (``hub``), a fast reader of weights
(``weights_file``), PEFT's older format (``bin_file``) and saving (``saving``).
"""

from pathlib import Path

#: the advice of a refusal, in Python, and what it is for those who have only a terminal, of advice.txt
ADVICE: dict[str, str] = {}
for _line in (Path(__file__).parent / "advice.txt").read_text("utf-8").splitlines():
    _python, _, _there = _line.partition(" ->")
    ADVICE[_python] = _there.strip()
