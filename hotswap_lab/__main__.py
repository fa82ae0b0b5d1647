"""Adapters from the command line.

hotswap-lab                                a tour: the embedded adapters take turns in one model
hotswap-lab show ADAPTER                   method, ranks, alphas, layers, size, base; also of a folder of adapters
hotswap-lab plan BASE A B                  can B take A's place? The base's weights are not loaded
hotswap-lab verify BASE A B                replace A by B, and compare with a fresh load of B
hotswap-lab mix BASE A:0.7 B:0.3 --out C   save an exact mix as an adapter that PEFT alone loads
hotswap-lab serve BASE FOLDER              serve a folder of adapters with OpenAI's API, in this process
hotswap-lab bench                          time each way of swapping

BASE, ADAPTER, A and B are folders or Hub ids. With --json, each command prints the result or the error as one JSON
document, and everything else to stderr. Exit codes: 0 success; 1 refused, or different from a fresh load; 2 wrong
usage; 3 not decided, such as a plan that needs the base's weights.
"""

import argparse
import contextlib
import inspect
import json
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .core.errors import HotswapError, advise, listing, refused
from .core.numerals import MOST_THREADS, MOST_TIMES, decimal, integer_from
from .core.report import text_table, wrapped
from .files import ADVICE

# each command imports the rest, because torch, transformers and PEFT take two seconds

#: a plan has no weights to add layers with
ADD = "pass add_layers=True to add them, or load the adapter that targets the most layers first"
IN_PLAN: dict[str, str] = ADVICE | {ADD: "use `verify --add-layers`; or plan B A instead, if B has the most layers"}
#: the end of a text that doesn't show all refusals
MORE: re.Pattern[str] = re.compile("in the `refusals` of this (error|plan)")


class Result(dict[str, Any]):
    """The result of a command, for ``--json``, and as text. ``ok`` is None if nothing was decided."""

    def __init__(self, text: object, **fields: Any):
        super().__init__(fields)
        self.text: str = str(text)


def show(adapter: str) -> Result:
    """Describe an adapter, or all adapters in a folder."""
    from .files.summary import summary_of

    folder = Path(adapter)
    configs = [] if (folder / "adapter_config.json").exists() else folder.glob("*/adapter_config.json")
    folders = sorted((config.parent for config in configs), key=_by_number)
    rows, summaries, damaged = [], [], []
    for source in folders or [adapter]:
        try:
            summaries.append(summary_of(source))
            rows.append(summaries[-1].row)
        except HotswapError as error:
            if not folders:
                raise
            damaged.append({"name": source.name, "error": str(error)})
            rows.append((source.name, "damaged: see below", *"-----"))
    table = text_table(("adapter", "method", "ranks", "alphas", "layers", "size", "base"), rows)
    text = "\n".join([*table, *(wrapped(adapter["error"]) for adapter in damaged)])
    return Result(text, ok=not damaged, adapters=[*map(vars, summaries)], damaged=damaged)


def _by_number(folder: Path) -> list[Any]:
    """Return the key to sort by: checkpoint-15 comes before checkpoint-100."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", folder.name)]


def plan(base: str, a: str, b: str) -> Result:
    """Check a swap without loading the base's weights."""
    import torch
    from peft import PeftModel

    from .beyond.base_values import base_weights_in
    from .beyond.configs import FORMS, extra_state
    from .beyond.decide import FreshPlan
    from .files.reading import read
    from .swap import plan_hotswap

    adapters = [read(source, for_one_swap=True) for source in (a, b)]
    configs = [adapter.config for adapter in adapters]
    with torch.device("meta"):
        model = _model(base, is_empty=True)
    for config, adapter in zip(configs, adapters, strict=True):
        needs = [config.peft_type.value]
        if config.peft_type == "LORA":
            # a file may have other base weights than the base model
            needs = [*extra_state(config)] or [*base_weights_in(model, adapter)]
        if needs:
            return _undecided(needs)

    def load(model: Any, adapter: str) -> Any:
        with torch.device("meta"):  # PEFT compares the shapes, and allocates nothing for any rank
            model = PeftModel.from_pretrained(model, adapter, torch_device="cpu", low_cpu_mem_usage=True)
        for path, parameter in list(model.named_parameters()):
            if "lora_" in path:  # a plan needs an adapter's memory, but not its values
                owner, _, name = path.rpartition(".")
                memory = torch.nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
                model.get_submodule(owner)._parameters[name] = memory
        return model

    # no base weights are lost, because A's file has none
    plan = plan_hotswap(_with_adapter(model, a, configs[0], load), b, base_weights={})
    if isinstance(plan, FreshPlan):  # layers would get other tensors, which PEFT makes from the base's weights
        return _undecided([field for field in FORMS if len({getattr(config, field) for config in configs}) > 1])
    plan.refusals[:] = advise(HotswapError(*plan.refusals), IN_PLAN).refusals
    fields = dict(layers=plan.counts, nbytes=plan.nbytes, notes=plan.notes, refusals=[*map(vars, plan.refusals)])
    return Result(wrapped(MORE.sub("printed with --json", str(plan))), ok=plan.ok, **fields)


def _undecided(needs: list[str]) -> Result:
    text = f"not decided without the base's weights: {listing(needs)}; `hotswap-lab verify` loads them"
    return Result(wrapped(text), ok=None, needs=needs)


def verify(base: str, a: str, b: str, add_layers: bool) -> Result:
    """Swap, and compare with a fresh load on the same base."""
    from .swap import hotswap_adapter
    from .verify import InputsError, verify_hotswap

    model, originals = _loaded(base, a)
    hotswap_adapter(model, b, "default", add_layers=add_layers, base_weights=originals)
    try:
        verdict = verify_hotswap(model, b, base=lambda: _model(base))
    except InputsError as error:
        text = f"not decided without inputs of your own: {error.refusals[0].found}"
        return Result(wrapped(f"{text}; in Python, verify_hotswap takes inputs"), ok=None, needs=["inputs"])
    differs = verdict.mismatches or not verdict.difference <= verdict.tolerance
    return Result(wrapped(verdict), ok=bool(verdict) if differs or verdict.conclusive else None, **vars(verdict))


def mix(base: str, adapters: list[tuple[str, float]], out: str) -> Result:
    """Save the sum of adapters, each times its weight, as one adapter, whose rank is the sum of theirs."""
    from .files.summary import summary_of
    from .pools.adapter_pool import AdapterPool
    from .swap import save_adapter

    weights: dict[str, float] = {}
    for path, weight in adapters:
        weights[path] = weights.get(path, 0.0) + weight
    rank = sum(max(summary_of(path).ranks, default=0) for path in weights)
    model, originals = _loaded(base, adapters[0][0])
    how: dict[str, Any] = dict(target_rank=rank, progress=False, base_weights=originals)
    AdapterPool(model, adapters={path: path for path in weights}, **how).swap(weights)
    save_adapter(model, out)
    return Result(f"{out}: rank {rank}", ok=True, out=out, rank=rank)


def _model(base: str, is_empty: bool = False) -> Any:
    """Load the base model, of the class that its config names; if ``is_empty``, make it without its weights."""
    import transformers

    from .files.hub import fetch

    transformers.logging.disable_progress_bar()
    try:
        if not os.path.isdir(base):
            fetch(base, "config.json", {})
        config = transformers.AutoConfig.from_pretrained(base)
        if not config.architectures:
            raise ValueError("its config.json names no class under `architectures`")
        kind = getattr(transformers, config.architectures[0])
        return kind(config) if is_empty else kind.from_pretrained(base, dtype="auto").eval()
    except Exception as error:  # of any kind: transformers has no common one
        raise refused("no_base", base=base, error=error) from error


def _loaded(base: str, adapter: str) -> tuple[Any, Any]:
    """Load the base model and an adapter, and return copies of base weights that the adapter's file overwrites."""
    from peft import PeftModel

    from .beyond.base_values import copies_for
    from .beyond.configs import pointless_rank
    from .files.reading import read

    model, new = _model(base), read(adapter, for_one_swap=True)
    ranks = {"its config": getattr(new.config, "r", 1), **(getattr(new.config, "rank_pattern", None) or {})}
    refusals = [refusal for name, rank in ranks.items() if rank for refusal in pointless_rank(rank, name, model)]
    if refusals:  # PEFT would allocate memory for any rank
        raise HotswapError(*refusals)
    originals = copies_for(model, new)
    return _with_adapter(model, adapter, new.config, PeftModel.from_pretrained), originals


def _with_adapter(model: Any, adapter: str, config: Any, load: Callable[[Any, str], Any]) -> Any:
    try:
        return load(model, adapter)
    except Exception as error:  # of any kind: the adapter of another base fails anywhere in PEFT, or is damaged
        kind, made_for, base = type(model).__name__, config.base_model_name_or_path, model.name_or_path
        bases = f"; the adapter was made for {made_for}, and the base is {base}" if made_for and base else ""
        raise refused("not_for_base", adapter=adapter, kind=kind, error=error, bases=bases) from error


def tour(word: str, repeats: int, threads: int) -> Result:
    """Swap the embedded adapters in one model; show each answer and the time of each swap."""
    from .lessons.tour import tour as run

    return Result("", **run(word, repeats, threads))


def serve(base: str | None, adapters: str, host: str, port: int, arguments: list[tuple[str, str]]) -> Result:
    """Serve a folder of adapters with OpenAI's API, in this process, until Ctrl-C."""
    import asyncio

    from .serving.arguments import named_once
    from .serving.one_process import PortError, run

    model = {"base": base, "adapters": adapters} if base else {}
    try:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(run(model | named_once(arguments), host, port))
    except PortError as error:  # wrong usage: one line, as argparse prints
        (refusal,) = error.refusals
        print(f"hotswap-lab serve: error: {refusal.summary} {refusal.found}; {refusal.next_step}", file=sys.stderr)
        raise SystemExit(2) from None
    return Result("", ok=True)


def _arguments_of_serve() -> str:
    """Describe each argument of the server, and its default."""
    try:
        from .serving import Options, app
    except ImportError as error:  # the command's own help is useful without the server's packages
        return str(error)
    usage = "--set NAME=VALUE, and serve run hotswap_lab.serving:app NAME=VALUE"
    return "\n\n".join([usage, str(inspect.getdoc(app)), str(inspect.getdoc(Options)), f"Defaults: {Options()}"])


def known(word: str) -> str:
    """Check that a word is one that the embedded model was trained for."""
    if not (word.isascii() and word.isalpha() and word.islower() and len(word) <= 10):
        raise argparse.ArgumentTypeError("must be 1 to 10 letters from a to z")
    return word


def path(text: str) -> str:
    """Check that a path isn't empty, as it is if a variable of the shell isn't set."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    return text


def unused(folder: str) -> str:
    """Check that a folder to save in is new or empty, so that no files are replaced."""
    if os.path.exists(path(folder)) and not (os.path.isdir(folder) and not os.listdir(folder)):
        raise argparse.ArgumentTypeError(f"{folder} exists already: must be a new or an empty folder")
    return folder


def weighted(text: str) -> tuple[str, float]:
    adapter, _, weight = text.rpartition(":")
    if (number := decimal(weight)) is None:
        raise argparse.ArgumentTypeError(f"{text} is not ADAPTER:WEIGHT, such as runs/a:0.5")
    return path(adapter), number


def pair(text: str) -> tuple[str, str]:
    name, is_pair, value = text.partition("=")
    if not is_pair:
        raise argparse.ArgumentTypeError(f"{text} is not NAME=VALUE, such as rows=4")
    return name, value


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("hotswap-lab", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(run: Callable[..., Result], *names: str) -> Callable[..., Any]:
        parser = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        parser.set_defaults(run=run)
        for name in names:
            parser.add_argument(name, type=path)
        parser.add_argument("--json", action="store_true", help="print the result as JSON, all else to stderr")
        return parser.add_argument

    add = command(tour)
    add("--word", type=known, default="hotswap", help="the input to the model, 1 to 10 letters")
    add("--repeats", type=integer_from(1, MOST_TIMES), default=15, help="timed swaps of each kind")
    add("--threads", type=integer_from(1, MOST_THREADS), default=1, help="number of threads for torch")
    command(show, "adapter")
    command(plan, "base", "a", "b")
    command(verify, "base", "a", "b")("--add-layers", action="store_true", help="add the layers that A lacks")
    add = command(mix, "base")
    add("adapters", type=weighted, nargs="+", metavar="ADAPTER:WEIGHT")
    add("--out", required=True, type=unused, help="the folder to save the mix in: a new or an empty one")
    add = command(serve)
    add("base", nargs="?", help="without it, the embedded model and its adapters")
    add("adapters", nargs="?", default="", help="a folder of adapters, or name=path,name=path")
    add("--host", default="127.0.0.1")
    add("--port", type=integer_from(0, 65535), default=8000)
    how = "arguments of the server; they are listed at the end of --help"
    add("--set", nargs="*", default=[], metavar="NAME=VALUE", dest="arguments", help=how, type=pair, action="extend")
    commands.add_parser("bench", help="time each way of swapping: hotswap-lab bench --help")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack characters of a name
    try:
        try:
            return _main(sys.argv[1:] if arguments is None else arguments)
        finally:
            sys.stdout.flush()  # not at Python's exit, where an error can't be handled
    except BrokenPipeError:  # from `head`, for example
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at exit
        return 0


def _main(arguments: list[str]) -> int:
    as_json = "--json" in arguments and arguments[:1] != ["bench"]
    try:
        if arguments[:1] == ["bench"]:
            from .bench import main as bench

            return bench(arguments[1:])
        arguments = sorted(arguments, key="--json".__eq__)  # last, because it may be before the command
        if not arguments or (arguments[0].startswith("--") and arguments[0] != "--help"):
            arguments = ["tour", *arguments]
        options = vars(_parser().parse_args(arguments))
        run, *_ = (options.pop(name) for name in ("run", "json", "command"))
        with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers warns of its own code
            result = run(**options)
        print(_as_json(result) if as_json else result.text)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:  # a HotswapError is a ValueError
        advised = advise(error, ADVICE) if isinstance(error, HotswapError) else error
        if as_json:
            refusals = [*map(vars, getattr(advised, "refusals", ()))]
            print(_as_json({"ok": False, "error": str(advised), "refusals": refusals}))
        print(wrapped(MORE.sub("printed with --json", str(advised))), file=sys.stderr)
        return 1
    except SystemExit as error:
        if as_json and error.code == 2:
            print(_as_json({"ok": False, "error": "wrong usage: see stderr"}))
        if arguments[:1] == ["serve"] and not error.code:  # after --help only, because the import takes two seconds
            print(f"\n{_arguments_of_serve()}")
        raise
    return {False: 1, None: 3}.get(result.get("ok", True), 0)


def _as_json(fields: dict[str, Any]) -> str:
    """Format as one JSON document, with null for NaN and infinity, which JSON lacks."""
    return json.dumps(json.loads(json.dumps(fields, default=str), parse_constant=lambda _: None), indent=2)


if __name__ == "__main__":
    sys.exit(main())
