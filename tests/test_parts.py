"""Each part of the package can be taken away: what is left says so, and plain LoRA goes on."""

from __future__ import annotations

import configparser
import json
import os
import re
import subprocess
import sys

import parts
import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="each part is taken away in a fork")


def tried(*names: str) -> dict[str, dict]:
    command = [sys.executable, parts.__file__, "--json", *names]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    return tried()


#: the most that can go at once, with which each leaf goes, too; and what can't
MOST = ("leaves", "core alone")


@pytest.mark.long
def test_plain_lora_goes_on_without_all_that_can_go_and_needs_the_rest():
    found = tried(*MOST, *parts.NEEDED)
    assert [found[each]["error"] for each in MOST] == [None, None]
    for gone in parts.NEEDED:
        assert f"hotswap_lab.{gone}" in found[gone]["error"]
        assert not {each for each in found[gone]["failed"] if each.startswith("core")}


@pytest.mark.long
@pytest.mark.parametrize("gone", parts.leaves())
def test_plain_lora_goes_on_without_it(found, gone):
    assert found[gone]["error"] is None, found[gone]["error"]


@pytest.mark.long
def test_the_page_shows_the_table(found):
    page = parts.PAGE.read_text(encoding="utf-8")
    assert page == parts.on_page(page, parts.table(found)), "python tests/parts.py writes it"


NAMED = re.compile(r'(?:refused?|refusal)\(\s*"(\w+)"')


def test_a_part_refuses_in_its_own_words_or_in_those_of_a_part_that_it_stands_on():
    """A refusal whose text went away with another part would be a KeyError."""
    part_of = {}
    for part in parts.parts():
        parser = configparser.ConfigParser(interpolation=None, delimiters=("=",))
        parser.read(parts.PACKAGE / part / "refusals.ini", encoding="utf-8")
        part_of |= dict.fromkeys(parser.sections(), part)
    astray = [
        (part, which, part_of.get(which))
        for part in parts.parts()
        for path in parts.files_of(part)
        for which in NAMED.findall(path.read_text(encoding="utf-8"))
        if part_of.get(which) not in {part, *parts.stands_on(part, anywhere=True)}
    ]
    assert astray == []


def test_imports_run_one_way():
    """No part stands on itself, by whatever way: in a circle, none could be taken away."""
    assert [part for part in parts.parts() if part in parts.stands_on(part)] == []
