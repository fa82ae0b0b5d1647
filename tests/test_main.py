"""The command, run as a user runs it."""

from __future__ import annotations

import ast
import inspect
import json
import os
import pydoc
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import models
import pytest
import torch
import transformers
from adapters import with_base_weights
from lengths import few_of, long
from oracle import assert_close
from peft import IA3Config, PeftModel
from row_truth import together
from safetensors.torch import load_file, save_file
from test_advice import texts as advice_texts
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    ResNetConfig,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    WhisperConfig,
)

import hotswap_lab
from hotswap_lab import demo
from hotswap_lab.__main__ import Result, _as_json, _parser, main, show
from hotswap_lab.bench import Measured, Timing
from hotswap_lab.files import ADVICE
from hotswap_lab.lessons import tour

BASE = str(demo.BASE_DIR)


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    """As wide as most."""
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.long
def test_the_tour():
    command = [sys.executable, "-m", "hotswap_lab", "--word", "banana", "--repeats", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.strip()}
    for name in demo.adapter_names():
        assert lines[name][1:3] == [demo.TASKS[name]("banana"), "True"]
        assert float(lines[name][3]) > 0
    assert "PEFT hotswap refuses pig_latin: Configs are incompatible: for use_rslora" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_a_wrong_swap_ends_in_an_error(monkeypatch, capsys):
    def wrong(name, repeats):
        time = Timing(0.002, 0.001, 3)
        ours, theirs = Measured("", "ours", "wrong", time), Measured("", "PEFT", "refused", note="no")
        return [ours, theirs, Measured("", "PEFT load", "right", time)]

    monkeypatch.setattr(tour, "compare", wrong)
    assert main(["--repeats", "1", "--word", "abcdefghij"]) == 1
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "False" in out
    assert "2.00   1.0x" in out
    assert "PEFT hotswap refuses sort: no" in out


@pytest.mark.parametrize("word", ["Hot swap", "understanding"])
def test_words_the_model_does_not_know_are_refused(capsys, word):
    with pytest.raises(SystemExit, match="2"):
        main(["--word", word])
    assert "--word: must be 1 to 10 letters from a to z" in capsys.readouterr().err


PUBLIC = [name for name in dir(hotswap_lab) if name[0] != "_" and not inspect.ismodule(getattr(hotswap_lab, name))]


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("files.summary", ("torch", "peft", "transformers", "hotswap_lab.widgets")),
        long("widgets", ("diffusers", "hotswap_lab.bench", "hotswap_lab.lessons")),
    ],
)
def test_nothing_is_imported_that_is_not_needed(module, heavy):
    code = f"import sys, hotswap_lab.{module}; print({set(heavy)} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_names_are_imported_when_they_are_used():
    """What a type checker reads is what is imported then."""
    tree = ast.parse(Path(hotswap_lab.__file__).read_text())
    (block,) = [each for each in tree.body if isinstance(each, ast.If)]
    imported = {alias.asname: each.module for each in block.body for alias in each.names}
    assert imported.pop("demo") is None
    assert imported == hotswap_lab._MODULE_OF
    assert sorted(imported) == sorted(PUBLIC)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hotswap_lab.nothing


def test_a_star_gives_the_public_names_and_help_prints_the_tour_alone():
    """``help`` prints the help of each name in ``__all__``."""
    exec("from hotswap_lab import *", given := {})
    assert given.keys() - {"__builtins__"} == {*PUBLIC, "demo"}
    text = pydoc.render_doc(hotswap_lab)
    assert "Look before you swap" in text
    assert len(text.splitlines()) < 100


@pytest.mark.parametrize("name", PUBLIC)
def test_each_public_name_has_an_example(name):
    """It runs with the other examples; some refer to the one of a function that belongs with it."""
    text = inspect.getdoc(getattr(hotswap_lab, name))
    referred = re.search(r"See :\w+:`\.?(\w+)`", text)
    if referred:
        text = inspect.getdoc(getattr(hotswap_lab, referred[1], getattr(hotswap_lab.Adapter, referred[1], None)))
    assert ">>> " in text


SCHEMAS = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "commands.py"))["schemas"]()


def told(capsys, *arguments):
    """The exit code and what a command printed as JSON, which is as its schema says."""
    code = main(["--json", *arguments])
    found = json.loads(capsys.readouterr().out)
    jsonschema.validate(found, SCHEMAS[arguments[0]])
    return code, found


def test_each_command_has_a_schema():
    """One that refuses a document with a field too many or too few."""
    (commands,) = [each for each in _parser()._actions if each.dest == "command"]
    assert {*commands.choices} - {*SCHEMAS} == {"serve", "bench"}  # one prints no document, the other writes a file
    found = json.loads(_as_json(show(str(demo.ADAPTERS_DIR))))
    for changed in (found | {"more": 1}, {"ok": True}, found | {"adapters": [found["adapters"][0] | {"ranks": ["4"]}]}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(changed, SCHEMAS["show"])
    jsonschema.validate(found, SCHEMAS["show"])


#: commands as they are piped into a program: the arguments, and the exit code
SORT, REVERSE, DOUBLE = (demo.adapter_path(name) for name in ("sort", "reverse", "double"))
PIPED = [
    (["show", str(demo.ADAPTERS_DIR)], 0),
    long(["show", "/nowhere"], 1),
    (["show"], 2),
    long(["plan", BASE, REVERSE, SORT], 0),
    long(["plan", BASE, DOUBLE, SORT], 1),
    long(["verify", BASE, REVERSE, SORT], 0),
    long(["verify", BASE, DOUBLE, SORT], 1),
    long(["mix", BASE, f"{REVERSE}:1", "--out", "new"], 0),
    long(["mix", BASE, f"{SORT}:nan", "--out", "new"], 2),
    long(["tour", "--repeats", "1"], 0),
    (["tour", "--word", "A b"], 2),
    (["serve", "--set", "rows"], 2),
    long(["serve", "--set", "rows=0"], 1),
]


@pytest.mark.parametrize(("command", "code"), PIPED)
def test_what_is_piped_is_one_document(tmp_path, command, code):
    """Through a real pipe, with all that libraries print from other languages."""
    asked = [sys.executable, "-m", "hotswap_lab", *command, "--json"]
    paths = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(asked, capture_output=True, text=True, cwd=tmp_path, env=os.environ | paths, timeout=300)
    found = json.loads(done.stdout, parse_constant=pytest.fail)
    assert (done.returncode, found["ok"]) == (code, code == 0)
    jsonschema.validate(found, SCHEMAS[command[0] if command[0] in SCHEMAS else "show"])


@pytest.mark.parametrize("command", [None, "tour", "show", "plan", "verify", "mix", "serve", "bench"])
def test_the_commands_say_what_they_take(capsys, command):
    with pytest.raises(SystemExit, match="0"):
        main([*([command] if command else []), "--help"])
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["show", "/nowhere"], 1, "Can't find 'adapter_config.json'"),
        (["plan", BASE, "/nowhere", "/nowhere"], 1, "Can't find 'adapter_config.json'"),
        (["verify", "/nowhere", demo.adapter_path("sort"), demo.adapter_path("sort")], 1, "base model can't be read"),
        (["show", ""], 2, "an empty path"),
        (["mix", BASE, f"{demo.adapter_path('sort')}:1", "--out", ""], 2, "an empty path"),
        (["mix", BASE, ":1", "--out", "folder"], 2, "an empty path"),
        (["mix", BASE, "no weight", "--out", "folder"], 2, "no weight is not ADAPTER:WEIGHT, such as runs/a:0.5"),
        (["mix", BASE, "/runs/a", "runs/b:1", "--out", "folder"], 2, "/runs/a is not ADAPTER:WEIGHT"),
        (["mix", BASE, "runs/a:nan", "--out", "folder"], 2, "runs/a:nan is not ADAPTER:WEIGHT"),
        (["mix", BASE, "runs/a:1_0", "--out", "folder"], 2, "runs/a:1_0 is not ADAPTER:WEIGHT"),
        (["serve", "--set", "rows"], 2, "rows is not NAME=VALUE"),
        (["serve", "--port=-1"], 2, "--port: -1 is not an integer from 0 to 65535"),
        (["serve", "--port", "65536"], 2, "--port: 65536 is not an integer from 0 to 65535"),
        (["tour", "--repeats", "0"], 2, "--repeats: 0 is not an integer from 1 to 1000000"),
        (["tour", "--threads", "1_0"], 2, "--threads: 1_0 is not an integer from 1 to 1024"),
        (["nothing"], 2, "invalid choice"),
    ],
)
def test_each_error_is_one_json_document_too(capsys, monkeypatch, tmp_path, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    try:
        found = main([*arguments, "--json"])
    except SystemExit as error:
        found = error.code
    printed = capsys.readouterr()
    assert (found, json.loads(printed.out)["ok"]) == (code, False)
    jsonschema.validate(json.loads(printed.out), SCHEMAS["show"])
    assert said in " ".join(printed.err.split())
    assert code == 2 or said in json.loads(printed.out)["error"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["plan", "serve"])
def test_a_base_that_cannot_be_reached(capsys, monkeypatch, command):
    """One request, in place of half a minute of repeated ones."""

    def no_network(*_, **how):
        raise ConnectionError("no network")

    monkeypatch.setattr("hotswap_lab.files.hub.get_hf_file_metadata", no_network)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", None)
    adapters = [demo.adapter_path("sort")] * 2 if command == "plan" else []
    assert main([command, "team/nowhere", *adapters]) == 1
    assert "team/nowhere: ConnectionError: no network" in capsys.readouterr().err


@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("command", ["plan", "verify"])
def test_an_adapter_of_another_base_names_both(capsys, tmp_path, command, is_known):
    folder = models.save_random_adapter(models.KINDS["llama"], tmp_path / "other", 0, r=2)
    config = json.loads(Path(folder, "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "team/other" if is_known else None
    Path(folder, "adapter_config.json").write_text(json.dumps(config))
    assert main([command, BASE, folder, folder]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "PEFT can't load the adapter" in error
    assert ("the adapter was made for team/other, and the base is" in error) == is_known


def test_json_has_no_nan(capsys, monkeypatch):
    def show(adapter):
        return Result("", ok=True, adapters=[], damaged=[], size=float("nan"))

    monkeypatch.setattr("hotswap_lab.__main__.show", show)
    assert main(["--json", "show", demo.adapter_path("sort")]) == 0
    assert json.loads(capsys.readouterr().out)["size"] is None


def test_set_may_be_given_twice(monkeypatch):
    given = []

    async def run(args, host, port):
        given.append(args)

    monkeypatch.setattr("hotswap_lab.serving.one_process.run", run)
    assert main(["serve", "--set", "rows=4", "--set", "held=8", "token=a=b"]) == 0
    assert given == [{"rows": "4", "held": "8", "token": "a=b"}]
    assert main(["serve", "--set", "rows=4", "--set", "rows=8"]) == 1  # and the last one does not count in silence
    assert len(given) == 1


def test_show(capsys):
    assert main(["show", "/nowhere"]) == 1
    assert "no folder '/nowhere' here" in capsys.readouterr().err
    assert main(["show", demo.adapter_path("sort")]) == 0
    _, line = capsys.readouterr().out.splitlines()
    assert line.split() == ["sort", "LORA", "6", "16", "24", "24", "32", "64", "28", "645", "kB", "-"]
    code, found = told(capsys, "show", str(demo.ADAPTERS_DIR))
    assert (code, [each["name"] for each in found["adapters"]]) == (0, demo.adapter_names())
    assert found["adapters"][0]["ranks"] == [4]
    assert main(["show", str(demo.ADAPTERS_DIR), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_show_other_methods_and_formats(capsys, tmp_path):
    """A file that isn't PEFT's newest format is read by what reads it for a swap."""
    kind = models.Kind(demo.load_base, dict, ("q_proj",))
    folder = models.save_random_adapter(kind, tmp_path / "old", 0, r=4, lora_alpha=3)
    torch.save(load_file(f"{folder}/adapter_model.safetensors"), f"{folder}/adapter_model.bin")
    Path(folder, "adapter_model.safetensors").unlink()
    for each, expected in ((folder, ["LORA", [4], [3], 4]), (ia3(tmp_path / "ia3"), ["IA3", [], [], 4])):
        found = told(capsys, "show", each)[1]["adapters"][0]
        assert [found[name] for name in ("method", "ranks", "alphas", "layers")] == expected


def test_show_a_part_of_a_file(capsys, tmp_path):
    """Of a folder of adapters, the others are shown."""
    for name in ("sort", "shout"):
        shutil.copytree(demo.adapter_path(name), tmp_path / name)
    with open(tmp_path / "sort" / "adapter_model.safetensors", "r+b") as file:
        file.truncate(20_000)
    assert main(["show", str(tmp_path / "sort")]) == 1
    assert "not fully covered" in capsys.readouterr().err
    code, found = told(capsys, "show", str(tmp_path))
    assert (code, [each["name"] for each in found["adapters"]], len(found["damaged"])) == (1, ["shout"], 1)
    assert main(["show", str(tmp_path)]) == 1
    assert "not fully covered" in capsys.readouterr().out


#: what a config may say, and what is told of it; None if the adapter is shown
CONFIGS = [
    ("alpha_pattern", ["x"], "alpha_pattern=['x']"),
    ("base_model_name_or_path", 5, None),
    ("peft_type", 5, "peft_type=5"),
    ("lora_alpha", "8", "lora_alpha='8'"),
    ("lora_alpha", 10**400, "lora_alpha=1000"),
    ("lora_alpha", float("nan"), "lora_alpha=nan"),
    ("lora_alpha", float("inf"), "lora_alpha=inf"),
    ("lora_alpha", [1], "lora_alpha=[1]"),
    ("alpha_pattern", {"q_proj": "8"}, "alpha_pattern={'q_proj': '8'}"),
    ("lora_dropout", float("inf"), "lora_dropout=inf"),
    ("r", -1, "r=-1"),
    ("r", "8", "r='8'"),
    ("target_modules", 5, "target_modules=5"),
    ("target_modules", "(", "'('"),
    ("rank_pattern", {"(": 8}, "'('"),
    ("use_dora", "yes", "use_dora='yes'"),
    ("layers_pattern", "layers", "layers_pattern"),
]


def test_show_what_is_wrong_with_each(capsys, tmp_path):
    """One bad config doesn't keep the others from being shown, whatever is in it."""
    config = json.loads(Path(demo.adapter_path("sort"), "adapter_config.json").read_text())
    texts = {f"other {at}": (json.dumps(config | {key: value}), said) for at, (key, value, said) in enumerate(CONFIGS)}
    texts |= {"brackets": ("[" * 100_000, "RecursionError"), "empty": ("", "JSONDecodeError")}
    for name, (text, _) in texts.items():
        shutil.copytree(demo.adapter_path("sort"), tmp_path / name)
        (tmp_path / name / "adapter_config.json").write_text(text)
    assert main(["show", str(tmp_path)]) == 1
    _, *rows = capsys.readouterr().out.splitlines()
    assert sorted(name for name in texts for row in rows if re.match(rf"{name} +(LORA|damaged)", row)) == sorted(texts)
    code, found = told(capsys, "show", str(tmp_path))
    assert (code, found["ok"]) == (1, False)
    assert {each["name"] for each in found["adapters"]} == {name for name, (_, said) in texts.items() if said is None}
    for name, (_, said) in texts.items():
        # what other commands refuse
        assert (main(["plan", BASE, str(tmp_path / name), str(tmp_path / name)]) == 0) == (said is None)
        capsys.readouterr()
        if said is not None:
            assert main(["show", str(tmp_path / name)]) == 1
            error = " ".join(capsys.readouterr().err.split())
            assert str(tmp_path / name) in error
            assert said in error
            assert [each["error"] for each in found["damaged"] if each["name"] == name and said in each["error"]]


def test_what_a_file_says_reaches_a_terminal_escaped(capsys, tmp_path):
    """Line breaks too, in a table, in a note and in a refusal; a name, too."""
    evil, escaped = "\x1b[31mred\n\u202eline", r"\x1b[31mred\n\u202eline"
    config = json.loads(Path(demo.adapter_path("sort"), "adapter_config.json").read_text())
    for name, key in ((f"a{evil}", "r"), ("base", "base_model_name_or_path"), ("kind", "peft_type")):
        shutil.copytree(demo.adapter_path("sort"), tmp_path / name)
        changed = config if key == "r" else config | {key: evil}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(changed))
    sort = demo.adapter_path("sort")
    for asked, times in (
        (["show", str(tmp_path)], 3),
        *((["plan", BASE, sort, str(tmp_path / name)], 1) for name in (f"a{evil}", "base", "kind")),
    ):
        main(asked)
        printed = "".join(capsys.readouterr())
        assert "".join(printed.split()).count(escaped) == times, asked
        assert all(each.isprintable() for each in printed.splitlines())
        assert printed.isascii()


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_name_that_the_terminal_lacks(tmp_path, encoding):
    """The last is a byte that is no UTF-8, as Linux allows in names."""
    for name in ("\u00fc", "z\udcff"):
        shutil.copytree(demo.adapter_path("sort"), tmp_path / name)
    command = [sys.executable, "-m", "hotswap_lab", "show", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding}, timeout=60)
    names = [line.split()[0] for line in done.stdout.decode().splitlines()]
    assert (done.returncode, done.stderr, names) == (0, b"", ["adapter", *NAMES[encoding]])


NAMES = {"ascii": [r"z\udcff", r"\xfc"], "utf-8": [r"z\udcff", "\u00fc"]}


def test_checkpoints_are_shown_by_their_numbers(capsys, tmp_path):
    names = ["checkpoint-5", "checkpoint-10", "checkpoint-15", "checkpoint-100", "checkpoint-x"]
    for name in names:
        shutil.copytree(demo.adapter_path("sort"), tmp_path / name)
    assert [each["name"] for each in told(capsys, "show", str(tmp_path))[1]["adapters"]] == names


@pytest.mark.parametrize(("first", "second"), [("reverse", "pig_latin"), ("double", "caesar"), ("caesar", "sort")])
def test_plan_needs_no_weights(capsys, tmp_path, first, second):
    """A base with a config alone; the plan is the one that a loaded model gives."""
    (tmp_path / "config.json").write_text((demo.BASE_DIR / "config.json").read_text())
    code, found = told(capsys, "plan", str(tmp_path), demo.adapter_path(first), demo.adapter_path(second))
    expected = hotswap_lab.plan_hotswap(demo.load(first)[0], demo.adapter_path(second))
    assert (code, found["ok"], found["layers"]) == (int(not expected.ok), expected.ok, expected.counts)
    assert found["nbytes"] == expected.nbytes
    assert [each["summary"] for each in found["refusals"]] == [each.summary for each in expected.refusals]
    assert ["verify --add-layers" in each["next_step"] for each in found["refusals"]] == [True] * code
    # as wide as a terminal, what goes on below is indented, and nothing names what Python alone has
    assert main(["plan", str(tmp_path), demo.adapter_path(first), demo.adapter_path(second)]) == code
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not code or re.search(r"\n  found:    .*\n {12}model", "\n".join(lines))
    assert "add_layers" not in "".join(lines)


def deeper(tensors):
    return tensors | {key.replace("layers.0.", "layers.9."): each.clone() for key, each in tensors.items()}


def with_embeddings(tensors):
    return tensors | {"base_model.model.model.embed_tokens.weight": torch.randn(98, 128)}


#: changes of an adapter, and the exit codes of a plan with it as B and as A
PLANNED = {
    "the same": ({}, dict, 0, 0),
    "for a deeper model": ({}, deeper, 1, 0),
    "with embeddings": ({}, with_embeddings, 3, 3),
    "of a wider model": ({}, lambda tensors: {key: torch.cat([each, each], 1) for key, each in tensors.items()}, 1, 1),
    "incomplete": ({}, lambda tensors: dict([*tensors.items()][1:]), 1, 0),
    "with other names": ({}, lambda tensors: {key.replace("layers", "blocks"): tensors[key] for key in tensors}, 1, 0),
    "on no layer": ({"target_modules": ["nowhere"]}, dict, 1, 1),
    "with rsLoRA": ({"use_rslora": True}, dict, 0, 0),
    "of another initialization": ({"init_lora_weights": "pissa"}, dict, 3, 3),
    "of a huge rank": ({"r": 10**9, "rank_pattern": {}}, dict, 1, 1),
    "of a huge rank in one layer": ({"rank_pattern": {"q_proj": 10**9}}, dict, 1, 1),
    "of a huge rank, with other names": ({"r": 10**9}, lambda tensors: {"base_model.model.x": torch.ones(2)}, 1, 1),
}


@pytest.mark.parametrize("change", few_of(PLANNED, list(PLANNED)[::3]))
def test_a_plan_and_verify_agree(tmp_path, change):
    """What a plan decides without the base's values is what the swap does; no rank of a config is allocated."""
    reverse, other, (config, of_tensors, *expected) = demo.adapter_path("reverse"), tmp_path / "other", PLANNED[change]
    shutil.copytree(reverse, other)
    (other / "adapter_config.json").write_text(
        json.dumps(json.loads((other / "adapter_config.json").read_text()) | config)
    )
    tensors = load_file(other / "adapter_model.safetensors")
    save_file(of_tensors(tensors), other / "adapter_model.safetensors")
    for pair, code in zip(((reverse, str(other)), (str(other), reverse)), expected, strict=True):
        assert main(["plan", BASE, *pair]) == code
        if code != 3:
            assert main(["verify", BASE, *pair]) == code


@pytest.mark.parametrize(
    ("needed", "value"), [("IA3", None), ("use_dora", True), ("modules_to_save", ["lm_head"]), ("bias", "all")]
)
def test_what_needs_weights_is_not_decided(capsys, tmp_path, needed, value):
    if needed == "IA3":
        other = ia3(tmp_path / "ia3")
    else:
        kind = models.Kind(demo.load_base, dict, ("q_proj",))
        other = models.save_random_adapter(kind, tmp_path / needed, 0, r=4, **{needed: value})
    assert main(["plan", BASE, demo.adapter_path("reverse"), other]) == 3
    assert f"weights: {needed};" in capsys.readouterr().out
    assert told(capsys, "plan", BASE, other, demo.adapter_path("reverse")) == (3, {"ok": None, "needs": [needed]})


@pytest.mark.long
def test_base_weights_in_a_file(capsys, tmp_path):
    """A plan needs the base's weights if there are some in either file; a swap gives them back."""
    reverse, kind = demo.adapter_path("reverse"), models.Kind(demo.load_base, dict, ("q_proj",))
    changed = with_base_weights(reverse, tmp_path / "changed", kind, "model.norm.weight")
    for first, second in ((changed, reverse), (reverse, changed)):
        assert told(capsys, "plan", BASE, first, second) == (3, {"ok": None, "needs": ["model.norm.weight"]})
        assert told(capsys, "verify", BASE, first, second)[1]["ok"] is True
    assert main(["plan", BASE, changed, reverse]) == 3
    assert "weights: model.norm.weight;" in capsys.readouterr().out
    assert main(["mix", BASE, f"{changed}:1", f"{reverse}:1", "--out", str(tmp_path / "mix")]) == 1
    assert "comes with other base weights" in capsys.readouterr().err


def test_a_base_that_is_no_model(capsys, tmp_path):
    config = json.loads((demo.BASE_DIR / "config.json").read_text()) | {"architectures": ["Unknown"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "alone").mkdir()  # as a config's own save_pretrained writes it
    (tmp_path / "alone" / "config.json").write_text(json.dumps(config | {"architectures": None}))
    no_class, unknown = (tmp_path / "alone", "names no class"), (demo.ADAPTERS_DIR, "Unrecognized model")
    for base, reason in ((tmp_path, "no attribute Unknown"), no_class, unknown):
        assert main(["plan", str(base), *(demo.adapter_path(name) for name in ("reverse", "sort"))]) == 1
        _, found = re.split("  found: ", " ".join(capsys.readouterr().err.splitlines()))
        assert reason in " ".join(found.partition("  expected: ")[0].split())
        assert re.search("  expected: .*  next: ", found)


@pytest.mark.parametrize("command", ["plan", "verify", "mix"])
def test_an_adapter_that_does_not_fit_the_base(capsys, tmp_path, command):
    """PEFT raises an AttributeError for the one, and safetensors an error of its own for the other."""
    reverse, damaged = demo.adapter_path("reverse"), str(shutil.copytree(demo.adapter_path("sort"), tmp_path / "sort"))
    os.truncate(f"{damaged}/adapter_model.safetensors", 20_000)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(tmp_path / "vit")
    more = [f"{reverse}:1", "--out", str(tmp_path / "mix")] if command == "mix" else [reverse]
    for base, adapter, found in ((str(tmp_path / "vit"), reverse, "no attribute"), (BASE, damaged, "incomplete")):
        assert main([command, base, *([f"{adapter}:1"] if command == "mix" else [adapter]), *more]) == 1
        error = capsys.readouterr().err
        assert found in error
        assert "next: " in error


HELP, SHOW = "plan --help", f"show {demo.adapter_path('sort')}"


@pytest.mark.parametrize("command", [HELP, SHOW, long("bench --model demo --n 1")])
def test_a_reader_that_has_read_enough(command):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as writer:
        command = [sys.executable, "-m", "hotswap_lab", *command.split()]
        buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=buffered)
    progress = [line for line in done.stderr.splitlines() if line.startswith("rank ")]
    assert (done.returncode, done.stderr.splitlines(), bool(progress)) == (0, progress, "bench" in command)


def ia3(folder):
    model = models.get_peft_model(demo.load_base(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    model.save_pretrained(folder)
    return str(folder)


def test_verify(capsys):
    first, second, fewer = (demo.adapter_path(name) for name in ("reverse", "pig_latin", "caesar"))
    assert told(capsys, "verify", BASE, first, second)[1]["ok"] is True
    assert main(["verify", BASE, fewer, second]) == 1
    error = capsys.readouterr().err
    assert "next: pass --add-layers to add them, or name the adapter with the most layers first, as A" in " ".join(
        error.split()
    )
    assert max(map(len, error.splitlines())) <= 80
    assert told(capsys, "verify", BASE, fewer, second, "--add-layers")[1]["ok"] is True


SMALL = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
WHISPER = {
    f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("layers", 1), ("attention_heads", 2))
}
WHISPER |= dict(d_model=16, vocab_size=9, num_mel_bins=8, max_source_positions=20, max_target_positions=20)
WHISPER |= dict(encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=0, bos_token_id=1, eos_token_id=2)
WAV2VEC = dict(conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 8), vocab_size=20)
WAV2VEC |= dict(num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
IMAGES = dict(image_size=32, patch_size=8)
CLIP = dict(text_config=SMALL | {"vocab_size": 99, "max_position_embeddings": 20}, vision_config=SMALL | IMAGES)
#: classes of models that aren't for text, their configs, a layer of each, and what verify says
OTHER_MODELS = {
    "ViTForImageClassification": (ViTConfig(**SMALL, **IMAGES), "classifier", 0),
    "ResNetForImageClassification": (
        ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]),
        "embedder.convolution",
        0,
    ),
    "WhisperForConditionalGeneration": (WhisperConfig(**WHISPER, decoder_start_token_id=3), "self_attn.q_proj", 0),
    "Wav2Vec2ForCTC": (Wav2Vec2Config(**SMALL, **WAV2VEC), "attention.q_proj", 0),
    "CLIPModel": (CLIPConfig(**CLIP), "self_attn.q_proj", 3),
}


@pytest.mark.parametrize("name", few_of(OTHER_MODELS, list(OTHER_MODELS)[::2]))
def test_verify_models_that_are_not_for_text(capsys, tmp_path, name):
    """Their inputs are made from their config; where that says too little, nothing is decided."""
    config, layer, code = OTHER_MODELS[name]
    torch.manual_seed(0)
    getattr(transformers, name)(config).save_pretrained(tmp_path / "base")
    kind = models.Kind(lambda: getattr(transformers, name).from_pretrained(tmp_path / "base"), dict, (layer,))
    pair = [models.save_random_adapter(kind, tmp_path / str(seed), seed, r=2, lora_alpha=64) for seed in (1, 2)]
    found, verdict = told(capsys, "verify", str(tmp_path / "base"), *pair)
    assert (found, verdict["ok"]) == (code, {0: True, 3: None}[code])
    assert main(["verify", str(tmp_path / "base"), *pair]) == code
    assert code == 0 or "not decided without inputs of your own: a CLIPModel" in capsys.readouterr().out


def test_a_mix_of_classifiers(capsys, tmp_path):
    """It is refused as a mix; nobody has asked for a strength."""
    BertForSequenceClassification(BertConfig(**SMALL, vocab_size=99)).save_pretrained(tmp_path / "base")
    kind = models.Kind(lambda: BertForSequenceClassification.from_pretrained(tmp_path / "base"), dict, ("query",))
    adapters = [
        models.save_random_adapter(kind, tmp_path / str(seed), seed, r=2, task_type="SEQ_CLS") for seed in (1, 2)
    ]
    asked = ["mix", str(tmp_path / "base"), *(f"{each}:0.5" for each in adapters), "--out", str(tmp_path / "out")]
    assert main(asked) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert re.match(r"The adapters .* can't be mixed. found: an adapter with modules_to_save", error)


#: what is asked, and the advice of the refusal, which is about the command
ADVISED = [
    (["plan", BASE, str(demo.ADAPTERS_DIR), "SORT"], "pass one of them, such as .*/caesar'"),
    (["verify", BASE, "IA3", "SORT"], "name two of the same type"),
    (["mix", BASE, "SORT:1", "BIAS:1", "--out", "OUT"], "mix others"),
    (["plan", BASE, "SORT", "NAN"], "get an undamaged copy"),
]


@pytest.mark.parametrize(("asked", "advice"), ADVISED)
def test_what_is_advised_is_about_the_command(capsys, tmp_path, asked, advice):
    kind = models.Kind(demo.load_base, dict, ("q_proj",))
    places = {"SORT": demo.adapter_path("sort"), "OUT": str(tmp_path / "out")}
    places |= {"IA3": ia3(tmp_path / "ia3"), "NAN": str(shutil.copytree(places["SORT"], tmp_path / "nan"))}
    tensors = load_file(f"{places['NAN']}/adapter_model.safetensors")
    save_file({key: each * float("nan") for key, each in tensors.items()}, f"{places['NAN']}/adapter_model.safetensors")
    places["BIAS"] = models.save_random_adapter(kind, tmp_path / "bias", 0, r=4, bias="all")
    code, found = told(capsys, *(re.sub("|".join(places), lambda name: places[name[0]], each) for each in asked))
    assert code == 1
    assert re.fullmatch(advice, found["refusals"][0]["next_step"])


def test_each_advice_that_is_put_in_other_words_exists():
    texts = [each.replace("{{", "{").replace("}}", "}") for _, each in advice_texts()]
    lacking = {old for old in ADVICE if not any(old in each for each in texts)}
    # these two are in the code, and are tested above
    assert {each[:12] for each in lacking} == {"; all: Adapt", ", or pass al"}


def test_mix(capsys, tmp_path):
    """The saved mix is the weighted sum of both, in a model with PEFT alone."""
    weights, out = {"reverse": 0.7, "pig_latin": -0.3}, str(tmp_path / "mix")
    folders = {name: demo.adapter_path(name) for name in weights}
    shares = (("reverse", 0.5), ("reverse", 0.2), ("pig_latin", -0.3))  # named twice, it counts twice
    asked = ["mix", BASE, *(f"{folders[name]}:{share}" for name, share in shares), "--out", out]
    assert told(capsys, *asked) == (0, {"ok": True, "out": out, "rank": 40})
    with pytest.raises(SystemExit, match="2"):
        main(asked)
    assert "must be a new or an empty folder" in capsys.readouterr().err
    base, truth = demo.load_base().double(), together(folders, weights)
    expected, before = (model(**base.dummy_inputs).logits for model in (truth, base))
    assert (expected - before).abs().max() > 1
    mixed = PeftModel.from_pretrained(base, out)
    assert_close(mixed(**base.dummy_inputs).logits, expected, 1e-6)
