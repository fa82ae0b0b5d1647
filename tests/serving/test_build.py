"""What a server is started with: checked before anything starts."""

import asyncio
import json
import shutil
import sys

import pytest
import torch
from adapters import with_base_weights
from models import Kind, load, save_random_adapter
from refusals import refused
from served import FAMILY, text_of

from hotswap_lab import demo, resolve_slot
from hotswap_lab.__main__ import main
from hotswap_lab.serving import Options, Request, Table, Version, app
from hotswap_lab.serving.arguments import NUMBERS, TEXTS, Arguments, load_replica

TEXT = {"rows": "4", "compile": "true", "replicas": "4", "package": "folder", "timeout": 7, "token": 5}


def test_the_embedded_model_and_text_as_from_a_command_line(monkeypatch):
    monkeypatch.setenv("HOTSWAP_ADMIN_TOKEN", "secret")
    given = Arguments.of({})
    assert (given.name, given.token, given.replicas) == ("demo", "secret", 1)
    assert given.options == Options(longest_prompt=32, longest_answer=32, target_rank=48)
    given = Arguments.of(TEXT)
    options = given.options
    assert (options.rows, options.compile, options.package, options.timeout) == (4, 1, "folder", 7)
    assert (given.token, given.replicas) == ("5", 4)


def test_a_model_of_ones_own(tmp_path, monkeypatch):
    base = shutil.copytree(demo.BASE_DIR, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    adapters = f"loud={FAMILY['shout']},sort={FAMILY['sort']}"
    given = Arguments.of({"base": str(base), "adapters": adapters})
    assert (given.name, given.options.longest_prompt, given.options.longest_answer) == (str(base), 192, 64)
    args = {"base": str(base), "longest_prompt": 1024, "longest_answer": 256}
    refused("1024 and 256|don't fit the model", Arguments.of, args)
    shutil.copytree(FAMILY["sort"], tmp_path / "runs" / "lr=0.1" / "best")
    assert [*Arguments.of({"base": str(base), "adapters": str(tmp_path / "runs" / "lr=0.1")}).adapters] == ["best"]
    monkeypatch.chdir(demo.ADAPTERS_DIR)
    alone = Arguments.of({"base": str(base)})
    assert (alone.options, alone.adapters) == (given.options, {})  # not those of the current folder


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({"row": 8}, r"found:    row\n  expected: some of base, adapters, token, replicas, rows"),
        ({"rows": 0}, "rows has an invalid value.*\n.*found:    rows=0\n.*at least 1"),
        ({"rows": "eight"}, "rows='eight'"),
        ({"rows": 2.5}, r"rows=2\.5"),
        ({"rows": None}, "rows=None"),
        *(
            ({"rows": each}, "rows has an invalid")
            for each in ("1_0", " 8", "８", "+8", "8.0", "true", True, "9" * 5000)
        ),
        ({"queue": -1}, "queue=-1"),
        ({"replicas": "0"}, "replicas='0'"),
        ({"timeout": 0}, "timeout=0"),
        ({"warm": "no"}, "warm='no'.*\n.*at least 0"),
        ({"dtype": "banana"}, "no such dtype.*\n.*dtype='banana'"),
        ({"held": -1}, "held=-1.*\n.*at least 0"),
        ({"longest_prompt": 40, "longest_answer": 40}, "don't fit the model.*\n.*40.*40.*\n.*64"),
        ({"base": "/nowhere"}, "base model can't be read.*\n.*found:    /nowhere"),
        ({"base": str(demo.BASE_DIR), "adapters": "/nowhere"}, "There are no adapters.*\n.*/nowhere"),
        ({"adapters": "one=/nowhere"}, "Can't find 'adapter_config.json'"),
        ({"adapters": "one"}, "There are no adapters"),
        ({"adapters": "one=/a,two=/b,one=/c"}, "stands for one value.*\n.*'one', more than once"),
        ({"adapters": "one=/a,one=/c", "rows": 0}, r"(?s)rows has an invalid.*'one', more than once"),
        ({"adapters": {"demo": FAMILY["sort"]}}, "can't have the name 'demo'"),
        ({"adapters": {"a+b": FAMILY["sort"]}}, r"can't have the name 'a\+b'"),
        ({"adapters": FAMILY, "target_rank": 4}, "no_vowels has a higher rank.*\n.*rank 6\n.*target_rank=4"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_starts(args, text):
    refused(text, Arguments.of, args)


def test_all_that_is_wrong_is_one_error():
    args = {"row": 8, "rows": 0, "adapters": {"a+b": FAMILY["sort"], "b": "/nowhere"}}
    error = refused("no such argument", Arguments.of, args)
    assert [each.summary.split()[0] for each in error.refusals] == ["The", "The", "An", "Can't"]


def test_the_dtype_that_is_asked_for():
    given = Arguments.of({"dtype": "bfloat16", "warm": "false"})
    versions = [Version.of("sort", FAMILY["sort"])]
    replica = load_replica(given.base, versions, given.options)
    assert (replica.pool.model.dtype, replica.state["dtype"]) == (torch.bfloat16, "bfloat16")
    assert not given.options.warm


@pytest.mark.parametrize(("layers", "number"), [({}, 28), ({"layers": "q_proj,v_proj"}, 8)])
def test_the_layers_without_an_adapter(layers, number):
    given = Arguments.of({"base": str(demo.BASE_DIR), "longest_prompt": 8, "longest_answer": 8, **layers})
    assert len(resolve_slot(load_replica(given.base, [], given.options).pool.model, "default").layers) == number


@pytest.mark.long
def test_a_replica_without_adapters():
    for rank, added in ((0, "double"), (4, "double"), (48, "pig_latin")):
        options = Options(longest_prompt=16, longest_answer=16, target_rank=rank)
        replica, version = load_replica(str(demo.BASE_DIR), [], options), Version.of("late", FAMILY[added])
        assert asyncio.run(text_of(replica.answer(Request(prompt="hotswap>")))) == "hotswap"
        replica.load([version])
        said = asyncio.run(text_of(replica.answer(Request(prompt="hotswap>", shares={version: 1.0}))))
        assert said == demo.ask(*demo.load(added), "hotswap")
    assert Table().shares("demo", "demo") == {}


@pytest.mark.long
def test_a_first_adapter_with_base_weights_in_its_file(tmp_path):
    """PEFT loads them into the base, which other requests get: other ones are refused, and its own may come first."""
    kind, options = Kind(demo.load_base, dict, ("q_proj",)), Options(longest_prompt=16, longest_answer=16)
    on_embeddings = save_random_adapter(kind, tmp_path / "own", 1, target_modules=["embed_tokens", "q_proj"])
    changed = with_base_weights(FAMILY["shout"], tmp_path / "changed", kind, "model.norm.weight")
    with torch.no_grad():
        answers = [load(kind, each)(**kind.base().dummy_inputs).logits for each in (FAMILY["shout"], changed)]
    assert (answers[0] - answers[1]).abs().max() > 1
    versions = {name: Version.of(name, path) for name, path in {"own": on_embeddings, "changed": changed}.items()}
    sort = Version.of("sort", FAMILY["sort"])
    error = "comes with other base weights(.*\n)*.*load it into a model of its own"
    refused(error, load_replica, str(demo.BASE_DIR), [versions["changed"], sort], options)
    replica = load_replica(str(demo.BASE_DIR), [versions["own"], sort], options)
    for shares, expected in (({}, "hotswap"), ({sort: 1.0}, "ahopstw")):
        assert asyncio.run(text_of(replica.answer(Request(prompt="hotswap>", shares=shares)))) == expected
    refused(error, replica.load, [versions["changed"]])


def test_help_names_every_argument(capsys, monkeypatch):
    """Where the server's packages are missing, it is the command's own, and what to install."""
    for argument in ("--help", "-h"):
        with pytest.raises(SystemExit, match="0"):
            main(["serve", argument])
        printed = capsys.readouterr().out
        assert [each for each in ("base", "adapters", "token", *NUMBERS, *TEXTS) if f"``{each}``" not in printed] == []
        assert "timeout=120" in printed
    for name in [each for each in sys.modules if each.startswith("hotswap_lab.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pydantic", None)
    with pytest.raises(SystemExit, match="0"):
        main(["serve", "--help"])
    printed = capsys.readouterr().out
    assert printed.startswith("usage: hotswap-lab serve")
    assert printed.endswith('pip install "hotswap_lab[serve]"\n')


@pytest.mark.filterwarnings("ignore")
def test_what_ray_is_told():
    """And no line in its log for each call of a replica or of the register."""
    pytest.importorskip("ray")
    front = app(TEXT)._bound_deployment
    name, token, options, replica, register = front.init_args
    replica, register = replica._bound_deployment, register._bound_deployment
    assert (name, token, front.num_replicas, replica.num_replicas) == ("demo", "5", 2, 4)
    assert (replica.init_args[1], register.init_args) == (options, (name,))
    deployment = replica._deployment_config
    assert (deployment.max_ongoing_requests, deployment.max_queued_requests) == (8, 100)
    assert [each._deployment_config.logging_config["enable_access_log"] for each in (replica, register)] == [False] * 2
    assert front._deployment_config.logging_config is None
    assert app({})._bound_deployment.num_replicas == 1
