"""Small mistakes, put into a copy of the code one at a time: how many of them do the tests next to the code notice?

    python tests/robustness/mutants.py --sample 100 --seed 1

A mistake that a test should notice needs a test in the file that mirrors the code's. Mistakes without an effect are
listed in ``mutants.txt``, each with the reason. The checkout is never changed. A hundred mistakes take an hour or more.

mutmut (``pip install mutmut``) makes the mistakes, because it drops and replaces arguments and values as people do.
cosmic-ray exchanges operators, those of type hints included, and edits the checkout. mutmut's own runner is not used:
it leaves out decorated functions and wraps all others, which ``torch.compile`` would notice.
"""

from __future__ import annotations

import argparse
import collections
import difflib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: the code, and the tests next to it
NEAR = {
    "hotswap_lab/core/wrappers.py": "tests/beyond",  # which they are for
    "hotswap_lab/core/settings.py": "tests/beyond",  # where tests have a config of each method
    "hotswap_lab/core": "tests/core",
    "hotswap_lab/pools": "tests/pools",
    "hotswap_lab/files": "tests/files",
    "hotswap_lab/threads": "tests/threads",
    "hotswap_lab/verify.py": "tests/test_verify.py",
}
#: seconds for the tests of one mistake; those that take longer have noticed it
LIMIT = 900


def mistakes_in(code: str) -> list:
    """Functions that return the code with one mistake in it: mutmut's mistakes, dropped calls, negated conditions."""
    import libcst as cst
    from mutmut.mutation.file_mutation import MutationVisitor
    from mutmut.mutation.mutators import mutation_operators
    from mutmut.mutation.pragma_handling import IgnoredCode

    class Visitor(MutationVisitor):
        def _skip_node_and_children(self, node: cst.CSTNode) -> bool:
            # mutmut leaves out decorated functions, and with them each property and each context manager
            return not isinstance(node, cst.FunctionDef) and super()._skip_node_and_children(node)

    def dropped(node: cst.Expr) -> list:
        return [cst.Pass()] if isinstance(node.value, cst.Call) else []

    def negated(node: cst.If) -> list:
        test = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
        return [node.with_changes(test=cst.UnaryOperation(cst.Not(), test))]

    def is_prose(node: cst.CSTNode) -> bool:
        return isinstance(node, cst.SimpleString) and " " in node.value

    tree, operators = cst.MetadataWrapper(cst.parse_module(code)), [(cst.Expr, dropped), (cst.If, negated)]
    tree.visit(visitor := Visitor([*mutation_operators, *operators], IgnoredCode(set(), set(), set())))
    made = [each for each in visitor.mutations if not is_prose(each.original_node)]
    return [lambda m=m: tree.module.deep_replace(m.original_node, m.mutated_node).code for m in made]


def notice(copy: Path, tests: list[str]) -> bool:
    """Whether a test fails in the copy, or takes too long. Tests run in a fork, which need not import torch again."""
    if not (child := os.fork()):
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # for processes that tests start
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(pytest.main(["-x", "-p", "no:cacheprovider", *tests]))
    deadline = time.monotonic() + LIMIT
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        time.sleep(0.05)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
    return ended[1] != 0


def tests_near(file: Path) -> list[str]:
    """The tests next to a file of the code, those in the file that mirrors it first; and its examples."""
    tests = next(tests for code, tests in NEAR.items() if file.as_posix().startswith(code))
    mirror = Path(tests, f"test_{file.name}")
    return [*([mirror.as_posix()] if (ROOT / mirror).exists() else []), file.as_posix(), tests]


def try_out(copy: Path, sample: int, chance: random.Random) -> None:
    """Put one mistake after the other into the copy, and print what becomes of it."""
    files = sorted(file.relative_to(ROOT) for code in NEAR for file in [*(ROOT / code).rglob("*.py"), ROOT / code])
    codes = {file: (ROOT / file).read_text() for file in files if file.suffix == ".py"}
    mistakes, tried, without_effect = {}, {}, Path(__file__).with_suffix(".txt").read_text()
    while len(tried) < sample:
        (file,) = chance.choices(list(codes), list(map(len, codes.values())))
        mistakes[file] = mistakes.get(file) or mistakes_in(codes[file])
        wrong = chance.choice(mistakes[file])() if mistakes[file] else codes[file]
        changes = list(difflib.unified_diff(codes[file].splitlines(), wrong.splitlines(), n=0, lineterm=""))[2:]
        shown = "\n".join([str(file), *(each for each in changes if each[0] in "+-")])
        if not changes or shown in tried or shown in without_effect:
            continue
        (copy / file).write_text(wrong)
        tried[shown] = "noticed" if notice(copy, tests_near(file)) else "survived"
        (copy / file).write_text(codes[file])
        print(f"{len(tried):3} {tried[shown]}: {changes[0]} {shown}", flush=True)
    print(f"{sample} mistakes:", dict(collections.Counter(tried.values())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=20, help="how many mistakes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    sys.dont_write_bytecode = True  # two mistakes in one file may have the same size and the same second
    import peft  # noqa: F401 - what each fork would have to import
    import transformers  # noqa: F401

    with tempfile.TemporaryDirectory() as copy:
        skipped = shutil.ignore_patterns(".git", ".venv*", "build", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=skipped, dirs_exist_ok=True)
        try_out(Path(copy), options.sample, random.Random(options.seed))


if __name__ == "__main__":
    main()
