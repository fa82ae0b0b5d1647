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
import weakref
from collections.abc import Iterable, Iterator

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
#: how many slow expressions are looked for in one config: each takes its second
ENOUGH = 3
_TRIAL = """
import json, re, signal, sys
patience, forms, expressions, names = json.load(sys.stdin)
for number, expression in enumerate(expressions):
    print(number, flush=True)
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_VIRTUAL, patience)
    for form in forms:
        try:
            compiled = re.compile(form.replace("{}", expression))
        except Exception:
            continue
        for name in names:
            compiled.match(name)
print("done")
"""

#: of each model, the expressions that were looked at, and whether they are slow
_verdicts: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, bool]] = weakref.WeakKeyDictionary()


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
    return _slow_among(list(dict.fromkeys(suspects)), names) if suspects else []


def slow_to_match(config: PeftConfig, base: torch.nn.Module) -> list[Refusal]:
    """Says so if a config has :func:`slow_expressions` for a model's modules. Each is looked at once for a model."""
    suspects = {each for each in _strings(vars(config)) if _REPETITION.search(each)}
    if not suspects:
        return []
    known = _verdicts.setdefault(base, {})
    if unknown := sorted(suspects - known.keys()):
        slow = _slow_among(unknown, (name for name, _ in base.named_modules()))
        if len(slow) < ENOUGH:  # else some were not looked at
            known.update((each, each in slow) for each in unknown)
    else:
        slow = []
    return [
        Refusal(
            "The adapter's config has a regular expression that would take for ever.",
            found=f"{each!r}: more than {PATIENCE:g} second on the names of this model's modules",
            expected="an expression without repetitions of repetitions, such as (a+)+",
            next_step="write it in another way in adapter_config.json, or name the modules in a list",
        )
        for each in sorted(suspects)
        if known.get(each) or each in slow
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


def _slow_among(expressions: list[str], names: Iterable[str]) -> list[str]:
    names = tuple(sorted(set(names)))
    suspects = [each for each in expressions if _steps(each, names) > FEW_STEPS]
    slow: list[str] = []
    while suspects and len(slow) < ENOUGH:
        tried = _try(suspects, names)
        if tried is None:
            # nothing can be tried here: those that might take for ever are not worth the risk
            return slow + [each for each in suspects if _NESTED.search(each)]
        if tried == len(suspects):
            break
        slow.append(suspects[tried])
        suspects = suspects[tried + 1 :]
    return slow


def _try(expressions: list[str], names: tuple[str, ...]) -> int | None:
    """How many expressions are quick until one is not. None where no Python can be started to try them in."""
    if not sys.executable or getattr(sys, "frozen", False):
        return None
    command = [sys.executable, "-I", "-S", "-c", _TRIAL]
    content = json.dumps([PATIENCE, FORMS, expressions, names]).encode()
    try:
        output = subprocess.run(command, input=content, capture_output=True, timeout=LAST_PATIENCE).stdout
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
    except OSError:
        return None
    lines = output.split()
    if not lines:
        return None
    return len(expressions) if lines[-1] == b"done" else int(lines[-1])
