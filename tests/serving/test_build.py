"""What a server is started with: checked before Ray starts, so none is started here."""

import json
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("ray")

from refusals import refused
from served import FAMILY

from hotswap_lab import demo
from hotswap_lab.serving import Options, Table, app
from hotswap_lab.serving.arguments import NUMBERS, load_replica
from hotswap_lab.serving.cluster import build

pytestmark = pytest.mark.filterwarnings("ignore")


def options_of(args):
    """What the front and the replicas are told, and how many there are of each."""
    front = app(args)._bound_deployment
    name, token, options, replica, register = front.init_args
    replica = replica._bound_deployment
    assert replica.init_args[1] == options
    assert register._bound_deployment.init_args == (name,)
    return name, token, options, front.num_replicas, replica


def test_the_embedded_model(monkeypatch):
    monkeypatch.setenv("HOTSWAP_ADMIN_TOKEN", "secret")
    name, token, options, fronts, replica = options_of({})
    assert (name, token, fronts, replica.num_replicas) == ("demo", "secret", 1, 1)
    assert options == Options(longest_prompt=32, longest_answer=32, target_rank=48)


def test_text_as_from_a_command_line():
    args = {"rows": "4", "compile": "true", "replicas": "4", "package": "folder", "timeout": 7, "token": 5}
    _, token, options, fronts, replica = options_of(args)
    assert (options.rows, options.compile, options.package, options.timeout) == (4, 1, "folder", 7)
    assert (token, fronts, replica.num_replicas) == ("5", 2, 4)
    deployment = replica._deployment_config
    assert (deployment.max_ongoing_requests, deployment.max_queued_requests) == (8, 100)


def test_a_model_of_ones_own(tmp_path):
    base = shutil.copytree(demo.BASE_DIR, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    adapters = f"loud={FAMILY['shout']},sort={FAMILY['sort']}"
    name, _, options, _, _ = options_of({"base": str(base), "adapters": adapters})
    assert (name, options.longest_prompt, options.longest_answer) == (str(base), 192, 64)
    refused("1024 and 256|don't fit the model", app, {"base": str(base), "longest_prompt": 1024, "longest_answer": 256})
    assert options_of({"base": str(base)})[2] == options  # and no adapters


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({"row": 8}, r"found:    row\n  expected: some of base, adapters, token, replicas, rows"),
        ({"rows": 0}, "rows has an invalid value.*\n.*found:    rows=0\n.*at least 1"),
        ({"rows": "eight"}, "rows='eight'"),
        ({"rows": 2.5}, r"rows=2\.5"),
        ({"rows": None}, "rows=None"),
        ({"queue": -1}, "queue=-1"),
        ({"replicas": "0"}, "replicas='0'"),
        ({"timeout": 0}, "timeout=0"),
        ({"held": -1}, "held=-1.*\n.*at least 0"),
        ({"longest_prompt": 40, "longest_answer": 40}, "don't fit the model.*\n.*40.*40.*\n.*64"),
        ({"base": "/nowhere"}, "base model can't be read.*\n.*found:    /nowhere"),
        ({"base": str(demo.BASE_DIR), "adapters": "/nowhere"}, "There are no adapters.*\n.*/nowhere"),
        ({"adapters": "one=/nowhere"}, "Can't find 'adapter_config.json'"),
        ({"adapters": "one"}, "There are no adapters"),
        ({"adapters": {"demo": FAMILY["sort"]}}, "can't have the name 'demo'"),
        ({"adapters": {"a+b": FAMILY["sort"]}}, r"can't have the name 'a\+b'"),
        ({"adapters": FAMILY, "target_rank": 4}, "no_vowels has a higher rank.*\n.*rank 6\n.*target_rank=4"),
    ],
)
def test_what_is_wrong_is_refused_before_ray_starts(args, text):
    refused(text, app, args)


def test_all_that_is_wrong_is_one_error():
    error = refused(
        "no such argument", app, {"row": 8, "rows": 0, "adapters": {"a+b": FAMILY["sort"], "b": "/nowhere"}}
    )
    assert [each.summary.split()[0] for each in error.refusals] == ["The", "The", "An", "Can't"]


def test_a_replica_without_adapters(tmp_path):
    import asyncio

    from hotswap_lab.serving import Request, Version

    for rank, added in ((0, "double"), (4, "double"), (48, "pig_latin")):
        options = Options(longest_prompt=16, longest_answer=16, target_rank=rank)
        replica = load_replica(str(demo.BASE_DIR), [], options)
        version = Version.of("late", FAMILY[added])

        async def said(shares):
            return "".join([piece.text async for piece in replica.answer(Request("hotswap>", shares))])  # noqa: B023

        assert asyncio.run(said({})) == "hotswap"
        replica.load([version])
        assert asyncio.run(said({version: 1.0})) == demo.ask(*demo.load(added), "hotswap")
    assert Table().shares("demo", "demo") == {}


def test_help_names_every_argument():
    code = "import sys; sys.modules['ray'] = None; sys.argv = ['-', '--help']; import runpy;"
    code += "runpy.run_module('hotswap_lab.serving', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in ("base", "adapters", "token", *NUMBERS, "package"):
        assert f"``{name}``" in done.stdout
    assert "timeout=120" in done.stdout


def test_no_line_for_each_call_of_a_replica_or_of_the_register():
    replica = options_of({})[-1]
    register = app({})._bound_deployment.init_args[-1]._bound_deployment
    for each in (replica, register):
        assert each._deployment_config.logging_config["enable_access_log"] is False
    assert build({})._bound_deployment._deployment_config.logging_config is None
