"""The conditions on sizes under which exported code is right. AOTInductor keeps none of them.

An export follows one path through a model's Python code: ``if length % 4`` is decided once, and is a condition from
then on. The conditions are expressions of SymPy, which are stored as text: ``Eq(Mod(s27, 4), 0)``.
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
    """All conditions on the symbols of a program's sizes, those of its compiled code included once it is compiled."""
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"]
    sizes = [size for value in values if isinstance(value, torch.Tensor) for size in value.shape]
    symbolic = [size.node for size in sizes if isinstance(size, torch.SymInt)]
    if not symbolic:
        return []
    env, symbols, found = symbolic[0].shape_env, {str(node.expr) for node in symbolic}, []
    for symbol, allowed in program.range_constraints.items():
        if str(symbol) in symbols:  # those of sizes that depend on values are checked by the code
            found += [f"{symbol} >= {allowed.lower}"]
            found += [f"{symbol} <= {allowed.upper}"] if allowed.upper.is_Integer else []
    found += [str(guard.expr.xreplace(env.replacements)) for guard in env.guards]
    return [each for each in dict.fromkeys(found) if each != "True"]


class Sizes:
    """The conditions of one graph, for sizes in the order of their symbols.

    Parameters
    ----------
    symbols:
        Each symbol, and what it is the size of: ``{"s27": "input_ids.shape[1]"}``.
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
        self._decide = self._compiled(" and ".join(f"({each})" for each in conditions) or "True")
        #: whether these sizes fulfill all conditions; texts have many lengths, but each of them many times
        self.fit: Callable[..., bool] = functools.lru_cache(4096)(self._fit)

    def _compiled(self, condition: str) -> Any:
        return eval(f"lambda {', '.join(self.symbols)}: {condition}", dict(NAMES))

    def _fit(self, *sizes: int) -> bool:
        try:
            return bool(self._decide(*sizes))
        except (ArithmeticError, ValueError):  # a condition divides by a size that it has excluded
            return False

    def broken(self, *sizes: int) -> str:
        """The first condition that these sizes break, in words of the inputs."""
        return self._in_words(next(each for each in self.conditions if not Sizes(self.symbols, [each])._fit(*sizes)))

    def _in_words(self, condition: str) -> str:
        return re.sub(r"\w+", lambda match: self.symbols.get(match[0], match[0]), condition)

    def check(self, *sizes: int) -> None:
        """Refuse conditions that can't be evaluated, or that the sizes of the export break."""
        for each in self.conditions:
            with contextlib.suppress(Exception):
                if "~" not in each and self._compiled(each)(*sizes) is not False:
                    continue
            raise refused("ahead_arguments", found=f"a condition on sizes that can't be checked later, {each}")

    def __str__(self) -> str:
        return listing(map(self._in_words, self.conditions)) or "none is dynamic"
