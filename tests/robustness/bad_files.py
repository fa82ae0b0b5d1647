"""The long form of test_bad_files.py: ``python tests/robustness/bad_files.py --mutations 4000``.

Every mutation is tried in turn on every seed, with choices drawn from ``--seed``; every third time with one or two
more on top, and on plain LoRA by each of the ways in: ``hotswap_adapter``, a plan whose files change before it is
committed, ``AdapterPool.add`` and ``swap``, and ``prepare_model_for_compiled_hotswap``. Prints a table, and each
trial that did not end as promised; leaves with 1 if there is any.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path
from random import Random

HERE = Path(__file__).parent
sys.path[:0] = map(str, (HERE, HERE.parent, HERE.parent / "beyond"))


def plan_trials(count: int, seed: int):
    """Seed, mutations and way of each trial; the same for the same numbers."""
    from mutations import mutations_for
    from seeds import SEEDS

    pairs = [(name, mutation) for name, each in SEEDS.items() for mutation in mutations_for(each.is_bin)]
    for number, (name, mutation) in enumerate(itertools.islice(itertools.cycle(pairs), count)):
        draw = Random(f"{seed}/{number}")
        more = draw.sample(mutations_for(SEEDS[name].is_bin), draw.choice([0, 0, 0, 0, 1, 2]))
        ways = ["hotswap", "hotswap", "plan", *(["pool", "prepare"] if SEEDS[name].is_plain else [])]
        yield (
            name,
            [(each, Random(f"{seed}/{number}/{rank}")) for rank, each in enumerate((mutation, *more))],
            draw.choice(ways),
        )


def run_trials(laboratory, count: int, seed: int, say=lambda line: None):
    """Tries ``count`` mutations; returns the tally."""
    from trials import Tally

    tally, start = Tally(), time.monotonic()
    for number, (name, mutations, way) in enumerate(plan_trials(count, seed)):
        trial = laboratory.attempt(name, mutations, way)
        tally.add(mutations[0][0].__name__, trial)
        for problem in trial.problems:
            say(f"--- {number}: {trial}\n{problem}")
        if number % 250 == 249:
            seconds = time.monotonic() - start
            say(f"{tally}\n{number + 1} tried in {seconds:.0f} s, {len(tally.failures)} not as promised")
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=4000, help="how many folders to try")
    parser.add_argument("--seed", type=int, default=0, help="another number gives other mutations")
    arguments = parser.parse_args()
    start = time.monotonic()
    from trials import Laboratory

    with tempfile.TemporaryDirectory() as folder, Laboratory(Path(folder)) as laboratory:
        tally = run_trials(laboratory, arguments.mutations, arguments.seed, lambda line: print(line, flush=True))
    print(tally)
    print(f"{arguments.mutations} mutations, {len(tally.failures)} not as promised, {time.monotonic() - start:.0f} s")
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
