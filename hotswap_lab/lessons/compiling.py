"""Chapter 03: swapping inside a compiled model, and what makes it compile again."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from .. import demo
from ..swap import hotswap_adapter
from ..watch import RecompileWatch
from .exercise import Exercise

# --- side by side ----------------------------------------------------------------------------------------------------


def judged(swap: Callable[..., object], compiled: torch.nn.Module, names: Iterable[str]) -> str:
    """Swap the demo's adapters ``names`` into a compiled model, and compare its outputs with a fresh load's.

    Returns one line for each verdict, with the adapters that it is about, and one with the number of recompiles.
    An adapter that is refused is listed with the reason that PEFT's error gives.

    >>> model, _ = demo.load("reverse")
    >>> print(judged(hotswap_adapter, torch.compile(model, backend="eager", dynamic=False), ["vowels_up"]))
    right: vowels_up
    0 recompiles
    """
    # a graph of another model, of the same code, must not count
    torch.compiler.reset()
    inputs = demo.load_base().dummy_inputs
    verdicts: dict[str, list[str]] = {}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the last line says whether it recompiled
        compiled(**inputs)
        with RecompileWatch() as watch:
            for name in names:
                verdicts.setdefault(_judged(swap, compiled, name, inputs), []).append(name)
    lines = [f"{verdict}: {', '.join(found)}" for verdict, found in verdicts.items()]
    return "\n".join([*lines, watch.summary.partition(", ")[2]])


def _judged(swap: Callable[..., object], compiled: torch.nn.Module, name: str, inputs: Mapping[str, Any]) -> str:
    try:
        swap(compiled, demo.adapter_path(name), "default")
    except (ValueError, RuntimeError) as error:
        return f"refused ({str(error).partition(',')[0].removeprefix('Configs are incompatible: for ')})"
    # eager: the judge must not add graphs of its own
    fresh = demo.load(name)[0](**inputs).logits
    return "right" if torch.allclose(compiled(**inputs).logits, fresh, atol=1e-3) else "wrong, no error"


# --- exercises -------------------------------------------------------------------------------------------------------

#: the adapters that each of the five programs is given; the first is the one that is loaded
TRIO = (dict(r=4, lora_alpha=8), dict(r=8, lora_alpha=16), dict(r=2, lora_alpha=4))


def _config(options: Mapping[str, object]) -> LoraConfig:
    return LoraConfig(target_modules=["0", "2"], init_lora_weights=False, **options)


def _two_layers() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8)).eval()


def answers(compiled: torch.nn.Module, folders: Iterable[str], x: torch.Tensor) -> Iterator[torch.Tensor]:
    """Swap each folder in, and yield what the model gives for ``x``."""
    for folder in folders:
        hotswap_adapter(compiled, folder, "default")
        yield compiled(x)


@Exercise
def debug(programs):
    """Mend the five programs, so that each compiles once and never again. A line or two in each."""
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as place, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the check itself says what recompiles
        folders, fresh = [os.path.join(place, name) for name in "abc"], []
        for folder, options in zip(folders, TRIO, strict=True):
            get_peft_model(_two_layers(), _config(options)).save_pretrained(folder)
            fresh.append(PeftModel.from_pretrained(_two_layers(), folder)(x))
        yield "programs", len(programs), 5
        for program in programs:
            # a graph of the program before must be neither found nor counted
            torch.compiler.reset()
            model = PeftModel.from_pretrained(_two_layers(), folders[0]).eval()
            with RecompileWatch() as watch:
                # cloned: a compiled model may write the next output to the same memory
                outputs = [output.clone() for output in program(model, folders, x)]
            name = program.__name__
            divisors = (1, 2, 3) if name == "temperatures" else (1, 1, 1)
            expected = [output / divisor for output, divisor in zip(fresh, divisors, strict=True)]
            pairs = zip(outputs, expected, strict=False)
            right = len(outputs) == 3 and all(torch.allclose(*pair, atol=1e-5) for pair in pairs)
            yield name, str(watch).strip(), "1 compiled, 0 recompiles"
            yield f"{name}: outputs equal a fresh load's", right, True
