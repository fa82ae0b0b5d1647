"""The arguments of a server, with and without Ray Serve. They are checked before anything starts.

Tests: ``tests/serving/test_build.py``.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoTokenizer

from .. import demo
from ..beyond.base_values import copies_for
from ..core.errors import HotswapError, listing, refusal, refused
from ..core.numerals import integer
from ..files.hub import fetch
from ..files.reading import read
from .replica import Options, Replica
from .table import Version, check_rank

#: for the embedded model
DEMO: dict[str, Any] = {"base": str(demo.BASE_DIR), "adapters": str(demo.ADAPTERS_DIR), "target_rank": 48}
DEMO |= {"longest_prompt": 32, "longest_answer": 32}
#: the numbers among the arguments, with their defaults; if the default isn't 0, the number must be positive
NUMBERS: dict[str, int] = {"replicas": 1}
NUMBERS |= {option.name: option.default for option in fields(Options) if isinstance(option.default, int)}
TEXTS: list[str] = [option.name for option in fields(Options) if isinstance(option.default, str)]


@dataclass(frozen=True)
class Arguments:
    """The checked arguments of a server: see :func:`hotswap_lab.serving.app`. ``name`` is the base model's."""

    base: str
    name: str
    adapters: dict[str, str]
    options: Options
    token: str = ""
    replicas: int = 1

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> "Arguments":
        """Check the arguments. One error lists everything that is wrong."""
        defaults = {"adapters": ""} if "base" in args else DEMO
        values = {"token": os.environ.get("HOTSWAP_ADMIN_TOKEN"), **defaults, **args}
        base, adapters, token = (values.pop(name) for name in ("base", "adapters", "token"))
        model, refusals = base if "base" in args else "demo", []
        if unknown := [name for name in values if name not in (*NUMBERS, *TEXTS)]:
            known = ", ".join(["base", "adapters", "token", *NUMBERS, *TEXTS])
            refusals.append(refusal("unknown_argument", found=listing(unknown), known=known))

        def checked(check: Callable, *arguments: Any) -> Any:
            try:
                return check(*arguments)
            except HotswapError as error:
                refusals.extend(error.refusals)

        numbers = {name: checked(_number, name, values.get(name, default)) for name, default in NUMBERS.items()}
        replicas = numbers.pop("replicas")
        options = Options(**numbers, **{name: str(values.get(name, "")) for name in TEXTS})
        if options.dtype and not isinstance(getattr(torch, options.dtype, None), torch.dtype):
            refusals.append(refusal("bad_dtype", dtype=options.dtype))
        if not refusals:
            options = checked(_for_base, options, base)
        folders = checked(folders_of, adapters)
        if adapters and folders == {}:
            refusals.append(refusal("no_adapters", found=adapters))
        for name, path in (folders or {}).items():
            checked(_check_adapter, name, path, model, options.target_rank if options else 0)
        if refusals:
            raise HotswapError(*refusals)
        return cls(base, model, folders, options, str(token or ""), replicas)


def load_replica(base: str, versions: Sequence[Version], options: Options) -> Replica:
    """Load a language model from a folder or the Hub, and make a replica of it."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if base == str(demo.BASE_DIR):
        tokenizer.chat_template = "{{ messages[-1]['content'] }}" + demo.SEPARATOR
    model = demo.load_quietly(base, options.dtype or "auto").to("cuda" if torch.cuda.is_available() else "cpu")
    originals = {}
    if versions:
        originals = copies_for(model, versions[0].load())
        model = PeftModel.from_pretrained(model, versions[0].path)
    else:  # adapters that come later need layers to go into
        targets = options.targets if options.layers else "all-linear"
        model = get_peft_model(model, LoraConfig(r=options.target_rank or 8, target_modules=targets))
    return Replica(model, tokenizer, versions, options, originals)


def folders_of(adapters: str | Mapping[str, str]) -> dict[str, str]:
    """Return adapters by name, from a folder of them, or from ``name=path,name=path``."""
    if not isinstance(adapters, str):
        return {str(name): str(path) for name, path in adapters.items()}
    if "=" in adapters and not os.path.isdir(adapters):  # Hydra names folders lr=0.1
        pairs = [pair.partition("=") for pair in adapters.split(",")]
        return named_once([(name, path) for name, _, path in pairs])
    configs = Path(adapters).glob("*/adapter_config.json") if adapters else ()
    return {path.parent.name: str(path.parent) for path in sorted(configs)}


def named_once(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return the values by name; refuse a name that comes twice."""
    counts = Counter(name for name, _ in pairs)
    if repeated := [name for name, count in counts.items() if count > 1]:
        raise refused("named_twice", names=listing(map(repr, repeated)))
    return dict(pairs)


def _number(name: str, value: object) -> int:
    default, text = NUMBERS[name], str(value).lower()
    least = int(default > 0 and default is not True)
    if isinstance(default, bool):
        text = {"true": "1", "false": "0"}.get(text, text)
    number = integer(text)
    if number is None or number < least:
        raise refused("bad_number", name=name, value=value, least=least)
    return number


def _for_base(options: Options, base: str) -> Options:
    try:
        if not os.path.isdir(base):
            fetch(base, "config.json", {})
        config, _ = AutoConfig.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    except Exception as error:  # of any kind: transformers has no common one
        raise refused("no_base", base=base, error=error) from None
    return options.for_model(config)


def _check_adapter(name: str, path: str, base: str, target_rank: int) -> None:
    Version.of(name, path, base)
    if target_rank:
        check_rank(name, read(path, only_config=True).config, target_rank)
