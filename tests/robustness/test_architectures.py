"""The short form of architectures.py, and the cases that have found something once."""

from __future__ import annotations

import re

import pytest
import transformers
from architectures import ARCHITECTURES, CHECKS, Case, Report
from lengths import few_of

#: failures that are known and not mended yet, as the beginnings of what the program prints; a mended one goes
OPEN: tuple[str, ...] = ()


def run(name: str, check: str, seed: int, report: Report | None = None) -> Report:
    report = report or Report()
    Case(name, check, seed, report).run()
    return report


def check_all(report: Report) -> None:
    new = {what: found for what, found in report.failures.items() if not any(re.match(each, what) for each in OPEN)}
    assert not new, str(report)


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity_warning()


@pytest.mark.parametrize("name", few_of(ARCHITECTURES, ("llama", "bart", "deberta", "mamba", "hubert", "blip")))
def test_random_families(name):
    report = Report()
    for check in CHECKS:
        run(name, check, 1, report)
    check_all(report)
    assert report.figures["families"]
