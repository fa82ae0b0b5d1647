"""The backend that works here, found by trying."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from lengths import long

from hotswap_lab import pick_backend

CODE = """
import warnings
from hotswap_lab import pick_backend
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(pick_backend(), pick_backend())
print(*[each.message for each in caught if "aot_eager" in str(each.message)], sep="\\n")
"""


def test_inductor_where_it_works():
    assert pick_backend() == "inductor"


@pytest.mark.parametrize("compiler", [long("no-such-compiler"), long("false")])
def test_aot_eager_and_one_clear_line_where_no_compiler_works(tmp_path, compiler):
    environment = {"CXX": compiler, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment)
    lines = done.stdout.splitlines()
    assert lines[0] == "aot_eager aot_eager", done.stderr
    assert "Install a C++ compiler" in lines[1]


@pytest.mark.long
def test_a_c_compiler_is_named_as_the_cause(tmp_path):
    """PEFT leaves this behind when it has loaded a BOFT adapter."""
    environment = {**os.environ, "CXX": "gcc", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment)
    lines = done.stdout.splitlines()
    assert lines[0] == "aot_eager aot_eager", done.stderr
    assert "CXX names 'gcc'" in lines[1]


@pytest.mark.long
def test_a_broken_build_in_the_cache_is_no_missing_compiler(tmp_path):
    """What a killed process leaves of a build can't be loaded, and inductor does not build it again."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}

    def run() -> str:
        done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment)
        return done.stdout.strip()

    assert run() == "inductor inductor"
    builds = list(tmp_path.rglob("*.so"))
    assert builds
    for build in builds:
        os.truncate(build, 100)
    assert run() == "inductor inductor"
