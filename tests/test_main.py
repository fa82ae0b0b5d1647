"""The tour in the terminal, run as a user runs it."""

from __future__ import annotations

import inspect
import pydoc
import re
import subprocess
import sys

import pytest

import hotswap_lab
from hotswap_lab import __main__ as main_module
from hotswap_lab import demo
from hotswap_lab.__main__ import compare
from hotswap_lab.bench import Row, Timing


@pytest.mark.long
def test_the_tour():
    done = subprocess.run(
        [sys.executable, "-m", "hotswap_lab", "--word", "banana", "--repeats", "2"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.strip()}
    for name in demo.adapter_names():
        assert lines[name][1:3] == [demo.TASKS[name]("banana"), "True"]
        assert lines[name][4] == "ms"
    assert "PEFT hotswap refuses pig_latin: Configs are incompatible: for use_rslora" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_a_wrong_swap_ends_in_an_error(monkeypatch, capsys):
    def wrong(name, repeats):
        time = Timing(0.002, 0.001, 3)
        ours, theirs = Row("", "ours", "wrong", time), Row("", "PEFT", "refused", note="no")
        return [ours, theirs, Row("", "PEFT load", "right", time)]

    monkeypatch.setattr(main_module, "compare", wrong)
    assert main_module.main(["--repeats", "1", "--word", "abcdefghij"]) == 1
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    # right-aligned, with the ratio
    assert [line[36:] for line in out.splitlines() if "wrong" in line[:50]] == [
        f"2 ms wrong   refused{'2 ms    1x':>22}"
    ] * 8
    assert "False" in out
    assert "2 ms wrong" in out
    assert "PEFT hotswap refuses sort: no" in out


@pytest.mark.parametrize("word", ["Hot swap", "understanding"])
def test_words_the_model_does_not_know_are_refused(capsys, word):
    with pytest.raises(SystemExit):
        main_module.main(["--word", word])
    assert "--word must be 1 to 10 letters from a to z" in capsys.readouterr().err


def test_pefts_hotswap_is_judged_by_the_same_oracle():
    """shout lacks most layers of reverse: PEFT can do that. sort has patterns: PEFT refuses."""
    _, theirs, _ = compare("shout", 2)
    assert theirs.state == "right"
    ours, theirs, load_delete = compare("sort", 2)
    assert (theirs.timing, ours.state, load_delete.state) == (None, "right", "right")
    assert main_module.shown(theirs).strip() == "refused"


def test_help_is_a_tour_of_one_page():
    text = pydoc.render_doc(hotswap_lab, renderer=pydoc.plaintext)
    assert len(text.splitlines()) < 60
    for name in ("hotswap_adapter", "AdapterPool", "HotswapError", "hotswap_pipeline"):
        assert name in text
        assert name in dir(hotswap_lab)


PUBLIC = sorted(name for name, value in vars(hotswap_lab).items() if name[0] != "_" and not inspect.ismodule(value))


@pytest.mark.parametrize("name", PUBLIC)
def test_each_public_name_has_an_example(name):
    """It runs with the other examples; some refer to the one of a function that belongs with it."""
    text = inspect.getdoc(getattr(hotswap_lab, name))
    referred = re.search(r"See :\w+:`\.?(\w+)`", text)
    if referred:
        text = inspect.getdoc(getattr(hotswap_lab, referred[1], getattr(hotswap_lab.Adapter, referred[1], None)))
    assert ">>> " in text


def test_the_commands_say_what_they_take():
    done = subprocess.run([sys.executable, "-m", "hotswap_lab", "--help"], capture_output=True, text=True, check=True)
    for what in ("--word", "--repeats", "python -m hotswap_lab.bench", "python -m hotswap_lab.serving"):
        assert what in done.stdout
