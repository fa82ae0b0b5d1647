"""Regular expressions of an adapter's config that would take for ever on the names of a model's modules.

PEFT matches ``target_modules`` and its like with Python's ``re``, which tries every way to divide a name among the
repetitions of an expression, can't be given a time limit, and holds the interpreter meanwhile. An expression whose
repetitions are few and not within one another is quick whatever it is matched with. Any other is tried first in a
process of its own, which can be ended.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache

import torch
from peft import PeftConfig

from .errors import Refusal

#: how PEFT 0.21 puts expressions of a config together; the last ones are those of most repetitions
FORMS = (
    r"(?:{})\Z",  # target_modules, exclude_modules
    r"(.*\.)?({})$",  # rank_pattern, alpha_pattern
    r"(^|.*\.){}($|\..*)",  # modules_to_save
    r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",  # layers_pattern
)
#: repetitions that these add
ADDED = 2
#: steps that nobody has to be afraid of; ``re`` makes some 50 million in a second
FEW_STEPS = 10**8
#: seconds of a processor's time that a trial may take, and, where there is no such clock, seconds by the wall's
PATIENCE, LAST_PATIENCE = 1.0, 30.0

_REPETITION = re.compile(r"[*+?{]")
_NESTED = re.compile(r"\)\s*[*+?{]|\\[1-9]|\(\?P=|\(\?\(")
_TRIAL = """
import json, re, signal, sys
patience, forms, expressions, names = json.load(sys.stdin)
if hasattr(signal, "setitimer"):
    signal.setitimer(signal.ITIMER_VIRTUAL, patience)
for expression in expressions:
    for form in forms:
        try:
            compiled = re.compile(form.replace("{}", expression))
        except Exception:
            continue
        for name in names:
            compiled.match(name)
"""


def slow_expressions(config: object, names: Iterable[str]) -> list[str]:
    """The strings of a config that take too long as regular expressions on these names.

    Parameters
    ----------
    config:
        Whose attributes are looked through, whatever they are called.
    names:
        The names of a model's modules. Only asked for if there is an expression to be tried.

    Examples
    --------
    >>> from peft import LoraConfig
    >>> slow_expressions(LoraConfig(target_modules=r".*[.](q|v)_proj"), ["model.layers.0.self_attn.q_proj"])
    []
    >>> slow_expressions(LoraConfig(target_modules=r"([a-z._0-9]+)+!"), ["model.layers.0.self_attn.q_proj"])
    ['([a-z._0-9]+)+!']
    """
    suspects = [each for each in _strings(vars(config)) if _REPETITION.search(each)]
    if not suspects:
        return []
    names = tuple(sorted(set(names)))
    suspects = tuple(each for each in dict.fromkeys(suspects) if _steps(each, names) > FEW_STEPS)
    if not suspects or _is_quick(suspects, names):
        return []
    if len(suspects) == 1:
        return list(suspects)
    return [each for each in suspects[:8] if not _is_quick((each,), names)] or list(suspects)


def slow_to_match(config: PeftConfig, base: torch.nn.Module) -> list[Refusal]:
    """Says so if a config has :func:`slow_expressions` for a model's modules."""
    slow = slow_expressions(config, (name for name, _ in base.named_modules()))
    return [
        Refusal(
            "The adapter's config has a regular expression that would take for ever.",
            found=f"{each!r}: more than {PATIENCE:g} second on the names of this model's modules",
            expected="an expression without repetitions of repetitions, such as (a+)+",
            next_step="write it in another way in adapter_config.json, or name the modules in a list",
        )
        for each in slow
    ]


def _strings(value: object) -> Iterator[str]:
    """All strings in a config, keys included."""
    stack = [value]
    while stack:
        each = stack.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, dict):
            stack += [*each.keys(), *each.values()]
        elif isinstance(each, (list, tuple, set, frozenset)):
            stack += each


def _steps(expression: str, names: tuple[str, ...]) -> float:
    """At most how many ways there are to divide the names among the repetitions."""
    if _NESTED.search(expression):
        return math.inf
    repetitions = len(_REPETITION.findall(expression)) + ADDED
    return len(names) * math.comb(max(map(len, names), default=0) + repetitions, repetitions)


@lru_cache(maxsize=256)
def _is_quick(expressions: tuple[str, ...], names: tuple[str, ...]) -> bool:
    command = [sys.executable, "-I", "-S", "-c", _TRIAL]
    content = json.dumps([PATIENCE, FORMS, expressions, names]).encode()
    try:
        done = subprocess.run(command, input=content, capture_output=True, timeout=LAST_PATIENCE)
    except (subprocess.TimeoutExpired, OSError):  # the latter where no process can be started
        return False
    return done.returncode == 0
