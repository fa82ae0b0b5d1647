"""The site has every notebook and every public name, README stays short, and every link leads somewhere.

CI, which has Sphinx, checks that the site builds without a warning.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import re
from itertools import product
from pathlib import Path

import nbformat
import pytest
import torch
from lengths import few_of, long
from peft.tuners.lora import LoraLayer

import hotswap_lab
import hotswap_lab.widgets
from hotswap_lab import demo
from hotswap_lab.serving import api
from hotswap_lab.widgets import WriteScrubber

ROOT = Path(__file__).parent.parent
DOCS, README = ROOT / "docs", ROOT / "README.md"
PAGES = [README, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "training/README.md"))]
NOTEBOOKS = [path for path in (ROOT / "notebooks").rglob("*.ipynb") if path.parts[-2][0] != "."]


def load(name: str):
    """A file of ``docs`` as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def conf():
    return load("conf")


def test_every_public_name_has_a_page(conf):
    bound = set(
        re.findall(r"^ +from .* import \w+ as (\w+)$", (ROOT / "hotswap_lab/__init__.py").read_text(), re.MULTILINE)
    )
    assert len(bound) > 20
    pages = conf.pages()
    assert bound <= set(pages)
    assert all(f"   {name}\n" in pages["index"] for name in pages.keys() - {"index"})
    assert ".. autoexception:: hotswap_lab.HotswapError" in pages["HotswapError"]
    for model in (api.AskedText, api.AskedChat):
        for name in model.model_fields:  # described, and with its type
            assert pages["fields"].count(f"``{name}``") >= 2
    assert '"``temperature``", "number, maximum 2, minimum 0"' in pages["fields"]
    shown = re.findall(r"rubric:: (\w+)\n\n.*json\n((?:\n .*)+)", pages["commands"])
    assert {name: json.loads(text) for name, text in shown} == load("commands").schemas()


def without_docstring(value: type) -> list[str]:
    """Public members without a docstring, inherited ones included, unless a class of another package has them."""
    missing = []
    for owner in value.__mro__:
        for name, member in (
            vars(owner).items() if owner.__module__.split(".")[0] == value.__module__.split(".")[0] else ()
        ):
            member = getattr(member, "__func__", member)  # of a class method or a static method
            is_described = callable(member) or isinstance(member, (property, functools.cached_property))
            if name[0] != "_" and is_described and not (member.__doc__ or inspect.getdoc(getattr(value, name))):
                missing.append(f"{owner.__name__}.{name}")
    return missing


def test_members_of_public_classes_have_docstrings(conf):
    for module in map(
        importlib.import_module, ["hotswap_lab", *("hotswap_lab." + name for name in conf.MODULES.split())]
    ):
        for name in conf.public(module):
            value = getattr(module, name)
            assert value.__doc__, name
            assert not isinstance(value, type) or without_docstring(value) == [], module.__name__


def test_every_kind_of_member_is_looked_at():
    class Base:
        def inherited(self): ...

        def _private(self): ...

    class Own(Base):
        @classmethod
        def of_class(cls): ...

        @staticmethod
        def static(): ...

        @functools.cached_property
        def cached(self): ...

        @property
        def computed(self): ...

        number = 3

    assert without_docstring(Own) == ["Own.of_class", "Own.static", "Own.cached", "Own.computed", "Base.inherited"]


def test_modules_that_users_are_told_of_have_a_page(conf):
    told = README.read_text() + "".join(path.read_text() for path in NOTEBOOKS if path.stem.startswith("recipes"))
    modules = set(re.findall(r"from hotswap_lab\.([\w.]+) import", told))
    # for readers of the code, and for the chapters
    assert {"serving", "widgets"} <= modules - {"core", "lessons"} <= {*conf.MODULES.split()}


def test_broken_links_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<p id="here"><a href="b.html#there"><a href="#here"><a href="http://x">')
    (tmp_path / "b.html").write_text('<a href="a.html#here"><a href="a.html#gone"><img src="c.png">')
    assert load("check_links").broken(tmp_path) == ["a.html: b.html#there", "b.html: a.html#gone", "b.html: c.png"]


# --- the part that is alive without a kernel


@pytest.mark.parametrize("name", few_of(demo.adapter_names(), ["reverse"]))
def test_its_answers_and_its_tiles_are_those_of_a_fresh_load(name):
    make, data = load("alive/make"), json.loads((DOCS / "alive" / "data.json").read_text())
    found, words = data["adapters"][name], data["words"]
    model, tokenizer = demo.load(name)
    assert data["layers"] == [path for path, _ in make.layers(model)]
    levels = make.levels(model)
    assert found["tiles"].keys() == levels.keys()
    for path, expected in levels.items():
        rounded = torch.tensor([make.LEVELS.index(each) for each in found["tiles"][path]])
        assert (rounded - expected.flatten()).abs().max() < 0.501, path
    stored = dict(zip(data["strengths"], found["answers"], strict=True))
    for strength in data["strengths"]:
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.set_scale("default", strength)
        answers = demo.ask_all(model, tokenizer, words)
        assert stored[strength] == answers, strength
        task = {0: "copy", 1: name}.get(strength)
        assert task is None or answers == [*map(demo.TASKS[task], words)]
    counts = {what: len(data["measured"][what][name]) for what in ("swap", "strength", "reload")}
    assert counts == {"swap": len(data["strengths"]), "strength": len(data["strengths"]), "reload": 1}


@pytest.mark.long
def test_its_times_are_those_of_the_call_that_it_prints(monkeypatch):
    """Each call does what the page says: another adapter comes, or another strength, and nothing is in already."""
    make = load("alive/make")
    said = []

    class Pool(hotswap_lab.AdapterPool):
        def swap(self, name, strength=1.0):
            said.append((self.active, self.strength, name, strength))
            super().swap(name, strength)

    monkeypatch.setattr(make, "AdapterPool", Pool)
    found = make.measure(times=1)
    timed = iter(said)
    for name in demo.adapter_names():
        for strength in make.STRENGTHS:
            next(timed)
            before = next(timed)
            assert before[0] != name
            assert before[1:] == (strength, name, strength)
            next(timed)
            before = next(timed)
            assert before[0] in (name, None)  # None at strength 0
            assert before[1] != strength
            assert before[2:] == (name, strength)
        assert all(each > 0 for what in ("swap", "strength", "reload") for each in found[what][name])
    assert not [*timed]


# --- the swap that stops halfway

HALFWAY = json.loads((DOCS / "halfway" / "data.json").read_text())


@pytest.fixture(scope="module")
def halfway():
    return load("halfway/make")


def gap(model, tokenizer, word: str, *answers: str) -> float:
    """How far apart the logits of two answers are where they part: what is as likely depends on the machine."""
    same = [len({*letters}) == 1 for letters in zip(*answers, strict=False)]
    common = answers[0][: [*same, False].index(False)]
    prompt = tokenizer(word + demo.SEPARATOR + common, return_tensors="pt")["input_ids"]
    rest = [answer.removeprefix(common)[:1] for answer in answers]
    letters = [tokenizer(letter)["input_ids"][0] if letter else tokenizer.eos_token_id for letter in rest]
    with torch.inference_mode():
        logits = model(input_ids=prompt).logits[0, -1, letters]
    return float(logits.max() - logits.min())


@pytest.mark.long
@pytest.mark.parametrize("number", range(len(HALFWAY["pairs"])))
def test_the_answer_at_each_step_is_that_of_the_live_model(halfway, number):
    pair, words = HALFWAY["pairs"][number], HALFWAY["words"]
    own = {name: HALFWAY["adapters"][name] for name in (pair["before"], pair["after"])}
    for name, each in own.items():
        model, tokenizer = demo.load(name)
        assert each["answers"] == demo.ask_all(model, tokenizer, words) == [*map(demo.TASKS[name], words)]
        ranks = {path: layer.r["default"] for path, layer in halfway.alive["layers"](model) if hasattr(layer, "r")}
        assert each["ranks"] == [ranks.get(path, 0) for path in HALFWAY["layers"]]
    addresses, shapes = set(), set()

    def noted(steps):
        for model in steps:
            weights = [weight for layer in halfway.layers(model) for weight in (layer.lora_A, layer.lora_B)]
            addresses.add((id(model), *(weight["default"].weight.data_ptr() for weight in weights)))
            shapes.add(weights[0]["default"].weight.shape)
            yield model

    for order, steps in {"rows": halfway.by_row, "layers": halfway.by_layer}.items():
        for at, (stored, model) in enumerate(
            zip(pair[order], noted(steps(pair["before"], pair["after"])), strict=True)
        ):
            for word, *both in zip(words, stored, demo.ask_all(model, tokenizer, words), strict=True):
                assert both[0] == both[1] or gap(model, tokenizer, word, *both) < 1e-3, (order, at, word, *both)
        ends = model, halfway.prepared(pair["after"])[0]
        was, fresh = ([float(layer.scaling["default"]) for layer in halfway.layers(each)] for each in ends)
        assert was == fresh, order
        # with room, the answers are those without; at the end, those of a fresh load
        assert [pair[order][0], pair[order][-1]] == [each["answers"] for each in own.values()]
    assert len(addresses) == 2  # those of one model, and of another
    assert shapes == {(32, 128)}
    called = re.search("WriteScrubber.*", halfway.CODE["rows"])[0].format(**pair, word=words[0])
    view = eval(called, {"WriteScrubber": WriteScrubber})
    assert view.answers[halfway.OPENS] == pair["rows"][halfway.OPENS][0]


def test_what_the_page_says_of_the_base_and_of_sizes(halfway):
    base, tokenizer = demo.load_base(), demo.load_tokenizer()
    assert HALFWAY["base"] == demo.ask_all(base, tokenizer, HALFWAY["words"]) == HALFWAY["words"]
    layer = halfway.layers(halfway.prepared("reverse")[0])[0]
    assert HALFWAY["sizes"]["shape"] == [*layer.base_layer.weight.shape]
    rows = sum(each["default"].weight.numel() for each in (layer.lora_A, layer.lora_B))
    assert (HALFWAY["sizes"]["weight"], HALFWAY["sizes"]["rows"]) == (layer.base_layer.weight.numel(), rows)
    # the page calls reverse's 24 other rows zeros, and pig_latin's none
    for rank, name in ((8, "reverse"), (32, "pig_latin")):
        weight = halfway.layers(halfway.prepared(name)[0])[0].lora_A["default"].weight
        assert weight.any(1).tolist() == [row < rank for row in range(32)]
    assert HALFWAY["pairs"][0]["rows"][halfway.OPENS][0] == "hotswap"
    chapter = text_of(ROOT / "notebooks" / "02_rank_padding.ipynb")
    assert "The room costs memory and time at every call" in chapter
    assert len(HALFWAY["layers"]) == len(halfway.layers(base)) == 28


@pytest.mark.long
def test_the_shape_and_the_scaling_each_fail_a_guard_unless_the_model_is_prepared(halfway):
    for what, room in product(("shape", "scaling"), (0, halfway.ROOM)):
        torch.compiler.reset()
        model = demo.load("reverse")[0]
        if room:
            hotswap_lab.prepare_model_for_compiled_hotswap(model, target_rank=room)
        layer, other = (halfway.layers(each)[0] for each in (model, demo.load("pig_latin")[0]))
        assert layer.scaling["default"] != other.scaling["default"]
        compiled, inputs = torch.compile(layer, backend="eager"), torch.ones(1, 3, 128)
        if what == "shape":  # the scaling is pig_latin's from the start
            layer.scaling["default"] = other.scaling["default"]
        with torch.no_grad(), hotswap_lab.RecompileWatch() as watch:
            compiled(inputs)
            if what == "scaling":
                layer.scaling["default"] = other.scaling["default"]
            else:
                hotswap_lab.hotswap_adapter(model, demo.adapter_path("pig_latin"), "default")
            compiled(inputs)
        assert watch.recompiles == (not room), watch.reasons
        if not room:
            assert ("scaling" in watch.reasons[0]) == (what == "scaling")
            assert "another shape" in watch.reasons[0] or what == "scaling"


@pytest.mark.parametrize("what", ["loop", "refused"])
def test_what_a_damaged_file_does(halfway, what):
    found = halfway.damage(what)
    assert found == HALFWAY["damage"][what]
    own = HALFWAY["adapters"]
    is_whole = found["answers"] in (own["reverse"]["answers"], own["pig_latin"]["answers"])
    assert (found["changed"], is_whole) == ((10, False) if what == "loop" else (0, True))
    assert HALFWAY["damage"]["all"] == sum(map(bool, own["pig_latin"]["ranks"])) == 16


@pytest.mark.long
@pytest.mark.parametrize("what", ["without", "with"])
def test_what_room_does_to_a_compiled_model(halfway, what):
    stored, found = HALFWAY["measured"][what], halfway.compiling(what, backend="eager")
    assert found["shapes"] == stored["shapes"] == ([[8, 128], [32, 128]] if what == "without" else [[32, 128]] * 2)
    for each in (stored, found):
        assert len(set(each["addresses"])) == (2 if what == "without" else 1)
        assert each["recompiles"] == len(each["guards"]) == (1 if what == "without" else 0)
    if f"torch {torch.__version__}," in HALFWAY["measured"]["machine"]:
        assert found["guards"] == stored["guards"]


def test_how_long_a_request_waits(halfway):
    measured = HALFWAY["measured"]["waits"]
    assert len(measured) == len(HALFWAY["pairs"])
    found = halfway.waits("reverse", "pig_latin", times=3)
    for each in (*measured, found):
        assert 0 < each["using"] < each["reload"] / 4


# --- README and the other pages


def text_of(path: Path) -> str:
    """What is prose in it: no code."""
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, as_version=4).cells
        return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors_of(path: Path) -> set[str]:
    """What a link to this file may have after its #."""
    titles = re.findall(r"^#+ (.+)$", text_of(path), re.MULTILINE)
    if path.suffix == ".ipynb":  # as Jupyter makes them
        return {title.strip().replace(" ", "-") for title in titles}
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_readme_is_short():
    text = README.read_text()
    assert len(text.split()) <= 900
    above, _, _ = re.sub(r"\]\([^)]*\)", "]", text).partition("<picture>")  # what is seen first
    assert len(re.findall(r"\w\S*", above)) <= 80


@pytest.mark.parametrize(
    "name", ["swapping", "many_adapters", "rows", "pipelines", "training", long("compiled"), long("ahead")]
)
def test_the_blocks_of_a_page_run(name, tmp_path, monkeypatch):
    """In their order, in an empty folder, with what the page itself imports."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / f"{name}.md").read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, name, "exec"), names)
    assert blocks


def test_a_page_of_a_task_begins_with_a_block():
    (listed,) = re.findall(r":caption: Use\n\n(.*?)```", (DOCS / "index.md").read_text(), re.DOTALL)
    tasks = listed.split("notebooks/")[0].split()[1:]
    assert len(tasks) == 8
    for name in tasks:
        assert re.match(r"# .+\n\n```(python|bash)\n", (DOCS / f"{name}.md").read_text()), name


def test_links_lead_somewhere():
    for page in [*PAGES, *NOTEBOOKS]:
        for link in re.findall(r"\]\((?!http)([^)]+)\)", text_of(page)):
            file, _, anchor = link.partition("#")
            path = page.parent / file if file else page
            assert path.exists(), (page, link)
            assert not anchor or anchor in anchors_of(path), (page, link)


def test_code_is_code():
    """Whatever is shown compiles, and imports what there is."""
    for page in PAGES[:2]:
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            compile(block, page, "exec")
            for module, names in re.findall(r"^from (hotswap_lab[\w.]*) import (.+)$", block, re.MULTILINE):
                for name in names.split(", "):
                    assert hasattr(hotswap_lab.widgets if module.endswith("widgets") else hotswap_lab, name), name
