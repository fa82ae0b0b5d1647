"""Each room of the package can be taken away: what is left says so, and plain LoRA goes on."""

from __future__ import annotations

import configparser
import json
import os
import re
import subprocess
import sys

import pytest
import rooms

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="each room is taken away in a fork")


def tried(*names: str) -> dict[str, dict]:
    command = [sys.executable, rooms.__file__, "--json", *names]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    return tried()


#: the most that can go at once, with which each leaf goes, too; and what can't
MOST = ("leaves", "core alone")


@pytest.mark.long
def test_plain_lora_goes_on_without_all_that_can_go_and_needs_the_rest():
    found = tried(*MOST, *rooms.NEEDED)
    assert [found[each]["error"] for each in MOST] == [None, None]
    for gone in rooms.NEEDED:
        assert f"hotswap_lab.{gone}" in found[gone]["error"]
        assert not {each for each in found[gone]["failed"] if each.startswith("core")}


@pytest.mark.long
@pytest.mark.parametrize("gone", rooms.leaves())
def test_plain_lora_goes_on_without_it(found, gone):
    assert found[gone]["error"] is None, found[gone]["error"]


@pytest.mark.long
def test_the_page_shows_the_table(found):
    page = rooms.PAGE.read_text(encoding="utf-8")
    assert page == rooms.on_page(page, rooms.table(found)), "python tests/rooms.py writes it"


NAMED = re.compile(r'(?:refused?|refusal)\(\s*"(\w+)"')


def test_a_room_refuses_in_its_own_words_or_in_those_of_a_room_that_it_stands_on():
    """A refusal whose text went away with another room would be a KeyError."""
    room_of = {}
    for room in rooms.rooms():
        parser = configparser.ConfigParser(interpolation=None, delimiters=("=",))
        parser.read(rooms.PACKAGE / room / "refusals.ini", encoding="utf-8")
        room_of |= dict.fromkeys(parser.sections(), room)
    astray = [
        (room, which, room_of.get(which))
        for room in rooms.rooms()
        for path in rooms.files_of(room)
        for which in NAMED.findall(path.read_text(encoding="utf-8"))
        if room_of.get(which) not in {room, *rooms.stands_on(room, anywhere=True)}
    ]
    assert astray == []


def test_imports_run_one_way():
    """No room stands on itself, by whatever way: in a circle, none could be taken away."""
    assert [room for room in rooms.rooms() if room in rooms.stands_on(room)] == []
