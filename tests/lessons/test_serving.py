"""Chapter 09, as far as it needs no Ray: which replica gets a request, and how calls are drawn."""

from __future__ import annotations

import itertools

from exercises import assert_tells_right_from_wrong

from hotswap_lab.lessons import serving


def waiting(replicas):
    return lambda number: replicas[number]["waiting"]


def choose_replica(name, replicas, most):
    numbers = range(len(replicas))
    having = [n for n in numbers if name in replicas[n]["held"] and replicas[n]["waiting"] < most]
    return min(having or numbers, key=waiting(replicas))


def least_to_do(name, replicas, most):
    return min(range(len(replicas)), key=waiting(replicas))


def first_that_has_it(name, replicas, most):
    return next((n for n, each in enumerate(replicas) if name in each["held"]), least_to_do(name, replicas, most))


def however_busy(name, replicas, most):
    return choose_replica(name, replicas, 10**6)


def one_too_many(name, replicas, most):
    return choose_replica(name, replicas, most + 1)


def last_of_equals(name, replicas, most):
    numbers = range(len(replicas))[::-1]
    having = [n for n in numbers if name in replicas[n]["held"] and replicas[n]["waiting"] < most]
    return min(having or numbers, key=waiting(replicas))


def test_right_and_wrong_solutions(capsys):
    wrong = [least_to_do, first_that_has_it, however_busy, one_too_many, last_of_equals, lambda *_: None]
    assert_tells_right_from_wrong(serving.choose_replica, choose_replica, wrong, capsys, may_fail=True)


def test_adapters_that_gather_are_read_less_often():
    assert serving.adapters_read(choose_replica) < serving.adapters_read(least_to_do) / 3
    # all to one, with room for one: whenever it is another one than before
    changes = serving.adapters_read(lambda *_: 0, count=200, held=1)
    assert serving.adapters_read(lambda *_: 0, held=8) == 8 < changes < 200


def test_calls_are_drawn_as_columns_of_eight():
    calls = [[(0, "sort"), (1, "shout")], [(2, "sort")]]
    drawn = serving.columns(calls)
    assert [len(column) for column in drawn] == [8, 8]
    assert list(itertools.chain(*drawn)).count(None) == 16 - 3
