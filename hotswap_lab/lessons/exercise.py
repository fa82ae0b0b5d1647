"""The frame of every exercise: what is asked, a look at what yours does, and a check against the truth."""

import linecache
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer


class Exercise:
    """An exercise, made from a function that tries out the reader's.

    Parameters
    ----------
    run:
        Called with the reader's function. It yields what it checks: what it is, what came out, and what should have
        come out. The task itself is in the notebook.

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
        """Prints what the reader's function does, without judging it."""
        for what, yours, _ in self._results(solution):
            print(f"{what}: {yours!r}")

    def check(self, solution: Callable[..., Any] | str) -> None:
        """Says whether it is right; if not, prints yours and expected of the first that differs, and how many more do.

        One of them is enough to see what is wrong. All of them would be a table of the answers.
        """
        self.is_right(solution)

    def is_right(self, solution: Callable[..., Any] | str) -> bool:
        """:meth:`check`, for a program."""
        results = self._results(solution)
        wrong = [result for result in results if result[1] != result[2]]
        if not wrong:
            print(f"Correct: {', '.join(dict.fromkeys(what for what, _, _ in results))}.")
            return True
        what, yours, expected = wrong[0]
        print(f"Not yet.\n  {what}\n    yours:    {yours}\n    expected: {expected}")
        if more := len(wrong) - 1:
            print(f"  and {more} more that differ{'s' if more == 1 else ''}")
        return False

    def _results(self, solution: Any) -> list[tuple[str, object, object]]:
        results: list[tuple[str, object, object]] = []
        try:
            results.extend(self._run(solution))
        except Exception as error:
            # the reader's own mistake: the line of it helps more than a traceback through this module
            said = (str(error).splitlines() or [""])[0]
            results.append(("your code runs", f"{type(error).__name__}: {said}{_where(error, solution)}", "no error"))
        return results


def first_difference(yours: Mapping[str, Any], expected: Mapping[str, Any]) -> tuple[str, ...]:
    """Say what is yours and what is expected where tensors or numbers first differ; twice the same if none does.

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
    """Copies of the tensors of a LoRA adapter called "default", and its scalings, by the paths of their layers."""
    found: dict[str, Any] = {}
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            for key in ("lora_A", "lora_B"):
                found[f"{path}.{key}"] = getattr(layer, key)["default"].weight.detach().clone()
            found[f"{path}.scaling"] = float(layer.scaling["default"])
    return found


def same_as_fresh(model: Any, fresh: Any, ids: torch.Tensor, call: Callable | None = None) -> tuple[str, ...]:
    """:func:`first_difference` from a fresh load: tensors, scalings, outputs. Beyond what that has, there are zeros."""
    yours, expected = tensors_of(model), tensors_of(fresh)
    for name, value in yours.items():
        if isinstance(value, float):  # where all is zero, any will do
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
    """A list that gets an entry at each call of the model that is not compiled, as past PyTorch's limit of graphs."""
    calls: list[int] = []
    first = next(model.get_base_model().children())
    first.register_forward_hook(lambda *_: None if torch.compiler.is_compiling() else calls.append(1))
    return calls


def refused(swap: Callable[[], object]) -> str:
    """The error that a swap raises: a ``ValueError``, as a refusal is, or which other."""
    try:
        swap()
    except Exception as error:
        return "ValueError" if isinstance(error, ValueError) else type(error).__name__
    return "no error"


def _where(error: Exception, solution: object) -> str:
    """The line of the reader's function, or of a part of their file, that the error came from, if it did."""
    own = getattr(solution, "__code__", None)
    frames = [(frame.f_code, number) for frame, number in traceback.walk_tb(error.__traceback__)]
    frames = [each for each in frames if each[0] is own or each[0].co_filename.startswith("<part")]
    if not frames:
        return ""
    code, number = frames[-1]
    text = linecache.getline(code.co_filename, number).strip()
    name, first = (code.co_name, code.co_firstlineno) if code is own else (code.co_filename.strip("<>"), 1)
    return f" (line {number - first + 1} of {name}{': ' + text if text else ''})"
