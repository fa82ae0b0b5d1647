"""The one exception."""

import pickle

import pytest

from hotswap_lab import HotswapError
from hotswap_lab.core.errors import Refusal, listing, refuse


def test_it_is_what_code_for_peft_catches():
    for kind in (ValueError, RuntimeError):
        with pytest.raises(kind):
            raise refuse("s", "f", "e", "n")


def test_it_survives_pickling():
    error = HotswapError(*[Refusal(f"s{number}", "f", "e", "n") for number in range(5)])
    twin = pickle.loads(pickle.dumps(error))
    assert str(error).endswith("... and 2 more, all in the `refusals` of this error")
    assert str(twin) == str(error)
    assert twin.refusals == error.refusals


def test_listing():
    assert listing([]) == ""
    assert listing(["a"]) == "a"
    assert listing(range(10), limit=3) == "0, 1, 2 and 7 more"
