"""The one exception."""

import ast
import configparser
import pickle
import re
import string
from pathlib import Path

import pytest

import hotswap_lab
import hotswap_lab.serving
import hotswap_lab.widgets
from hotswap_lab import HotswapError
from hotswap_lab.core.errors import Refusal, listing, refused
from hotswap_lab.core.report import html_table

PACKAGE = Path(hotswap_lab.__file__).parent


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_it_is_what_code_for_peft_catches(kind):
    with pytest.raises(kind):
        raise refused("merged", adapter_name="default")


def test_an_error_without_words_is_named_by_its_class():
    assert "found:    AssertionError: AssertionError" in str(
        refused("layers_not_addable", error=AssertionError(), paths="")
    )


def test_it_survives_pickling():
    error = HotswapError(*[Refusal(f"s{number}", "f", "e", f"n{number}") for number in range(5)])
    twin = pickle.loads(pickle.dumps(error))
    assert str(error).endswith("... and 2 more, all in the `refusals` of this error")
    assert str(twin) == str(error)
    assert twin.refusals == error.refusals


def test_the_same_for_many_layers_is_shown_once():
    layers = [Refusal(f"layer {number}", "f", "e", "pass the config") for number in range(16)]
    other = Refusal("other", "f", "e", "n")
    shown = re.findall("^layer|^other|and .. more", str(HotswapError(*layers, other)), re.M)
    assert shown == ["layer", "other", "and 15 more"]
    assert str(HotswapError(*layers[:3])).count("layer") == 3


def test_listing():
    assert listing([]) == ""
    assert listing(["a"]) == "a"
    assert listing(range(10), limit=3) == "0, 1, 2 and 7 more"


def _texts():
    for path in PACKAGE.rglob("refusals.ini"):
        parser = configparser.ConfigParser(interpolation=None, delimiters=("=",))
        parser.read(path, encoding="utf-8")
        yield from ((name, dict(parser[name])) for name in parser.sections())


def _calls():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            named = isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", None))
            if named in ("refuse", "refused", "refusal") and node.args and isinstance(node.args[0], ast.Constant):
                yield f"{path.name}:{node.lineno}", node.args[0].value, {each.arg for each in node.keywords}


#: with PEFT's own wording
LONG = {"target_rank_not_for_groups", "nothing_to_prepare", "target_rank_too_low"}


def test_every_refusal_has_a_text_with_all_of_its_values_and_every_text_a_refusal():
    texts = list(_texts())
    assert len(dict(texts)) == len(texts), "two texts of one name"
    texts = dict(texts)
    used = set()
    for where, name, values in _calls():
        text = texts[name]
        assert list(text) == ["summary", "found", "expected", "next"], where
        # the first line has the reason, in a hundred characters, and lists come after it
        assert name in LONG or len(re.sub(r"\{[^}]*\}", "pig_latin", text["summary"])) <= 100, name
        assert not {"{keys}", "{missing}"} & {*re.findall(r"\{\w+\}", text["summary"])}, name
        fields = {
            field.split(".")[0] for part in text.values() for _, field, _, _ in string.Formatter().parse(part) if field
        }
        assert fields == values, where
        used.add(name)
    assert used == texts.keys()
    assert len(used) > 60


def test_everything_in_a_table_is_escaped():
    evil = "<script>alert(1)</script>"
    html = html_table(evil, [evil], [[evil]], caption=evil, above=[evil], notes=[evil])
    assert "<script>" not in html
    assert html.count("&lt;script&gt;") == 6
