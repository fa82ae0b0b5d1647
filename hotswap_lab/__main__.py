"""Adapters from the command line.

hotswap-lab                                a tour: the embedded adapters take turns in one model
hotswap-lab show ADAPTER                   method, ranks, alphas, layers, size, base; also of a folder of adapters
hotswap-lab plan BASE A B                  can B take A's place? The base's weights are not loaded
hotswap-lab verify BASE A B                swap A for B, and compare with a fresh load of B
hotswap-lab mix BASE A:0.7 B:0.3 --out C   save an exact mix as an adapter that PEFT alone loads
hotswap-lab serve BASE FOLDER              OpenAI's API in front of a folder of adapters, in this process
hotswap-lab bench                          times of each way of swapping

BASE, ADAPTER, A and B are folders or Hub ids. Each takes --json: one JSON document is printed, of what was found or of
the error, and all else to stderr. Exit codes: 0 fine; 1 refused, or different from a fresh load; 2 wrong use; 3 not
decided, as a plan that needs the base's weights.
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
from .core.numerals import MOST_THREADS, decimal, integer_from
from .core.report import text_table, wrapped
from .files import ADVICE

# each command imports what else it needs, because torch, transformers and PEFT take two seconds

#: a plan has no values to add layers with
ADD = "pass add_layers=True to add them, or load the adapter that targets the most layers first"
IN_PLAN: dict[str, str] = ADVICE | {ADD: "use `verify --add-layers`; or plan B A instead, if B has the most layers"}
#: the end of a text that doesn't show all refusals
MORE: re.Pattern[str] = re.compile("in the `refusals` of this (error|plan)")


class Told(dict[str, Any]):
    """What a command found, for ``--json``, and as text. ``ok`` is None where nothing was decided."""

    def __init__(self, text: object, **found: Any):
        super().__init__(found)
        self.text: str = str(text)


def show(adapter: str) -> Told:
    """An adapter, or each of a folder of them."""
    from .files.summary import summary_of

    folder = Path(adapter)
    inside = [] if (folder / "adapter_config.json").exists() else [*folder.glob("*/adapter_config.json")]
    rows, told, damaged = [("adapter", "method", "ranks", "alphas", "layers", "size", "base")], [], []
    for each in sorted((file.parent for file in inside), key=_in_order) or [adapter]:
        try:
            told.append(summary_of(each))
            rows.append(told[-1].row)
        except HotswapError as error:
            if not inside:
                raise
            damaged.append({"name": Path(each).name, "error": str(error)})
            rows.append((Path(each).name, "damaged: see below", *"-----"))
    text = "\n".join([*text_table(rows[0], rows[1:]), *(wrapped(each["error"]) for each in damaged)])
    return Told(text, ok=not damaged, adapters=[vars(each) for each in told], damaged=damaged)


def _in_order(folder: Path) -> list[Any]:
    """The key to sort by: checkpoint-15 comes before checkpoint-100."""
    return [int(each) if each.isdecimal() else each for each in re.split(r"(\d+)", folder.name)]


def plan(base: str, a: str, b: str) -> Told:
    """A dry run on a base that has shapes and no values."""
    import torch
    from peft import PeftModel

    from .beyond.base_values import base_weights_in
    from .beyond.configs import FORMS, extra_state
    from .beyond.decide import FreshPlan
    from .files.reading import read
    from .swap import plan_hotswap

    adapters = [read(each, for_one_swap=True) for each in (a, b)]
    configs = [each.config for each in adapters]
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
            if "lora_" in path:  # an adapter needs memory to be planned for, though no values
                owner, _, name = path.rpartition(".")
                memory = torch.nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
                model.get_submodule(owner)._parameters[name] = memory
        return model

    # no base weights are lost, because A's file has none
    found = plan_hotswap(_with_adapter(model, a, configs[0], load), b, base_weights={})
    if isinstance(found, FreshPlan):  # layers would get other tensors, which PEFT makes from the base's weights
        return _undecided([each for each in FORMS if len({getattr(config, each) for config in configs}) > 1])
    found.refusals[:] = advise(HotswapError(*found.refusals), IN_PLAN).refusals
    reasons = [vars(each) for each in found.refusals]
    text = wrapped(MORE.sub("printed with --json", str(found)))
    return Told(text, ok=found.ok, layers=found.counts, nbytes=found.nbytes, notes=found.notes, refusals=reasons)


def _undecided(needs: list[str]) -> Told:
    found = f"not decided without the base's weights: {listing(needs)}; `hotswap-lab verify` loads them"
    return Told(wrapped(found), ok=None, needs=needs)


def verify(base: str, a: str, b: str, add_layers: bool) -> Told:
    """A swap, compared with a fresh load on the same base."""
    from .swap import hotswap_adapter
    from .verify import InputsError, verify_hotswap

    model, originals = _loaded(base, a)
    hotswap_adapter(model, b, "default", add_layers=add_layers, base_weights=originals)
    try:
        verdict = verify_hotswap(model, b, base=lambda: _model(base))
    except InputsError as error:
        found = f"not decided without inputs of your own: {error.refusals[0].found}"
        return Told(wrapped(f"{found}; in Python, verify_hotswap takes inputs"), ok=None, needs=["inputs"])
    differs = verdict.mismatches or not verdict.difference <= verdict.tolerance
    return Told(wrapped(verdict), ok=bool(verdict) if differs or verdict.conclusive else None, **vars(verdict))


def mix(base: str, adapters: list[tuple[str, float]], out: str) -> Told:
    """The sum of adapters, each times its weight, as one adapter, whose rank is the sum of theirs."""
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
    return Told(f"{out}: rank {rank}", ok=True, out=out, rank=rank)


def _model(base: str, is_empty: bool = False) -> Any:
    """The base model, of the class that its config names; or only its modules, whatever torch's default device is."""
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
    """The base model with an adapter that PEFT loads, and the base weights that the adapter's file overwrites."""
    from peft import PeftModel

    from .beyond.base_values import copies_for
    from .beyond.configs import pointless_rank
    from .files.reading import read

    model, found = _model(base), read(adapter, for_one_swap=True)
    ranks = {"its config": getattr(found.config, "r", 1), **(getattr(found.config, "rank_pattern", None) or {})}
    if refusals := [each for name, rank in ranks.items() if rank for each in pointless_rank(rank, name, model)]:
        raise HotswapError(*refusals)  # PEFT would allocate any
    originals = copies_for(model, found)
    return _with_adapter(model, adapter, found.config, PeftModel.from_pretrained), originals


def _with_adapter(model: Any, adapter: str, config: Any, load: Callable[[Any, str], Any]) -> Any:
    try:
        return load(model, adapter)
    except Exception as error:  # of any kind: the adapter of another base fails anywhere in PEFT, or is damaged
        kind, made_for, base = type(model).__name__, config.base_model_name_or_path, model.name_or_path
        bases = f"; the adapter was made for {made_for}, and the base is {base}" if made_for and base else ""
        raise refused("not_for_base", adapter=adapter, kind=kind, error=error, bases=bases) from error


def tour(word: str, repeats: int, threads: int) -> Told:
    """The embedded adapters take turns in one model: each answer, and what each swap takes."""
    from .lessons.tour import tour as run

    return Told("", **run(word, repeats, threads))


def serve(base: str | None, adapters: str, host: str, port: int, arguments: list[tuple[str, str]]) -> Told:
    """OpenAI's API in front of a folder of adapters, in this process, until Ctrl-C."""
    import asyncio

    from .serving.arguments import named_once
    from .serving.one_process import PortError, run

    given = {"base": base, "adapters": adapters} if base else {}
    try:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(run(given | named_once(arguments), host, port))
    except PortError as error:  # wrong use: one line, as of an argument that is out of its range
        (found,) = error.refusals
        print(f"hotswap-lab serve: error: {found.summary} {found.found}; {found.next_step}", file=sys.stderr)
        raise SystemExit(2) from None
    return Told("", ok=True)


def _arguments_of_serve() -> str:
    """The meaning of each argument of the server, and its default."""
    try:
        from .serving import Options, app
    except ImportError as error:  # the command's own help is of use without the server's packages
        return str(error)
    usage = "--set NAME=VALUE, and serve run hotswap_lab.serving:app NAME=VALUE"
    return "\n\n".join([usage, str(inspect.getdoc(app)), str(inspect.getdoc(Options)), f"Defaults: {Options()}"])


def known(word: str) -> str:
    """A word as the embedded model was trained on."""
    if not (word.isascii() and word.isalpha() and word.islower() and len(word) <= 10):
        raise argparse.ArgumentTypeError("must be 1 to 10 letters from a to z")
    return word


def path(text: str) -> str:
    """A folder or a Hub id; an empty one is that of a variable of the shell that isn't set."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    return text


def unused(folder: str) -> str:
    """A folder to save in: nothing that is there already is replaced."""
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

    def command(run: Callable[..., Told], *names: str) -> Callable[..., Any]:
        added = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        added.set_defaults(run=run)
        for name in names:
            added.add_argument(name, type=path)
        added.add_argument("--json", action="store_true", help="print what was found as JSON, all else to stderr")
        return added.add_argument

    add = command(tour)
    add("--word", type=known, default="hotswap", help="the word that the model is asked, 1 to 10 letters")
    add("--repeats", type=integer_from(1), default=15, help="swaps per figure")
    add("--threads", type=integer_from(1, MOST_THREADS), default=1, help="threads that torch may use")
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
    how = "an argument of the server: --help ends with what each means"
    add("--set", nargs="*", default=[], metavar="NAME=VALUE", dest="arguments", help=how, type=pair, action="extend")
    commands.add_parser("bench", help="times of each way of swapping: hotswap-lab bench --help")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code."""
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal without the characters of a name
    try:
        try:
            return _main(sys.argv[1:] if arguments is None else arguments)
        finally:
            sys.stdout.flush()  # here, and not at Python's end, where an error can't be handled
    except BrokenPipeError:  # such as `head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes at its end
        return 0


def _main(given: list[str]) -> int:
    as_json = "--json" in given and given[:1] != ["bench"]
    try:
        if given[:1] == ["bench"]:
            from .bench import main as bench

            return bench(given[1:])
        given = sorted(given, key="--json".__eq__)  # last, because it may stand before the command
        if not given or (given[0].startswith("--") and given[0] != "--help"):
            given = ["tour", *given]
        options = vars(_parser().parse_args(given))
        run, *_ = (options.pop(each) for each in ("run", "json", "command"))
        with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers' own, of its own code
            told = run(**options)
        print(_as_json(told) if as_json else told.text)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:  # a HotswapError is a ValueError
        advised = advise(error, ADVICE) if isinstance(error, HotswapError) else error
        if as_json:
            reasons = [vars(each) for each in getattr(advised, "refusals", ())]
            print(_as_json({"ok": False, "error": str(advised), "refusals": reasons}))
        print(wrapped(MORE.sub("printed with --json", str(advised))), file=sys.stderr)
        return 1
    except SystemExit as error:
        if as_json and error.code == 2:
            print(_as_json({"ok": False, "error": "wrong use, as stderr says"}))
        if given[:1] == ["serve"] and not error.code:  # after --help alone, because the import takes two seconds
            print(f"\n{_arguments_of_serve()}")
        raise
    return {False: 1, None: 3}.get(told.get("ok", True), 0)


def _as_json(told: dict[str, Any]) -> str:
    """As one JSON document: JSON has no NaN and no infinity, which are null."""
    return json.dumps(json.loads(json.dumps(told, default=str), parse_constant=lambda _: None), indent=2)


if __name__ == "__main__":
    sys.exit(main())
