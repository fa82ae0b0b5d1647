"""SwapRace: the benchmark's own pieces, with progress, and it can be stopped."""

from __future__ import annotations

import threading

import pytest
import torch

from hotswap_lab.widgets import SwapRace


@pytest.fixture(scope="module")
def race():
    race = SwapRace("tiny", rank=2, n=2)
    race.run()
    return race


def test_all_ways_are_timed_and_right(race):
    assert race.ok
    assert {row.state for row in race.report.rows} == {"right"}
    assert {row.timing.n for row in race.report.rows} == {2}
    assert list(race.seconds) == [
        "PEFT load + set + delete",
        "PEFT hotswap, disk",
        "PEFT hotswap, state dict",
        "hotswap_lab, disk, prepared",
        "hotswap_lab, pool",
        "memcpy of the same bytes",
    ]
    assert race.progress == pytest.approx(1.0)
    assert race.doing == "done"


def test_the_static_form_says_on_what_machine(race):
    assert "torch" in str(race)
    assert "<svg" in race.to_html()
    assert race._static()["image/svg+xml"].startswith("<svg")
    assert SwapRace("tiny").to_html().endswith("Not run yet.</div>")


def test_a_click_runs_it_beside_the_notebook():
    race = SwapRace("tiny", rank=2, n=1)
    race.box  # noqa: B018
    race._starters[0].click()
    assert race.wait(120)
    assert race.ok
    assert "<svg" in race._body.value
    assert race._status.value == "done, 100%"
    assert not race._starters[0].disabled
    assert race._stop_button.disabled


def test_stop():
    threads = torch.get_num_threads()
    race = SwapRace("tiny", rank=2, n=100_000)
    begun = threading.Event()
    progressed = race._progressed

    def telling():
        progressed()
        begun.set()

    race._progressed = telling
    race.start()
    assert begun.wait(60)
    assert race.busy
    race.stop()
    assert race.wait(60)
    assert race.doing == "stopped"
    assert race.report is None
    assert race.error is None
    assert torch.get_num_threads() == threads


def test_errors_are_shown(monkeypatch):
    def broken(settings):
        raise RuntimeError("no <memory>")

    monkeypatch.setattr("hotswap_lab.bench.make_base", broken)
    race = SwapRace("tiny")
    race.box  # noqa: B018
    race.start()
    assert race.wait(60)
    assert "no &lt;memory&gt;" in race._status.value
    with pytest.raises(RuntimeError, match="memory"):
        race.run()
    monkeypatch.undo()
    race.settings = SwapRace("tiny", rank=2, n=1).settings
    race.run()
    assert race.ok
    assert "alert" not in race._status.value
