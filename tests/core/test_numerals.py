"""Numbers as people write them."""

from __future__ import annotations

from argparse import ArgumentTypeError

import pytest

from hotswap_lab.core.numerals import decimal, integer, integer_from

NO_NUMBERS = ["", " 5", "5 ", "1_0", "0x1", "５", "٣", "nan", "inf", "1e999", ".", "1e", "--1", "5\n"]


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_text_that_is_no_number(text):
    assert decimal(text) is integer(text) is None


@pytest.mark.parametrize("text", ["-1", "+1", "5.0", "1e1", "9" * 19])
def test_numbers_that_are_no_integers(text):
    assert integer(text) is None
    assert decimal(text) == float(text)


def test_an_argument_between_bounds():
    assert [integer_from(1, 3)(text) for text in "123"] == [1, 2, 3]
    for text in ("0", "4", "-1", "1_0"):
        with pytest.raises(ArgumentTypeError, match=f"{text} is not an integer from 1 to 3"):
            integer_from(1, 3)(text)
