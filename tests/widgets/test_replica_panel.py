"""ReplicaPanel: what replicas say, those that are lost, and a server that doesn't answer for a while."""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.error

import pytest

from hotswap_lab.figures.palette import light
from hotswap_lab.widgets import ReplicaPanel


def state(name, rows=(), held=("sort@1",), **counts):
    return {"replica": name, "rows": list(rows), "held": list(held), "waiting": 0, "requests": 0, **counts} | {
        "tokens": 5,
        "swaps": 2,
        "rows_in_use": 0,
    }


def texts(html):
    return [re.sub("<.*?>", " ", cell).split() for cell in re.findall(r"<td.*?>(.*?)</td>", html)]


def until(what):
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def replicas():
    return [state("one", ["sort@2", None, "shout@1+sort@2"], requests=3), state("two", held=["shout@1"], waiting=4)]


def test_what_each_replica_holds(replicas):
    panel = ReplicaPanel(lambda: replicas)
    assert str(panel) == "ReplicaPanel: 0 replicas"
    panel.look()
    assert str(panel).splitlines() == [
        "ReplicaPanel: 2 replicas",
        "one: rows sort@2, base, shout@1+sort@2; in memory sort@1; 0 waiting, 3 requests, 5 tokens, 2 swaps",
        "two: rows none; in memory shout@1; 4 waiting, 0 requests, 5 tokens, 2 swaps",
    ]
    cells = texts(panel.to_html())
    assert cells[:7] == [["one"], ["sort@2", "base", "shout@1+sort@2"], ["sort@1"], ["0"], ["3"], ["5"], ["2"]]
    assert cells[7:11] == [["two"], [], ["shout@1"], ["4"]]
    assert panel._static() == panel._static()


def test_a_lost_one_stays_and_a_new_one_comes(replicas):
    panel = ReplicaPanel(lambda: replicas)
    panel.look()
    replicas[0] = state("three")
    panel.look()
    assert panel.summary == "2 replicas, 1 lost"
    assert "one: lost" in str(panel)
    assert [cell for cell in texts(panel.to_html()) if "(lost)" in cell] == [["one", "(lost)"]]
    replicas.append(state("one"))  # it was only late
    panel.look()
    assert panel.summary == "3 replicas"


def test_one_adapter_has_one_colour_and_names_are_escaped():
    panel = ReplicaPanel(lambda: [state("one", rows=["<b>@1", "<b>@2"], held=["sort@1"])])
    panel.look()
    html = panel.to_html()
    assert "<b>@" not in html
    assert re.findall(r"background:(#\w+)", html) == [light("<b>"), light("<b>"), light("sort")]


def test_it_watches_until_it_is_stopped(replicas):
    panel = ReplicaPanel(lambda: replicas, every=0.01)
    panel.box  # noqa: B018 - makes the live form
    panel.start()
    until(lambda: "shout@1" in panel._body.value)
    replicas[1] = state("two", held=["double@7"])
    until(lambda: "double@7" in panel._body.value)
    assert panel._title.value == "<strong>ReplicaPanel</strong>: 2 replicas"  # read out, so not at every look
    assert panel.busy
    panel.stop()
    assert panel.wait(30)


def test_a_server_that_does_not_answer_may_do_so_again(replicas):
    is_gone = threading.Event()

    def states():
        if is_gone.is_set():
            raise urllib.error.URLError("nobody there")
        return replicas

    panel = ReplicaPanel(states, every=0.01)
    panel.start()
    until(lambda: panel.replicas)
    is_gone.set()
    until(lambda: panel.error)
    assert "nobody there" in panel.to_html()
    assert "sort@2" in panel.to_html()  # what was known
    is_gone.clear()
    until(lambda: not panel.error)
    panel.stop()
    assert panel.wait(30)
    is_gone.set()
    with pytest.raises(urllib.error.URLError):
        panel.look()


def test_at_an_address(replicas, tmp_path):
    (tmp_path / "healthz").write_text(json.dumps({"replicas": replicas}))
    panel = ReplicaPanel.at(tmp_path.as_uri(), every=3)
    panel.look()
    assert (panel.summary, panel.every) == ("2 replicas", 3)


def test_it_shows_what_a_replica_says():
    """The panel and a replica agree on what there is to say."""
    from served import FAMILY, replica_of

    replica = replica_of({"sort": FAMILY["sort"]})
    panel = ReplicaPanel(lambda: [{"replica": "one", **replica.state}])
    panel.look()
    assert f"one: rows {', '.join(['base'] * 8)}; in memory sort@1; 0 waiting, 0 requests, 0 tokens, 0 swaps" in str(
        panel
    )
