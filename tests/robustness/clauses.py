"""Which clauses of conditions does no test isolate?

    python tests/robustness/clauses.py [pytest's arguments]

In a copy of the package, each condition records, for each of its clauses, whether the result would differ without that
clause. Then all tests run once on the copy. For each clause in the list that is printed, add a test or delete the
clause. ``clauses.txt`` lists the clauses that stay without a test, each with the reason.
"""

from __future__ import annotations

import ast
import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
#: the folders whose conditions are looked at
WHERE = ("core", "beyond", "pools", "files", "ahead", "threads", "pipelines", "verify.py")
#: what an expression may contain that a function around it can't do for it
UNMOVABLE = (ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom)
#: pytest's arguments, unless there are others
ALL = ("-n", "2", "-m", "long or not long", "tests")
NOTES = os.environ.get("CLAUSES_NOTED", "")
seen: set[int] = set()
inside = threading.local()


class Noting(ast.NodeTransformer):
    """Puts a call of :func:`decided` around each condition, and keeps a list of the clauses."""

    def __init__(self, file: Path, clauses: list[str]):
        self.file, self.code, self.clauses, self.asked = file.relative_to(ROOT), file.read_text(), clauses, set[int]()

    def number(self, whole: ast.expr, clause: ast.expr) -> ast.Constant:
        self.clauses.append(
            f"{self.file}: {ast.unparse(clause)}" + (f"  in  {ast.unparse(whole)}" if whole is not clause else "")
        )
        return ast.Constant(len(self.clauses) - 1)

    def visit(self, node: ast.AST) -> ast.AST:
        # whether only the truth of what comes out counts
        if isinstance(node, (ast.If, ast.While, ast.IfExp, ast.Assert)):
            self.asked.add(id(node.test))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            self.asked.add(id(node.operand))
        if isinstance(node, ast.BoolOp) and id(node) in self.asked:
            self.asked.update(map(id, node.values))
        if isinstance(node, ast.comprehension):
            self.asked.update(map(id, node.ifs))
        return super().visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        if any(isinstance(each, UNMOVABLE) for each in ast.walk(node)):
            return self.generic_visit(node)
        first, *_ = [self.number(node, each) for each in node.values]
        stops, only_truth = isinstance(node.op, ast.Or), id(node) in self.asked
        self.generic_visit(node)
        nothing = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
        clauses = [ast.Lambda(nothing, each) for each in node.values]
        return ast.Call(
            ast.Name("_decided", ast.Load()), [first, *map(ast.Constant, (stops, only_truth)), *clauses], []
        )

    def visit_comprehension(self, node: ast.comprehension) -> ast.AST:
        numbers = [self.number(each, each) for each in node.ifs]
        self.generic_visit(node)
        node.ifs = [
            ast.Call(ast.Name("_passed", ast.Load()), list(each), []) for each in zip(numbers, node.ifs, strict=True)
        ]
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        # in a class, other statements are left as they are: functions in it don't see its names
        node.body = [
            self.visit(each) if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) else each
            for each in node.body
        ]
        return node

    def noted(self) -> str:
        tree = self.visit(ast.parse(self.code))
        at = 1 + max(n for n, each in enumerate(tree.body) if n == 0 or getattr(each, "module", "") == "__future__")
        tree.body.insert(at, *ast.parse("from clauses import decided as _decided, passed as _passed").body)
        return ast.unparse(ast.fix_missing_locations(tree))


def decided(first: int, stops: bool, only_truth: bool, *clauses: Callable[[], Any]) -> Any:
    """What ``and`` or ``or`` gives; notes on which clause it depended. ``stops``: at what truth no more is asked.

    >>> decided(0, False, True, lambda: True, lambda: False)  # the second clause decides
    False
    >>> decided(2, False, True, lambda: False, lambda: 1 / 0)  # the first one keeps an error away
    False
    >>> decided(4, False, True, lambda: False, lambda: False)  # each of the two is enough
    False
    >>> decided(6, True, False, lambda: 0, lambda: ())  # the result is a value, not True or False
    ()
    >>> sorted(seen)
    [1, 2, 7]
    """
    found: list[Any] = []
    for each in clauses:
        found.append(each())
        if bool(found[-1]) == stops:
            break
    at = len(found) - 1  # without any other one, all comes out as it is
    if torch.compiler.is_compiling() or first + at in seen or getattr(inside, "is_so", False):
        return found[-1]
    inside.is_so = True  # what is asked below is not what the program asks
    try:
        without: Any = found[at - 1] if at else None
        for each in clauses[at + 1 :]:
            without = each()
            if bool(without) == stops:
                break
        if bool(without) != bool(found[-1]) if only_truth else without is not found[-1] and without != found[-1]:
            seen.add(first + at)
    except Exception:  # it keeps an error away
        seen.add(first + at)
    finally:
        inside.is_so = False
    return found[-1]


def passed(number: int, value: Any) -> Any:
    """The condition of a comprehension; notes whether it has ever left something out."""
    if not torch.compiler.is_compiling() and not value:
        seen.add(number)
    return value


if NOTES:
    atexit.register(lambda: Path(NOTES, f"{os.getpid()}.json").write_text(json.dumps(sorted(seen))))


def main() -> None:
    clauses: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        copy, notes = Path(place, "copy"), Path(place, "notes")
        notes.mkdir()
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv*", "build", "__pycache__"))
        for each in WHERE:
            path = ROOT / "hotswap_lab" / each
            for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
                (copy / file.relative_to(ROOT)).write_text(Noting(file, clauses).noted())
        path = os.pathsep.join([str(copy), str(copy / "tests" / "robustness")])
        command = [sys.executable, "-m", "pytest", "-q", "-p", "clauses", *(sys.argv[1:] or ALL)]
        subprocess.run(command, cwd=copy, env={**os.environ, "PYTHONPATH": path, "CLAUSES_NOTED": str(notes)})
        for file in notes.iterdir():
            seen.update(json.loads(file.read_text()))
    known = Path(__file__).with_suffix(".txt").read_text()
    missing = [each for number, each in enumerate(clauses) if number not in seen and f"\n{each}\n" not in known]
    print(*missing, f"{len(clauses)} clauses; no test decides {len(missing)} of them", sep="\n")


if __name__ == "__main__":
    main()
