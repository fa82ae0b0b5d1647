"""Small mistakes, put into a copy of the code one at a time: how many of them do the tests notice?

    python tests/robustness/mutants.py --sample 100          # finds out first which tests run over which line
    python tests/robustness/mutants.py --sample 20 --near    # with the tests next to the code only

mutmut makes the mistakes. Those without an effect are listed in ``mutants.txt``, each with the reason.
"""

from __future__ import annotations

import argparse
import collections
import difflib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = [f"hotswap_lab/{each}" for each in ("core", "pools", "files", "threads", "verify.py")]
#: the tests next to the code, and its examples
NEAR = [*("tests/core", "tests/pools", "tests/files", "tests/test_turns.py", "tests/test_verify.py"), *CODE]
#: what README's command runs in one process; what notebooks, browsers and other processes run is not seen
ALL = [*NEAR, "tests", "hotswap_lab", "--ignore=tests/browser", "--ignore=tests/test_bench.py", "--ignore=tests/demo"]
#: how many tests are tried on one mistake, next to the code and elsewhere, of those that run over its line
MOST = 40
#: an environment variable: the folder that the plugin below writes to
SEEN = "MUTANTS_SEEN"


class Seen:
    """A plugin for pytest: which tests run over each line of the code, and how long each test takes."""

    def __init__(self) -> None:
        import coverage

        code = [f"{Path.cwd() / each}{'' if each.endswith('.py') else '/*'}" for each in CODE]
        self.coverage = coverage.Coverage(None, config_file=False, include=code)
        self.seconds: dict[str, float] = collections.Counter()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.coverage.start()  # for each test, since some tests replace the interpreter's tracing
        self.coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration

    def pytest_runtest_logfinish(self) -> None:
        self.coverage.stop()

    def pytest_unconfigure(self) -> None:
        data = self.coverage.get_data()
        lines = {os.path.relpath(file): data.contexts_by_lineno(file) for file in data.measured_files()}
        Path(os.environ[SEEN], f"{os.getpid()}.json").write_text(json.dumps([self.seconds, lines]))


def pytest_configure(config: pytest.Config) -> None:
    if SEEN in os.environ and not getattr(config.option, "numprocesses", None):  # else its workers do it
        config.pluginmanager.register(Seen())


def seen(copy: Path, kept: Path, tests: list[str]) -> tuple[dict[str, float], dict[str, dict[int, set[str]]]]:
    """How long each test takes; and for each file and line, which tests run over it."""
    if not any(kept.iterdir()):
        path = os.pathsep.join(map(str, (copy, copy / "tests/robustness", *sys.path[1:])))
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "mutants", "-p", "no:cacheprovider", *tests]
        subprocess.run(command, cwd=copy, env={**os.environ, "PYTHONPATH": path, SEEN: str(kept)}, check=False)
    seconds, lines = {}, collections.defaultdict(lambda: collections.defaultdict(set))
    for took, ran in (json.loads(each.read_text()) for each in kept.iterdir()):
        seconds |= took
        for file, contexts in ran.items():
            for line, names in contexts.items():
                lines[file][int(line)].update(filter(None, names))
    return seconds, lines


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

    def is_prose(node: cst.CSTNode) -> bool:
        return isinstance(node, cst.SimpleString) and " " in node.value

    def negated(node: cst.If) -> list:
        test = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
        return [node.with_changes(test=cst.UnaryOperation(cst.Not(), test))]

    tree, operators = cst.MetadataWrapper(cst.parse_module(code)), [(cst.Expr, dropped), (cst.If, negated)]
    tree.visit(visitor := Visitor([*mutation_operators, *operators], IgnoredCode(set(), set(), set())))
    made = [each for each in visitor.mutations if not is_prose(each.original_node)]
    return [lambda m=m: tree.module.deep_replace(m.original_node, m.mutated_node).code for m in made]


def few(tests: set[str], seconds: dict[str, float]) -> list[str]:
    """Of many tests, the fastest cases of as many test functions as possible."""
    count, ranked = collections.Counter(), []
    for test in sorted(tests, key=seconds.get):
        function = test.split("[")[0]
        ranked.append((count[function], test))
        count[function] += 1
    return [test for _, test in sorted(ranked, key=lambda pair: pair[0])][:MOST]


def notice(copy: Path, tests: list[str], limit: float) -> bool:
    """Whether a test fails in the copy, or takes too long. Tests run in a fork, which need not import torch again."""
    if tests and not (child := os.fork()):
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # for processes that tests start
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(pytest.main(["-x", "-p", "no:cacheprovider", *tests]))
    deadline, ended = time.monotonic() + limit, (0, 0)
    while tests and not (ended := os.waitpid(child, os.WNOHANG))[0]:
        time.sleep(0.05)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
    return ended[1] != 0


def try_out(copy: Path, sample: int, chance: random.Random, seconds: dict, lines: dict) -> None:
    """Puts one mistake after the other into the copy, and prints what becomes of it."""
    import peft  # noqa: F401 - what each fork would have to import
    import transformers  # noqa: F401

    codes = {file: (copy / file).read_text() for file in sorted(lines) if any(lines[file].values())}
    mistakes, tried, without_effect = {}, {}, Path(__file__).with_suffix(".txt").read_text()
    while len(tried) < sample:
        (file,) = chance.choices(list(codes), list(map(len, codes.values())))
        code = codes[file]
        mistakes[file] = mistakes.get(file) or mistakes_in(code)
        wrong = chance.choice(mistakes[file])() if mistakes[file] else code
        changes = list(difflib.unified_diff(code.splitlines(), wrong.splitlines(), n=0, lineterm=""))[2:]
        shown = "\n".join([file, *(each for each in changes if each[0] in "+-")])
        if not changes or shown in tried or shown in without_effect:
            continue
        line = int(changes[0].split()[1].split(",")[0][1:])
        # of a long statement, only the first line is noted
        noted = min((number for number in lines[file] if lines[file][number]), key=lambda number: abs(number - line))
        over, places = lines[file][noted], {file, os.path.dirname(file).replace("hotswap_lab", "tests", 1)}
        near = {test for test in over if places & {test.split("::")[0], os.path.dirname(test.split("::")[0])}}
        (copy / file).write_text(wrong)
        tried[shown] = "survived"
        for verdict, tests in (("noticed", few(near, seconds)), ("noticed elsewhere", few(over - near, seconds))):
            if tried[shown] == "survived" and notice(copy, tests, 60 + 10 * sum(map(seconds.get, tests))):
                tried[shown] = verdict
        (copy / file).write_text(code)
        what = shown if tried[shown] == "survived" else file
        print(f"{len(tried):3} {tried[shown]}: line {line} of {what}", flush=True)
    print(f"{sample} mistakes:", dict(collections.Counter(tried.values())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=20, help="how many mistakes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--near", action="store_true", help="only the tests next to the code")
    parser.add_argument("--seen", type=Path, help="a folder that keeps which tests run over which line")
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    sys.dont_write_bytecode = True  # two mistakes in one file may have the same size and the same second
    with tempfile.TemporaryDirectory() as copy, tempfile.TemporaryDirectory() as kept:
        skipped = shutil.ignore_patterns(".git", ".venv*", "build", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=skipped, dirs_exist_ok=True)
        found = seen(Path(copy), options.seen or Path(kept), NEAR if options.near else ALL)
        try_out(Path(copy), options.sample, random.Random(options.seed), *found)


if __name__ == "__main__":
    main()
