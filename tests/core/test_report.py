"""Tables and texts: whatever is in a name, no terminal and no page is upset by it."""

from __future__ import annotations

import pytest

from hotswap_lab.core.report import escaped, html_table, readable_bytes, text_table, wrapped

EVIL = "<script>alert('x')</script>", "a\x1b[31m", "two\nlines", "\u202eback"


@pytest.mark.parametrize("name", EVIL)
def test_a_cell_can_hold_any_name(name):
    page = html_table(name, [name], [[name]], caption=name, above=[name], notes=[name])
    assert "<script" not in page
    lines = text_table([name], [[name], ["plain"]])
    assert len(lines) == 3
    assert all(map(str.isprintable, lines))


@pytest.mark.parametrize("name", EVIL)
def test_an_escaped_name_is_one_line(name):
    assert escaped(name).isprintable()
    assert all(map(str.isprintable, wrapped(f"found: {name}", 40).splitlines()))


@pytest.mark.parametrize("width", [20, 40, 79])
def test_a_report_is_as_wide_as_asked_and_its_text_stays_indented(width):
    first, *others = wrapped("  found:    " + "word " * 40, width).splitlines()
    assert others
    assert max(map(len, (first, *others))) <= width
    assert all(line.startswith(" " * 12 + "w") for line in others)


SIZES = {0: "0 bytes", 899: "899 bytes", 1000: "1 kB", 10_500: "10.5 kB", 2_500_000: "2.5 MB", 3_000_000_000: "3 GB"}


@pytest.mark.parametrize("count", SIZES)
def test_a_size_is_in_the_unit_that_fits(count):
    assert readable_bytes(count) == SIZES[count]
