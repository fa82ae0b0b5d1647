"""pyproject.toml, the conda environments, README, the notebooks, CI and the hosted workflows say the same."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from hotswap_lab.compat import KNOWN

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, TOOLS = PYPROJECT["project"], PYPROJECT["tool"]
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
SCRIPT = (ROOT / ".ci" / "run").read_text()
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}
#: the stages that CI's script runs if it is given none
STAGES = re.search(r"^ALL=\((.+)\)$", SCRIPT, re.MULTILINE).group(1).split()

#: what the same package is called on conda-forge
CONDA_NAMES = {"pytorch": "torch", "pytorch-cpu": "torch"}
#: what conda environments have beside the packages of pyproject.toml
CONDA_ONLY = {"python", "pip", "cxx-compiler"}


def pip_packages(extra: str) -> dict[str, str]:
    """What an installation with this extra brings: the extras that it names itself are included."""
    packages, entries = {}, PROJECT["dependencies"] + PROJECT["optional-dependencies"][extra]
    for requirement in map(Requirement, entries):
        if requirement.name == PROJECT["name"]:
            for other in requirement.extras:
                packages |= pip_packages(other)
        else:
            packages[requirement.name] = str(requirement.specifier)
    return packages


def conda_packages(file: str) -> dict[str, str]:
    packages = {}
    for entry in yaml.safe_load((ROOT / file).read_text())["dependencies"]:
        if isinstance(entry, str):
            requirement = Requirement(entry.replace("python=3", "python==3"))
            if requirement.name not in CONDA_ONLY:
                packages[CONDA_NAMES.get(requirement.name, requirement.name)] = str(requirement.specifier)
    return packages


@pytest.mark.parametrize("file", ["environment.yml", "binder/environment.yml"])
def test_the_environments_agree_with_pyproject(file):
    assert conda_packages(file) == pip_packages("lab")


def test_binder_has_what_it_needs():
    assert "cxx-compiler" in (ROOT / "binder" / "environment.yml").read_text()
    post_build = ROOT / "binder" / "postBuild"
    assert post_build.stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", str(post_build)], check=False).returncode == 0
    assert "set -e\npip install --no-deps -e .\n" in post_build.read_text()


def test_the_repository_stands_in_one_place():
    """README's badges and the notebooks' first cells are made from pyproject.toml by notebooks/refresh.py."""
    address = PROJECT["urls"]["Repository"].removeprefix("https://github.com/")
    pattern = r"(?:github\.com/|githubusercontent\.com/|mybinder\.org/v2/gh/|google\.com/github/)([\w-]+/hotswap[\w-]*)"
    pages = [ROOT / name for name in ("README.md", "CHANGELOG.md", "SECURITY.md", "CITATION.cff")]
    files = [*pages, ROOT / "pyproject.toml", *(ROOT / "notebooks").rglob("*.ipynb")]
    found = {file.name: re.findall(pattern, file.read_text()) for file in files}
    assert len(found["README.md"]) >= 2
    assert all(each == address for addresses in found.values() for each in addresses)
    owner, name = address.split("/")
    assert PROJECT["urls"]["Documentation"] == f"https://{owner}.github.io/{name}/"


def of_ci(function: str) -> str:
    """What a function of the CI script prints."""
    script = f"eval \"$(sed -n '/^{function}()/,/^}}/p' .ci/run)\"; {function}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_ci_runs_the_very_test_commands_of_readme_and_contributing():
    commands = re.findall(r"^python3 -m venv .*(?:&&\n.*)+$", README, re.MULTILINE)
    assert max(map(len, "\n".join(commands).splitlines())) <= 100, "GitHub cuts longer lines at 830 px"
    lab, test = (each.replace("\n", " ") for each in commands)
    assert '".[lab]"' in lab
    assert lab.endswith("jupyter lab notebooks/00_start_here.ipynb")
    assert '".[test]"' in test
    (long,) = re.findall(r"^(\.venv/bin/pytest .*)$", CONTRIBUTING, re.MULTILINE)
    assert (of_ci("readme_command"), of_ci("long_command")) == (test, long)
    assert test.endswith(f"&& {long.removesuffix(' -m long')}")
    assert SCRIPT.count('eval "$(long_command)"') == 1
    # with the system's own Python, or where it is the only one
    assert SCRIPT.count('eval "$(readme_command)"') == 2


def test_the_files_that_commands_name_are_there():
    """With xdist, pytest says only that it ran no tests where a file is missing."""
    text = "\n".join([SCRIPT, CONTRIBUTING, *(command for name in WORKFLOWS for command in commands(name))])
    named = re.findall(r"(?<![\w./])((?:tests|notebooks)/[\w{*][^\s`)]*)", text)
    names = sorted({each for each in named if "$" not in each and "NAME" not in each})
    assert len(names) > 30
    done = subprocess.run(["bash", "-c", f"ls -d {' '.join(names)}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ci_installs_every_floor():
    """``constraints`` in .ci/run pins what ``package`` installs; one of a package with extras is of no use to it."""
    extras = [each for name, extra in PROJECT["optional-dependencies"].items() if name != "ray" for each in extra]
    requirements = [each for each in map(Requirement, PROJECT["dependencies"] + extras) if not each.extras]
    pinned = [Requirement(line) for line in of_ci("constraints").splitlines()]
    assert {each.name: str(each.specifier) for each in pinned} == {
        each.name: f"=={floor_of(each)}" for each in requirements
    }


def floor_of(requirement: Requirement) -> str:
    (floor,) = (each.version for each in requirement.specifier if each.operator == ">=")
    return floor


def test_the_table_of_versions_goes_from_the_floors_to_the_newest_known():
    """conftest.py prints its rows. The first has the floors, and the last the newest versions that compat.py knows."""
    table = re.search(r"^\| Python \| torch .*\n(?:\|.*\n)+", README + CONTRIBUTING, re.MULTILINE).group()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    names, _, oldest, *_, newest = (row[:-1] for row in rows)
    oldest, newest = (dict(zip(names, map(Version, row), strict=True)) for row in (oldest, newest))
    lab = map(Requirement, (f"{name}{specifier}" for name, specifier in pip_packages("lab").items()))
    floors = {each.name: Version(floor_of(each)) for each in lab}
    python = Version(PROJECT["requires-python"].removeprefix(">="))
    assert {name: oldest[name] for name in names[1:]} == {name: floors[name] for name in names[1:]}
    assert oldest["Python"].release[:2] == python.release
    for name, known in KNOWN.items():
        first, last = map(Version, re.findall(r"[\d.]+", known))
        assert (first, last.release) == (floors[name], newest[name].release[:2])


def test_readme_names_every_notebook_and_only_those():
    first_cells = "".join(re.findall(r"^\| (.+?) \|", README, re.MULTILINE))
    linked = set(re.findall(r"\]\(notebooks/(\w+\.ipynb)\)", first_cells))
    assert linked == {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(arguments):
    """Lint and format, notebooks included."""
    done = subprocess.run([sys.executable, "-m", "ruff", *arguments, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# --- the hosted workflows


def test_hosted_ci_runs_every_stage_once():
    """What runs on Linux is all that CI's script runs, and each stage is a function of it."""
    linux = WORKFLOWS["ci"]["jobs"]["linux"]
    assert sorted(" ".join(linux["strategy"]["matrix"]["stages"]).split()) == sorted(STAGES)
    assert linux["steps"][-1]["run"] == ".ci/run ${{ matrix.stages }}"
    assert set(STAGES) <= set(re.findall(r"^(\w+)\(\) \{", SCRIPT, re.MULTILINE))


def commands(workflow: str) -> list[str]:
    return [step["run"] for job in WORKFLOWS[workflow]["jobs"].values() for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_has_few_rights_and_ends(name):
    workflow = WORKFLOWS[name]
    assert workflow["permissions"]["contents"] == "read"
    assert "write" not in workflow["permissions"].values() or name == "nightly"
    assert workflow["concurrency"]
    assert all(job["timeout-minutes"] <= 90 for job in workflow["jobs"].values())
    for command in re.findall(r"\.ci/run +([\w ]+)", "\n".join(commands(name))):
        assert set(command.split()) <= set(STAGES)


def test_every_wait_has_a_limit():
    """A mistake must fail, and not hang. A task is limited as a whole, and a barrier for all of its waits."""
    unlimited = re.compile(r"(?<!meeting)\.(wait|join|result|acquire)\(\)")
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not unlimited.search(line) or "await " in line, f"{path}: {line}"
