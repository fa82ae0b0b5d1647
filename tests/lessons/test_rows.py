"""Chapter 08: rows at different places read as the model itself does, in two graphs."""

from __future__ import annotations

import pytest
import torch
from exercises import assert_is_svg_with_a_text_form, assert_tells_right_from_wrong
from peft import PeftModel

from hotswap_lab import AdapterPool, RecompileWatch, demo
from hotswap_lab.lessons import rows
from hotswap_lab.lessons.rows import Reader

CHUNK, ROOM = 4, 20


@pytest.fixture
def model():
    return demo.load("reverse")[0]


def some_ids(count, seed=0):
    return torch.randint(4, 30, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, -1]


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
    texts = [some_ids(count, seed=count) for count in (9, 1, 4, 17)]
    reader = Reader(model, rows=4, chunk=CHUNK, room=ROOM)
    for row, logits in enumerate(read_all(reader, texts, sizes=(4, 1, 3, 2))):
        assert torch.allclose(logits, logits_of(model, texts[row]), atol=1e-4)
    assert reader.lengths.tolist() == [9, 1, 4, 17]


def test_a_row_that_is_given_on_leaves_no_trace_and_disturbs_nobody(model):
    reader = Reader(model, rows=2, chunk=CHUNK, room=ROOM)
    first, second, other = some_ids(7), some_ids(5, seed=1), some_ids(12, seed=2)
    read_all(reader, [first, other[:6]], sizes=(4, 1))
    reader.forget(0)
    logits = read_all(reader, [second, other[6:]], sizes=(4, 2))
    assert torch.allclose(logits[0], logits_of(model, second), atol=1e-4)
    assert torch.allclose(logits[1], logits_of(model, other), atol=1e-4)


def test_two_graphs_do_for_all_arrangements(model):
    family = {name: demo.adapter_path(name) for name in ("reverse", "pig_latin", "caesar")}
    pool = AdapterPool(model, adapters=family, rows=2, progress=False)
    reader = Reader(model, rows=2, chunk=CHUNK, room=ROOM)
    torch.compiler.reset()
    reader.compile("eager")
    pool.assign(["reverse", None])
    with torch.no_grad():
        model(input_ids=torch.tensor([some_ids(2)] * 2))  # proves that the model keeps its rows apart
    with RecompileWatch() as watch:
        reader.read([some_ids(3), some_ids(1)])
        reader.read([some_ids(1), []])
    assert (watch.compiles, watch.recompiles) == (1, 1)
    ids = some_ids(6)
    with RecompileWatch(allow=0):
        for names in (["caesar", "pig_latin"], ["pig_latin", None], ["reverse", "reverse"]):
            pool.assign(names)
            reader.forget(0)
            reader.forget(1)
            for name, logits in zip(names, read_all(reader, [ids, ids], sizes=(4, 1)), strict=True):
                fresh = demo.load(name)[0] if name else demo.load_base()
                assert torch.allclose(logits, logits_of(fresh, ids), atol=1e-3)
    torch.compiler.reset()


def test_together_is_the_sum_of_what_each_adapter_adds():
    """Seen at the first layer, where the adapters get the same input."""
    folders = {name: demo.adapter_path(name) for name in ("reverse", "sort")}
    weights = {"reverse": 0.25, "sort": -2.0}
    x = torch.randn(1, 3, 128, generator=torch.Generator().manual_seed(0))

    def first_layer(model):
        return model.get_base_model().model.layers[0].self_attn.q_proj

    with torch.no_grad():
        base = demo.load_base().model.layers[0].self_attn.q_proj(x)
        expected = base.clone()
        for name, weight in weights.items():
            expected += weight * (first_layer(PeftModel.from_pretrained(demo.load_base(), folders[name]))(x) - base)
        both = first_layer(rows.together(demo.load_base(), folders, weights))(x)
    assert not torch.allclose(both, base, atol=1e-2)
    assert torch.allclose(both, expected, atol=1e-4)


def test_the_timetable():
    steps = [[(0, "sort"), None], [(0, "sort"), (1, "shout")], [(2, "sort"), (1, "shout")]]
    figure = rows.timetable(steps)
    root = assert_is_svg_with_a_text_form(figure)
    assert str(figure) == "2 rows, 3 steps. Row 0: requests 0 (sort), 2 (sort). Row 1: request 1 (shout)"
    widths = [float(each.attrib["width"]) for each in root.iter("{http://www.w3.org/2000/svg}rect")]
    assert sorted(width for width in widths if 16 < width < 600) == pytest.approx(
        [580 / 3, 2 * 580 / 3, 2 * 580 / 3], 0.01
    )


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
