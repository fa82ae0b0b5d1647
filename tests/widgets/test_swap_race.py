"""SwapRace: the benchmark's own pieces, with progress, and it can be stopped."""

from __future__ import annotations

import threading

import pytest
import torch

from hotswap_lab.widgets import SwapRace


def test_a_click_runs_it_beside_the_notebook():
    """All ways are timed, and right."""
    race = SwapRace("tiny", rank=2, n=2)
    assert race.to_html().endswith("Not run yet.</div>")
    race.box  # noqa: B018
    race._starters[0].click()
    assert race.wait(120)
    assert race.ok
    assert {(row.state, row.timing.n) for row in race.report.rows} == {("right", 2)}
    assert list(race.seconds) == [
        "PEFT load + set + delete",
        "PEFT hotswap, disk",
        "PEFT hotswap, state dict",
        "hotswap_lab, disk, prepared",
        "hotswap_lab, pool",
        "memcpy of the same bytes",
    ]
    assert race.progress == pytest.approx(1.0)
    assert "<svg" in race._body.value
    assert race._status.value == "done, 100%"
    assert not race._starters[0].disabled
    assert race._stop_button.disabled
    assert "torch" in str(race)
    assert "<svg" in race.to_html()
    assert race._static()["image/svg+xml"].startswith("<svg")


def test_stop():
    threads = torch.get_num_threads()
    race = SwapRace("tiny", rank=2, n=100_000)
    begun, progressed = threading.Event(), race._progressed
    race._progressed = lambda: (progressed(), begun.set())
    race.start()
    assert begun.wait(60)
    assert race.busy
    race.stop()
    assert race.wait(60)
    assert race.doing == "stopped"
    assert race.report is None
    assert race.error is None
    assert torch.get_num_threads() == threads
