"""The backend that works here, found by trying."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.long
CODE = """
import warnings
from hotswap_lab import pick_backend
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(pick_backend(), pick_backend())
print(*[each.message for each in caught if "aot_eager" in str(each.message)], sep="\\n")
"""


def picked(**environment: object) -> list[str]:
    """What another process says."""
    environment = {**os.environ, **{key: str(value) for key, value in environment.items()}}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment)
    assert done.stdout, done.stderr
    return done.stdout.splitlines()


def finds_cxx_library() -> bool:
    """What a C compiler links has no C++ library. It is found where PyTorch has loaded that for all, with CUDA's."""
    code = "import ctypes, torch; ctypes.CDLL(None)._ZTTNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEE"
    return not subprocess.run([sys.executable, "-c", code], capture_output=True).returncode


#: what names the compiler, and what the one line that is said then has in it; PEFT leaves the third behind by BOFT
COMPILERS = {
    "no-such-compiler": "Install a C++ compiler",
    "false": "Install a C++ compiler",
    "gcc": "CXX names 'gcc'",
}


@pytest.mark.parametrize("compiler", COMPILERS)
def test_aot_eager_and_one_clear_line_where_no_compiler_works(tmp_path, compiler):
    backends, line, *_ = picked(CXX=compiler, TORCHINDUCTOR_CACHE_DIR=tmp_path)
    if compiler == "gcc" and finds_cxx_library():
        assert (backends, line) == ("inductor inductor", "")
        return
    assert backends == "aot_eager aot_eager"
    assert COMPILERS[compiler] in line


def test_a_broken_build_in_the_cache_is_no_missing_compiler(tmp_path):
    """What a killed process leaves of a build can't be loaded, and inductor does not build it again."""
    assert picked(TORCHINDUCTOR_CACHE_DIR=tmp_path)[0] == "inductor inductor"
    builds = list(tmp_path.rglob("*.so"))
    assert builds
    for build in builds:
        os.truncate(build, 100)
    assert picked(TORCHINDUCTOR_CACHE_DIR=tmp_path)[0] == "inductor inductor"
