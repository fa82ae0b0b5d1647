"""What refusals advise can be done: each call that they name exists and takes these arguments."""

from __future__ import annotations

import ast
import configparser
import inspect
import re
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from models import KINDS, load, save_family, save_random_adapter
from oracle import assert_equals_fresh_load
from peft import PeftModel
from refusals import refused
from transformers import TrainingArguments

import hotswap_lab
from hotswap_lab import (
    Adapter,
    AdapterPool,
    aoti_compile,
    aoti_load,
    demo,
    hotswap_adapter,
    prepare_model_for_compiled_hotswap,
    verify_hotswap,
)
from hotswap_lab.widgets import RowPanel, SwapPanel
from hotswap_lab.widgets.work import WorkingView

#: what the names in the texts are
CALLABLE = (Adapter, AdapterPool, PeftModel, RowPanel, aoti_load, hotswap_adapter)
NAMES = {each.__name__: each for each in CALLABLE}
NAMES |= {"hotswap_lab": hotswap_lab, "pool": AdapterPool, "pipe": FluxPipeline}
#: what is the user's own, or of PyTorch: any function will do
OWN = {"generate", "clear", "Parameter"}
#: which functions take an argument that is only named
TAKEN_BY = {
    **dict.fromkeys(("add_layers", "base_weights"), (hotswap_adapter,)),
    **dict.fromkeys(("target_rank", "check_compiled", "adapters"), (prepare_model_for_compiled_hotswap, AdapterPool)),
    **dict.fromkeys(("tokenizer", "template"), (SwapPanel,)),
    "rows": (AdapterPool,),
    "order": (AdapterPool.assign, AdapterPool.assigned),
    "repeated_blocks": (aoti_compile,),
    "inputs": (verify_hotswap,),
    "is_trainable": (PeftModel.from_pretrained,),
    "foreach": (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad),
    "optim": (TrainingArguments,),
}
CALL = re.compile(r"[\w.]*\w\([^()]*(?:\([^()]*\)[^()]*)*\)|\.\w+\(\)")
NAMED = re.compile(r"\b(\w+)=(?=\S)")


def texts():
    for path in sorted(Path(hotswap_lab.__file__).parent.rglob("refusals.ini")):
        parser = configparser.ConfigParser(interpolation=None, delimiters=("=",))
        parser.read(path, encoding="utf-8")
        yield from ((name, parser[name]["next"].replace("\n", " ")) for name in parser.sections())


ADVICE = {name: text for name, text in texts() if CALL.search(text) or NAMED.search(text)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(KINDS["llama"], save_random_adapter(KINDS["llama"], tmp_path_factory.mktemp("adapter"), 1, r=2))


@pytest.mark.parametrize("name", ADVICE)
def test_what_is_advised_can_be_called(name, model):
    # values that are filled in are numbers here; an ellipsis is any argument
    text = re.sub(r"\{\{.*?\}\}|\{[^{}]*\}", "0", ADVICE[name])
    calls = CALL.findall(text)
    assert calls or NAMED.search(text)
    for call in calls:
        node = ast.parse(call.lstrip("."), mode="eval").body
        *path, last = ast.unparse(node.func).split(".")
        if last in OWN:
            continue
        named = NAMES.get(path[0] if path else last)
        # what has no name before it is a method of the model, of a widget, or of a pipeline
        owner = named or next(each for each in (model, WorkingView, FluxPipeline) if hasattr(each, last))
        function = named if named and not path else getattr(owner, last)
        # a method of a class gets its object first
        of_class = inspect.isclass(owner) and function is not owner and not inspect.ismethod(function)
        arguments = [owner] * bool(of_class) + [0] * len(node.args)
        inspect.signature(function).bind(*arguments, **{each.arg: 0 for each in node.keywords})
    for argument in NAMED.findall(CALL.sub("", text)):
        for function in TAKEN_BY[argument]:
            parameters = inspect.signature(function).parameters
            assert argument in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def test_the_advice_for_a_folder_of_adapters_is_a_line_to_paste():
    error = refused("have no names", AdapterPool, demo.load("reverse")[0], adapters=str(demo.ADAPTERS_DIR))
    line = error.refusals[0].next_step.partition("adapters=")[2]
    named = eval(line, {"Path": Path, "folder": demo.ADAPTERS_DIR})
    assert named == {name: demo.adapter_path(name) for name in demo.adapter_names()}


def test_advice_leads_somewhere_for_dora_in_a_model_prepared_for_lora(tmp_path):
    """It is not to prepare for it, which is refused in turn."""
    kind = KINDS["llama"]
    old, dora = save_family(kind, tmp_path, dict(r=4), dict(r=4, use_dora=True))
    model = load(kind, old)
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    error = refused("in a model that is not prepared", hotswap_adapter, model, dora, "default")
    assert "among `adapters`" not in str(error)
    plain = load(kind, old)
    refused("in a model that is not prepared", prepare_model_for_compiled_hotswap, plain, adapters=[dora])
    hotswap_adapter(plain, dora, "default")
    assert_equals_fresh_load(plain, kind, dora)


def test_advice_of_a_pool_on_a_compiled_model_names_no_other_function():
    model, _ = demo.load("reverse")
    compiled, family = torch.compile(model, backend="eager"), {"sort": demo.adapter_path("sort")}
    error = refused("compiled already", AdapterPool, compiled, adapters=family, progress=False)
    assert "was called" not in str(error)
