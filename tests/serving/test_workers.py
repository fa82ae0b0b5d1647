"""The recipes for a web server under gunicorn, which forks its workers from one process that has loaded the model."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from lengths import eventually
from served import FAMILY, WORDS, alone
from test_recipes import RECIPES, code_of

pytest.importorskip("gunicorn", reason="needs pip install gunicorn uvicorn-worker")

WORKERS = {
    "A web server": ("recipes.ipynb", "--threads=4"),
    "A FastAPI endpoint": ("recipes_frameworks.ipynb", "--worker-class=uvicorn_worker.UvicornWorker"),
}
#: each process that answers leaves a file
NOTED = """
import os

ask = demo.ask
demo.ask = lambda *given: open(f"{os.getpid()}.answers", "w").close() or ask(*given)
"""


def app_of(title: str) -> str:
    """The code of a recipe up to the cell that makes the app."""
    cells = [cell.source for cell in code_of(RECIPES[WORKERS[title][0], title])]
    (last,) = [number for number, code in enumerate(cells) if re.search(r"^(app = |def app\()", code, re.MULTILINE)]
    return "\n".join(cells[: last + 1])


@contextlib.contextmanager
def gunicorn(title: str, folder: Path, more: str = "") -> Iterator[str]:
    """The address of a recipe's app behind two workers."""
    (folder / "web.py").write_text(app_of(title) + NOTED + more)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "gunicorn", "--preload", "--workers=2", WORKERS[title][1], f"--bind={address}"]
    with open(folder / "log", "w") as log:
        server = subprocess.Popen([*command, "web:app"], cwd=folder, stdout=log, stderr=log)
    try:
        assert eventually(lambda: _is_up(address) or server.poll() is not None, 120)
        assert server.poll() is None, (folder / "log").read_text()
        yield f"http://{address}"
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def _is_up(address: str) -> bool:
    host, port = address.split(":")
    with socket.socket() as each:
        return each.connect_ex((host, int(port))) == 0


def answers(address: str, asked: list[tuple[str, str]]) -> list[httpx2.Response]:
    """The answers to requests for pairs of an adapter and a word, eight at a time."""
    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(lambda each: httpx2.get("{}/{}/{}".format(address, *each), timeout=60), asked))


@pytest.mark.long
@pytest.mark.parametrize("title", WORKERS)
def test_each_of_two_workers_answers_with_the_adapter_that_was_asked_for(title, tmp_path):
    asked = [(("shout", "sort")[n % 2], WORDS[n % 7]) for n in range(100)]
    expected = [alone(FAMILY[name], word) for name, word in asked]
    assert Counter(expected).most_common(1)[0][1] < 20  # an answer with another adapter shows
    with gunicorn(title, tmp_path) as address:
        found = answers(address, asked)
    assert [each.status_code for each in found] == [200] * 100, (tmp_path / "log").read_text()
    as_text = json.loads if "FastAPI" in title else str
    assert [as_text(each.text) for each in found] == expected
    assert len([*tmp_path.glob("*.answers")]) == 2


@pytest.mark.long
def test_workers_with_one_model_in_shared_memory_refuse_to_answer(tmp_path):
    """They would answer with each other's adapters."""
    asked = [(("shout", "sort")[n % 2], WORDS[n % 7]) for n in range(20)]
    with gunicorn("A FastAPI endpoint", tmp_path, "\nmodel.share_memory()\n") as address:
        assert {each.status_code for each in answers(address, asked)} == {500}
    assert "memory that other processes see" in (tmp_path / "log").read_text()
