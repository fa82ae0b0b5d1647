"""The base class of exercises: it runs the reader's function, and checks its results.

Tests: ``tests/lessons/test_exercises.py``.
"""

import linecache
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer


class Exercise:
    """An exercise, made from a function that tests the reader's function.

    Parameters
    ----------
    run:
        Called with the reader's function. It yields for each check a label, the result, and the expected result. The
        task itself is in the notebook.

    Examples
    --------
    >>> @Exercise
    ... def double(solution):
    ...     yield "double of 1", solution(1), 2
    ...     yield "double of 3", solution(3), 6
    ...     yield "double of 4", solution(4), 8
    >>> double.check(lambda number: number + 1)
    Not yet.
      double of 3
        yours:    4
        expected: 6
      and 1 more that differs
    >>> double.check(lambda number: 2 * number)
    Correct: double of 1, double of 3, double of 4.
    """

    def __init__(self, run: Callable[[Callable[..., Any]], Iterator[tuple[str, object, object]]]):
        self._run = run

    def show(self, solution: Callable[..., Any]) -> None:
        """Print the results of the reader's function, without judging them."""
        for label, yours, _ in self._results(solution):
            print(f"{label}: {yours!r}")

    def check(self, solution: Callable[..., Any] | str) -> None:
        """Print whether a solution is right. If not, print the first difference, and the number of further ones.

        One difference is enough to find the mistake. All of them would be a table of the answers.
        """
        self.is_right(solution)

    def is_right(self, solution: Callable[..., Any] | str) -> bool:
        """Print the same as :meth:`check`, and return whether the solution is right."""
        results = self._results(solution)
        wrong = [(label, yours, expected) for label, yours, expected in results if yours != expected]
        if not wrong:
            print(f"Correct: {', '.join(dict.fromkeys(label for label, _, _ in results))}.")
            return True
        label, yours, expected = wrong[0]
        print(f"Not yet.\n  {label}\n    yours:    {yours}\n    expected: {expected}")
        if more := len(wrong) - 1:
            print(f"  and {more} more that differ{'s' if more == 1 else ''}")
        return False

    def _results(self, solution: Any) -> list[tuple[str, object, object]]:
        results: list[tuple[str, object, object]] = []
        try:
            results.extend(self._run(solution))
        except Exception as error:
            # the line of the reader's mistake helps more than a traceback through this module
            first_line = str(error).partition("\n")[0]
            text = f"{type(error).__name__}: {first_line}{_where(error, solution)}"
            results.append(("your code runs", text, "no error"))
        return results


def first_difference(yours: Mapping[str, Any], expected: Mapping[str, Any]) -> tuple[str, ...]:
    """Describe yours and the expected value at the first difference of tensors or numbers; twice "equal" if none.

    >>> first_difference({"a": torch.tensor([[1.0, 2]])}, {"a": torch.tensor([[1.0, 3]])})
    ('a[0, 1] is 2', 'a[0, 1] is 3')
    >>> first_difference({"a": torch.tensor(0.0684296)}, {"a": torch.tensor(0.0686296)})
    ('a is 0.0684', 'a is 0.0686')
    >>> first_difference({"a": torch.nan, "b": torch.nan}, {"a": torch.nan, "b": 2})
    ('b is nan', 'b is 2')
    >>> first_difference({"a": 1}, {"a": 1.0, "b": 2})
    ('no b', 'b')
    >>> first_difference({"a": 1}, {"a": 1.0})
    ('equal', 'equal')
    """
    for name in dict.fromkeys([*expected, *yours]):
        if name not in yours or name not in expected:
            return (name, f"no {name}") if name in yours else (f"no {name}", name)
        pair = torch.as_tensor(yours[name]), torch.as_tensor(expected[name])
        if pair[0].shape != pair[1].shape:
            return tuple(f"{name} of shape {(*tensor.shape,)}" for tensor in pair)
        far = ~torch.isclose(*(tensor.double() for tensor in pair), rtol=1e-4, atol=1e-4, equal_nan=True)
        if far.any():
            at = far.nonzero()[0].tolist()
            # to the fourth decimal, as far as they are compared: the next ones depend on the processor
            return tuple(f"{name}{at or ''} is {round(tensor[(*at,)].item(), 4):.6g}" for tensor in pair)
    return "equal", "equal"


def tensors_of(model: Any) -> dict[str, Any]:
    """Return copies of the tensors of a LoRA adapter called "default", and its scalings, by the paths of the layers."""
    tensors: dict[str, Any] = {}
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            for key in ("lora_A", "lora_B"):
                tensors[f"{path}.{key}"] = getattr(layer, key)["default"].weight.detach().clone()
            tensors[f"{path}.scaling"] = float(layer.scaling["default"])
    return tensors


def same_as_fresh(model: Any, fresh: Any, ids: torch.Tensor, call: Callable | None = None) -> tuple[str, ...]:
    """Return the :func:`first_difference` from a fresh load: of tensors, padded with zeros, of scalings and outputs."""
    yours, expected = tensors_of(model), tensors_of(fresh)
    for name, value in yours.items():
        if isinstance(value, float):  # a layer of zeros may have any scaling
            expected.setdefault(name, value)
        else:
            own, whole = expected.get(name, value[:0]), torch.zeros_like(value)
            if all(size <= most for size, most in zip(own.shape, value.shape, strict=True)):
                whole[tuple(map(slice, own.shape))] = own
                expected[name] = whole
    call = model if call is None else call
    yours["logits"], expected["logits"] = call(ids).logits, fresh(ids).logits
    return first_difference(yours, expected)


def uncompiled_calls(model: Any) -> list[int]:
    """Return a list that gets an entry at each call of the model that isn't compiled, as past PyTorch's graph limit."""
    calls: list[int] = []
    first = next(model.get_base_model().children())
    first.register_forward_hook(lambda *_: None if torch.compiler.is_compiling() else calls.append(1))
    return calls


def refused(swap: Callable[[], object]) -> str:
    """Return the name of the error that a swap raises; ``"ValueError"`` for its subclasses, such as a refusal."""
    try:
        swap()
    except Exception as error:
        return "ValueError" if isinstance(error, ValueError) else type(error).__name__
    return "no error"


def _where(error: Exception, solution: object) -> str:
    """Describe the last line of the reader's function, or of a part of their file, in the error's traceback."""
    function_code, place = getattr(solution, "__code__", None), ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        text = linecache.getline(code.co_filename, number).strip()
        line_of_code = f": {text}" if text else ""
        if code is function_code:
            place = f" (line {number - code.co_firstlineno + 1} of {code.co_name}{line_of_code})"
        elif code.co_filename.startswith("<part"):
            place = f" (line {number} of {code.co_filename.strip('<>')}{line_of_code})"
    return place
