"""What a widget can't use is refused where it is given, in words, and not taken silently."""

from __future__ import annotations

import pytest
from refusals import refused
from shown import folders

from hotswap_lab import AdapterPool, demo
from hotswap_lab.widgets import RowPanel, SwapPanel

FOLDERS = folders("reverse", "sort")
PATHS = [*FOLDERS.values()]


@pytest.fixture(scope="module")
def given():
    """A model, its tokenizer, a pool with rows, and one without."""
    model, tokenizer = demo.load("reverse")
    rows, one = (AdapterPool(demo.load("reverse")[0], adapters=FOLDERS, rows=n, progress=False) for n in (3, 1))
    return {"model": model, "tokenizer": tokenizer, "pool": rows, "one": one}


#: what is called with which of these and with which other arguments, and the words of the refusal
REFUSED = [
    (SwapPanel, "model", {"adapters": FOLDERS}, "can't run a prompt"),
    (SwapPanel, "model", {"generate": str}, "can't swap adapters in this object"),
    (SwapPanel, "model tokenizer", {"adapters": FOLDERS}, "pass a tokenizer as tokenizer="),
    *((AdapterPool, "model", {"adapters": unnamed}, "have no names") for unnamed in (PATHS, PATHS[1])),
    (SwapPanel, "model", {"tokenizer": ..., "adapters": PATHS}, "have no names"),
    (SwapPanel, "pool", {"tokenizer": ..., "adapters": FOLDERS}, "not both"),
    (SwapPanel, "pool", {"tokenizer": ..., "template": "x>"}, "no place for the prompt"),
    (RowPanel, "pool", {"generate": list, "prompts": ["word"] * 4}, "3 rows"),
    (RowPanel, "pool", {"generate": list, "prompts": "word"}, "prompts: str"),
    (RowPanel, "pool", {"generate": "list", "prompts": ["word"]}, "generate: str"),
    (RowPanel, "model", {"generate": list, "prompts": ["word"]}, "pool: PeftModel"),
    (RowPanel, "one", {"generate": list, "prompts": ["word", "other"]}, "rows=1"),
]


@pytest.mark.parametrize(("widget", "names", "options", "words"), REFUSED)
def test_what_it_cannot_use_is_refused(given, widget, names, options, words):
    options = {name: given[name] if value is ... else value for name, value in options.items()}
    refused(words, widget, *(given[name] for name in names.split()), **options)


def test_what_it_cannot_do_is_refused(given):
    pool = given["pool"]
    panel = SwapPanel(pool, repr, prompt=5)
    refused("The strength is not a number", setattr, panel, "strength", "high")
    assert (panel.strength, panel.run()) == (1, "'5'")
    refused("not a number", setattr, panel, "strength", float("nan"))
    refused("No adapter is called 'nobody'", RowPanel(pool, list, prompts=["word"]).choose, 0, "nobody")
    with pytest.raises(TypeError, match="strengths"):
        SwapPanel(pool, str, strengths=[0, 1])
