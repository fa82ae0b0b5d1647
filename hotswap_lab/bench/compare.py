"""The embedded adapters, swapped in three ways: ours, PEFT's hotswap, PEFT's load and delete.

Each way is asked for the same thing on a model of its own, checked against a fresh load, and timed in turn.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from peft import PeftModel

from .. import demo
from ..core.hotswap import hotswap_adapter
from ..verify import verify_hotswap
from .timing import Timing, measure

#: the adapter that is loaded first: it targets every layer, so that any other fits into its place
FIRST = "reverse"


@dataclass(frozen=True)
class Way:
    """How one way of swapping did: whether it equals a fresh load, how long it takes, why it was refused."""

    matches: bool
    timing: Timing | None = None
    refusal: str = ""

    def __str__(self) -> str:
        if self.timing is None:
            return "refused"
        return str(self.timing) if self.matches else f"{self.timing} wrong"


@dataclass(frozen=True)
class Comparison:
    """One adapter: what the model then answers, and how each way did."""

    adapter: str
    answer: str
    ours: Way
    peft_hotswap: Way
    peft_load_delete: Way


def load_and_delete(model: PeftModel, folder: str, names: Iterator[str]) -> None:
    """The way without hotswapping: load under a new name, activate it, delete the old one."""
    old, new = model.active_adapter, next(names)
    model.load_adapter(folder, new)
    model.set_adapter(new)
    model.delete_adapter(old)


def peft_hotswap(model: PeftModel, folder: str) -> None:
    from peft.utils.hotswap import hotswap_adapter as swap

    swap(model, folder, adapter_name="default", torch_device="cpu")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def compare(name: str, word: str, repeats: int) -> Comparison:
    """Swaps the adapter ``name`` in, all three ways, ``repeats`` times each."""
    folder = demo.adapter_path(name)
    with _quiet():
        first = PeftModel.from_pretrained(demo.load_base(), demo.adapter_path(FIRST))
        expected = _outputs(PeftModel.from_pretrained(demo.load_base(), folder))
        live = copy.deepcopy(first)
        hotswap_adapter(live, folder, "default")
        answer = demo.ask(live, demo.load_tokenizer(), word)
        matches = bool(verify_hotswap(live, folder, base=demo.load_base))
        ours = Way(matches, _time(lambda path: hotswap_adapter(live, path, "default"), folder, repeats))
        theirs = _peft_way(copy.deepcopy(first), folder, expected, repeats)
        names = (f"adapter{number}" for number in itertools.count())
        timing = measure(lambda: load_and_delete(first, folder, names), n=repeats)
        loaded = Way(_equals(first, expected), timing)
    return Comparison(name, answer, ours, theirs, loaded)


def _time(swap: Callable[[str], None], folder: str, repeats: int) -> Timing:
    """Times a swap from the first adapter to another one; the way back doesn't count."""
    return measure(lambda: swap(folder), before=lambda: swap(demo.adapter_path(FIRST)), n=repeats)


def _peft_way(model: PeftModel, folder: str, expected: torch.Tensor, repeats: int) -> Way:
    try:
        peft_hotswap(model, folder)
    except Exception as error:
        return Way(False, refusal=str(error).splitlines()[0])
    return Way(_equals(model, expected), _time(lambda path: peft_hotswap(model, path), folder, repeats))


@torch.inference_mode()
def _outputs(model: PeftModel) -> torch.Tensor:
    return model(**model.get_base_model().dummy_inputs).logits


def _equals(model: PeftModel, expected: torch.Tensor) -> bool:
    return torch.allclose(_outputs(model), expected, rtol=0, atol=1e-4)
