"""The hosted workflows run the stages of CI's script, and a release checks the version in the form that is written."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
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


def test_a_release_checks_its_version(tmp_path):
    """The tag is the version, and the changelog has it with a date."""
    check = next(each for each in commands(ROOT / ".github/workflows/release.yml") if "version=" in each)
    version, log = hotswap_lab.__version__, (ROOT / "CHANGELOG.md").read_text()
    assert f"\n## [{version}]" in log
    (tmp_path / "hotswap_lab").mkdir()
    shutil.copy(ROOT / "hotswap_lab" / "__init__.py", tmp_path / "hotswap_lab")

    def is_released(tag: str, log: str) -> bool:
        (tmp_path / "CHANGELOG.md").write_text(log)
        env = os.environ | {"GITHUB_REF_NAME": tag}
        return not subprocess.run(["bash", "-ec", check], cwd=tmp_path, env=env, check=False).returncode

    dated = re.sub(r"(?m)^## \[(\d.*?)\].*$", r"## [\1] - 2030-01-31", log)
    assert is_released(f"v{version}", dated)
    assert not is_released("v999.0", dated + "## [999.0] - 2030-01-31\n")
    assert not is_released(f"v{version}", dated.replace("2030-01-31", "soon"))


def test_the_nightly_run_looks_at_a_test_that_exists():
    text = (ROOT / ".github/workflows/nightly.yml").read_text()
    name, file = re.search(r"-k (\w+) (\S+\.py)", text).groups()
    assert f"def {name}" in (ROOT / file).read_text()
