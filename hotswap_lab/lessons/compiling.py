"""Chapter 03: swapping inside a compiled model, and the causes of recompiles.

Tests: ``tests/lessons/test_exercises.py``.
"""

import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from ..swap import hotswap_adapter
from ..watch import RecompileWatch
from .exercise import Exercise, first_difference, uncompiled_calls

#: the configs of the adapters for the five programs, which load the first one
TRIO = (dict(r=4, lora_alpha=8), dict(r=8, lora_alpha=16), dict(r=2, lora_alpha=4))


def _two_layers() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8)).eval()


def answers(compiled: torch.nn.Module, folders: Iterable[str], x: torch.Tensor) -> Iterator[torch.Tensor]:
    """Swap each folder in, and yield the model's output for ``x``."""
    for folder in folders:
        hotswap_adapter(compiled, folder, "default")
        yield compiled(x)


@Exercise
def debug(programs):
    """Mend the five programs, so that each compiles once and never again. A line or two in each."""
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as place, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the check itself prints the causes of recompiles
        folders, fresh = [os.path.join(place, name) for name in "abc"], []
        for folder, options in zip(folders, TRIO, strict=True):
            config = LoraConfig(target_modules=["0", "2"], init_lora_weights=False, **options)
            get_peft_model(_two_layers(), config).save_pretrained(folder)
            fresh.append(PeftModel.from_pretrained(_two_layers(), folder)(x))
        yield "programs", len(programs), 5
        for number, program in enumerate(programs):
            # graphs of the previous program must be neither used nor counted
            torch.compiler.reset()
            model = PeftModel.from_pretrained(_two_layers(), folders[0]).eval()
            uncompiled = uncompiled_calls(model)
            with RecompileWatch() as watch:
                # cloned: a compiled model may write the next output to the same memory
                outputs = [output.clone() for output in program(model, folders, x)]
            name = program.__name__
            expected = list(fresh)
            if number == 2:
                expected = [output / temperature for temperature, output in enumerate(fresh, 1)]
            elif number in (1, 4):  # these begin with the first two vectors
                expected.insert(0, fresh[0][:, :2])
            pair = [{f"output {n}": output for n, output in enumerate(some, 1)} for some in (outputs, expected)]
            yield name, str(watch).strip(), "1 compiled, 0 recompiles"
            yield f"{name}: calls that are not compiled", len(uncompiled), 0
            yield f"{name}: gradients are left on", torch.is_grad_enabled(), False
            yield f"{name}: outputs equal a fresh load's", *first_difference(*pair)
