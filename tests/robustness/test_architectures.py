"""The short form of architectures.py, and cases that have found a mistake: they must stay right."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from architectures import CHECKS, Case
from lengths import TIMES, few_of
from tiny_models import ARCHITECTURES

pytestmark = pytest.mark.filterwarnings("ignore")
#: by what was wrong: architecture, check, seed
FOUND = {
    "the sequence comes first, and tokens have the adapters of other rows": ("xlnet", "rows", 1),
    "the same in some layers": ("longformer", "rows", 1),
    "images are not rows": ("llava", "rows", 6),
    "flattened tokens, equal rows, refused": ("opt", "rows", 1),
    "one row of flattened tokens taken for several rows": ("opt", "rows", 0),
    "flattened tokens, one row, no answer": ("opt", "generate", 0),
    "flattened windows refused": ("swin", "rows", 0),
    "flattened tokens in one expert refused": ("qwen2_moe", "rows", 3),
    "the sequence comes first, equal rows, refused": ("xlnet", "rows", 2),
    "an encoder before beams, refused": ("whisper", "generate", 1),
    "rows in another dtype: the swap accepted, every batch refused": ("llama", "rows", 1),
    "max_bytes drops what is loaded, and an update is lost": ("bert", "pools", 17),
    "a config that loading changes, and an update is lost": ("mixtral", "pools", 15),
    "float64 and a scaling in float32": ("gpt2", "pools", 0),
    "BatchNorm among the modules to save": ("resnet", "pools", 2),
    "BatchNorm in base_weights": ("resnet", "swaps", 0),
    "a saved module, hotswap_adapter, and the pool is lost": ("gpt2", "pools", 4),
    "several answers for each row, by beams, after an encoder": ("t5", "generate", 0),
    "no row has an adapter, and one is refused to be removed": ("longformer", "rows", 20270),
}


@pytest.fixture(autouse=True)
def _quiet():
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


def run(folder: Path, *cases: tuple[str, str, int]) -> None:
    for number, case in enumerate(cases):
        Case(*case, folder / str(number)).run()


@pytest.mark.parametrize(
    "found", few_of(FOUND, [each for each in FOUND if each.startswith(("a saved", "flattened tokens, e"))])
)
def test_found_once(tmp_path, found):
    run(tmp_path, FOUND[found])


@pytest.mark.long
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_architecture(tmp_path, name):
    run(tmp_path, *[(name, check, 1) for check in CHECKS])


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 100 + 600 * TIMES, 50))
def test_random_cases(tmp_path, seed):
    names, checks = [*ARCHITECTURES], [*CHECKS]
    run(tmp_path, *[(names[each % len(names)], checks[each % len(checks)], each) for each in range(seed, seed + 50)])
