"""Chapter 08: rows at different places read as the model itself does. In two graphs, as the chapter shows."""

from __future__ import annotations

import pytest
import torch
from exercises import assert_is_svg_with_a_text_form, assert_tells_right_from_wrong, logits_of, some_ids

from hotswap_lab import demo
from hotswap_lab.figures import palette
from hotswap_lab.generating import Reader
from hotswap_lab.lessons import rows

CHUNK, ROOM = 4, 20


@pytest.fixture
def model():
    return demo.load("reverse")[0]


def letters(count):
    return some_ids(count).tolist()


def read_all(reader, texts, sizes):
    """Reads the text of each row, in parts of its own size; gives the logits after each."""
    last, done = [None] * len(texts), [0] * len(texts)
    while any(start < len(text) for start, text in zip(done, texts, strict=True)):
        parts = [text[start : start + size] for text, start, size in zip(texts, done, sizes, strict=True)]
        logits = reader.read(parts)
        for row, part in enumerate(parts):
            last[row] = logits[row] if part else last[row]
            done[row] += len(part)
    return last


def test_rows_at_different_places_read_as_the_model_itself(model):
    texts = [letters(count) for count in (9, 1, 4, 17)]
    reader = Reader(model, rows=4, chunk=CHUNK, room=ROOM)
    for row, logits in enumerate(read_all(reader, texts, sizes=(4, 1, 3, 2))):
        assert torch.allclose(logits, logits_of(model, texts[row]), atol=1e-4)
    assert reader.lengths.tolist() == [9, 1, 4, 17]


def test_a_row_that_is_given_on_leaves_no_trace_and_disturbs_nobody(model):
    reader = Reader(model, rows=2, chunk=CHUNK, room=ROOM)
    first, second, other = letters(7), letters(5), letters(12)
    read_all(reader, [first, other[:6]], sizes=(4, 1))
    for name, each in reader.named_buffers(recurse=False):
        if name != "places":
            each[0] = torch.nan  # as an adapter that is far too strong leaves it
    reader.forget(0)
    logits = read_all(reader, [second, other[6:]], sizes=(4, 2))
    assert torch.allclose(logits[0], logits_of(model, second), atol=1e-4)
    assert torch.allclose(logits[1], logits_of(model, other), atol=1e-4)


def test_a_timetable_draws_free_rows_and_columns_of_one_width():
    calls = [[(0, "sort"), (1, "shout"), None], [(2, "sort"), None, None]]
    figure = rows.timetable(calls, "One <and> many")
    root = assert_is_svg_with_a_text_form(figure)
    assert figure.text.startswith("One <and> many: 2 calls of the model. Row 0: requests 0 (sort), 2 (sort). ")
    assert figure.text.endswith("Row 2: free")
    boxes = [(each.get("fill"), float(each.get("width"))) for each in root.iter() if each.get("height") == "22"]
    sort, shout, free = palette.light("sort"), palette.light("shout"), palette.OFF
    assert boxes == [(free, 128), (sort, 64), (sort, 64), (free, 128), (shout, 64), (free, 128)]
    assert rows.timetable(calls).text.startswith("2 calls of the model. Row 0")


def own_adapters(base, x, a, b, scaling):
    inner = torch.bmm(x, a[: len(x)].transpose(1, 2))
    return base(x) + torch.bmm(inner * scaling[: len(x), None, None], b[: len(x)])


def with_a_loop(base, x, a, b, scaling):
    return torch.cat([base(x[i : i + 1]) + scaling[i] * x[i : i + 1] @ a[i].T @ b[i] for i in range(len(x))])


def without_the_scaling(base, x, a, b, scaling):
    return own_adapters(base, x, a, b, torch.ones_like(scaling))


def the_last_rows(base, x, a, b, scaling):
    return own_adapters(base, x, *(each[-len(x) :] for each in (a, b, scaling)))


def one_for_all(base, x, a, b, scaling):
    return own_adapters(base, x, a[:1].expand_as(a), b[:1].expand_as(b), scaling[:1].expand_as(scaling))


def test_right_and_wrong_solutions(capsys):
    wrong = [
        lambda base, x, a, b, scaling: base(x),
        lambda base, x, a, b, scaling: None,
        with_a_loop,
        without_the_scaling,
        the_last_rows,
        one_for_all,
    ]
    assert_tells_right_from_wrong(rows.own_adapters, own_adapters, wrong, capsys)
