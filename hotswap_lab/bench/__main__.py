"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import __doc__ as description
from . import run
from .settings import DTYPES, SHAPES, Settings

#: default rounds of --cold; in a round, each way takes from seconds to a minute
ROUNDS = 3
COLD = f"only: from the start of a process to its first answer, in that many rounds ({ROUNDS}), with --threads"


def main(arguments: list[str] | None = None) -> int:
    default = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m hotswap_lab.bench",
        description=description.replace("::", ":"),  # the site needs two
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", choices=SHAPES, default=default.model, help="the shape; smollm2 is SmolLM2-135M's")
    add("--layers", type=int, help="another number of layers than the model has")
    add("--rank", dest="ranks", type=int, nargs="+", default=default.ranks, help="of the adapters: a table for each")
    add("--target-rank", type=int, help="what prepared models have room for (default: the rank of the adapters)")
    add("--dtype", choices=DTYPES, default=default.dtype, help="of model and adapters")
    add("--device", default=default.device, help="where the model is")
    add("--threads", type=int, default=default.threads, help="threads that torch may use")
    add("--n", type=int, default=default.n, help="timed calls of each way")
    add("--compiled", action="store_true", help="also: first output after a swap in a compiled model; forward time")
    add("--backend", help="of torch.compile (default: inductor where it works)")
    add("--tokens", type=int, default=default.tokens, help="input length of the forward call that --compiled times")
    add("--rows", action="store_true", help="also: a batch with another adapter in each row; assigning its rows")
    add("--cold", type=int, nargs="?", const=ROUNDS, default=default.cold, metavar="ROUNDS", help=COLD)
    add("--json", metavar="FILE", help="write everything there, times in seconds")
    add("--plot", metavar="FILE", help="draw finished swaps there, as SVG")
    add("--quiet", action="store_true", help="print the report only, not what is being done")
    options = vars(parser.parse_args(arguments))
    quiet, json_file, plot_file = (options.pop(name) for name in ("quiet", "json", "plot"))
    if options["cold"] and plot_file:
        parser.error("--plot draws swaps, and --cold measures none")
    try:
        settings = Settings(**{**options, "ranks": tuple(options["ranks"])})
    except ValueError as error:
        parser.error(str(error))
    report = run(settings, (lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr, flush=True)))
    print(report)
    if json_file:
        Path(json_file).write_text(report.to_json() + "\n", encoding="utf-8")
    if plot_file:
        Path(plot_file).write_text(report.figure().svg, encoding="utf-8")
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
