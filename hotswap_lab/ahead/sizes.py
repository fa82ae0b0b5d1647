"""The conditions on sizes that exported code relies on. AOTInductor drops them.

An export follows one path through a model's Python code: ``if length % 4`` is decided once, and is a condition from
then on. The conditions are SymPy expressions, stored as text: ``Eq(Mod(s27, 4), 0)``.

Tests: ``tests/ahead/test_ahead_checks.py``.
"""

import contextlib
import functools
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..core.errors import listing, refused

#: the functions and constants in the text of an expression
NAMES: dict[str, Any] = {
    **{"Eq": operator.eq, "Ne": operator.ne, "Max": max, "Min": min, "Abs": abs, "Mod": operator.mod},
    **{"PythonMod": operator.mod, "FloorDiv": operator.floordiv, "CleanDiv": operator.floordiv, "true": True},
    **{"CeilDiv": lambda size, by: -(-size // by), "ModularIndexing": lambda size, by, mod: size // by % mod},
    **{"IntTrueDiv": operator.truediv, "FloatTrueDiv": operator.truediv, "PowByNatural": pow, "ToFloat": float},
    **{"floor": math.floor, "ceiling": math.ceil, "FloorToInt": math.floor, "CeilToInt": math.ceil},
    **{"TruncToInt": math.trunc, "RoundToInt": round, "Where": lambda test, one, other: one if test else other},
    **{"Identity": lambda value: value, "oo": math.inf, "int_oo": math.inf, "__builtins__": {}},
}


def conditions_of(program: torch.export.ExportedProgram) -> list[str]:
    """All conditions on the symbols of a program's sizes. Compiling the program adds some."""
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"]
    sizes = [size for value in values if isinstance(value, torch.Tensor) for size in value.shape]
    symbolic = [size.node for size in sizes if isinstance(size, torch.SymInt)]
    if not symbolic:
        return []
    env, symbols, conditions = symbolic[0].shape_env, {str(node.expr) for node in symbolic}, []
    for symbol, allowed in program.range_constraints.items():
        if str(symbol) in symbols:  # the code checks sizes that depend on values
            conditions.append(f"{symbol} >= {allowed.lower}")
            if allowed.upper.is_Integer:
                conditions.append(f"{symbol} <= {allowed.upper}")
    conditions += [str(guard.expr.xreplace(env.replacements)) for guard in env.guards]
    return [condition for condition in dict.fromkeys(conditions) if condition != "True"]


class Sizes:
    """The conditions of one graph, for sizes in the order of their symbols.

    Parameters
    ----------
    symbols:
        Each symbol with its size: ``{"s27": "input_ids.shape[1]"}``.
    conditions:
        Expressions of these symbols.

    Examples
    --------
    >>> sizes = Sizes({"s27": "x.shape[1]"}, ["s27 > 2", "Eq(Mod(s27, 4), 0)"])
    >>> sizes.fit(8), sizes.fit(9), sizes.broken(9), str(sizes)
    (True, False, 'Eq(Mod(x.shape[1], 4), 0)', 'x.shape[1] > 2, Eq(Mod(x.shape[1], 4), 0)')
    """

    def __init__(self, symbols: Mapping[str, str], conditions: Sequence[str]):
        self.symbols: Mapping[str, str] = symbols
        self.conditions: Sequence[str] = conditions
        self._decide = self._compiled(" and ".join(f"({condition})" for condition in conditions) or "True")
        #: whether sizes fulfill all conditions; cached, because the same lengths recur
        self.fit: Callable[..., bool] = functools.lru_cache(4096)(self._fit)

    def _compiled(self, condition: str) -> Any:
        return eval(f"lambda {', '.join(self.symbols)}: {condition}", dict(NAMES))

    def _fit(self, *sizes: int) -> bool:
        try:
            return bool(self._decide(*sizes))
        except (ArithmeticError, ValueError):  # a division by a size that another condition excludes
            return False

    def broken(self, *sizes: int) -> str:
        """The first condition that these sizes break, with the names of the inputs."""
        broken = (condition for condition in self.conditions if not Sizes(self.symbols, [condition])._fit(*sizes))
        return self._in_words(next(broken))

    def _in_words(self, condition: str) -> str:
        return re.sub(r"\w+", lambda match: self.symbols.get(match[0], match[0]), condition)

    def check(self, *sizes: int) -> None:
        """Refuse conditions that can't be evaluated, or that the sizes of the export break."""
        for condition in self.conditions:
            with contextlib.suppress(Exception):
                if "~" not in condition and self._compiled(condition)(*sizes) is not False:
                    continue
            raise refused("ahead_arguments", found=f"a condition on sizes that can't be checked later, {condition}")

    def __str__(self) -> str:
        return listing(map(self._in_words, self.conditions)) or "none is dynamic"
