"""Chapter 10: which tensors a swap reaches in code that was compiled ahead of time."""

from __future__ import annotations

from exercises import assert_tells_right_from_wrong

from hotswap_lab.lessons import ahead


def unreached(constants, bound, swapped):
    in_code = swapped.keys() - set(constants)
    elsewhere = [name for name in swapped.keys() - in_code if swapped[name].data_ptr() != bound[name].data_ptr()]
    return sorted([*in_code, *elsewhere])


def by_name_only(constants, bound, swapped):
    return sorted(swapped.keys() - set(constants))


def by_object(constants, bound, swapped):
    return sorted(name for name in swapped if swapped[name] is not bound.get(name))


def not_sorted(constants, bound, swapped):
    return unreached(constants, bound, swapped)[::-1]


def test_right_and_wrong_solutions(capsys):
    wrong = [lambda constants, bound, swapped: [], by_name_only, by_object, not_sorted]
    assert_tells_right_from_wrong(ahead.unreached, unreached, wrong, capsys)
