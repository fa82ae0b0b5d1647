"""The hosted workflows run the stages of CI's script, and a release checks the version in the form that is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import hotswap_lab

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SCRIPT = (ROOT / ".ci" / "run").read_text()


def stages() -> list[str]:
    """The stages that CI's script runs if it is given none."""
    return re.search(r"^ALL=\((.+)\)$", SCRIPT, re.MULTILINE).group(1).split()


def commands(workflow: Path) -> list[str]:
    jobs = yaml.safe_load(workflow.read_text())["jobs"].values()
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


def test_hosted_ci_runs_every_stage_once():
    """What runs on Linux is all that CI's script runs, and each stage is a function of it."""
    linux = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["linux"]
    assert sorted(" ".join(linux["strategy"]["matrix"]["stages"]).split()) == sorted(stages())
    assert linux["steps"][-1]["run"] == ".ci/run ${{ matrix.stages }}"
    assert set(stages()) <= set(re.findall(r"^(\w+)\(\) \{", SCRIPT, re.MULTILINE))


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_has_few_rights_and_ends(workflow):
    content = yaml.safe_load(workflow.read_text())
    assert content["permissions"].pop("contents") == "read"
    assert "write" not in content["permissions"].values() or workflow.name == "nightly.yml"
    assert content["concurrency"]
    assert all(job["timeout-minutes"] <= 90 for job in content["jobs"].values())
    for command in re.findall(r"\.ci/run +([\w ]+)", "\n".join(commands(workflow))):
        assert set(command.split()) <= set(stages())


def test_a_release_finds_its_version():
    check = next(each for each in commands(ROOT / ".github/workflows/release.yml") if "version=" in each)
    init, log = (ROOT / "hotswap_lab/__init__.py").read_text(), (ROOT / "CHANGELOG.md").read_text()
    for line in (f'__version__ = "{hotswap_lab.__version__}"', f"## [{hotswap_lab.__version__}]"):
        assert line in [each for text in (init, log) for each in text.splitlines()]
        assert line.replace('"', '\\"').replace(hotswap_lab.__version__, "$version") in check


def test_the_nightly_run_looks_at_a_test_that_exists():
    text = (ROOT / ".github/workflows/nightly.yml").read_text()
    name, file = re.search(r"-k (\w+) (\S+\.py)", text).groups()
    assert f"def {name}" in (ROOT / file).read_text()
