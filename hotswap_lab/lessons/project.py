"""The last project: an adapter of the reader's own, from training to a package, and a rubric that checks itself."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.utils import set_peft_model_state_dict

from .. import demo
from ..ahead import aoti_load
from ..core.errors import HotswapError
from ..demo import sample_words
from ..pools.adapter_pool import AdapterPool
from ..swap import loaded
from ..verify import verify_hotswap
from ..watch import RecompileWatch

#: words that training never uses
WORDS = sample_words(40, seed=7, held_out=True)
#: the adapter's name in the pool
MINE = "mine"


def a_new_trick(trick: Callable[[str], str]) -> tuple[bool, str]:
    said = {word: trick(word) for word in [*WORDS, "hotswap"]}
    text = [each for each in said.values() if isinstance(each, str) and each.isascii() and each.isprintable()]
    faults = {f"as {name} does": all(said[word] == task(word) for word in said) for name, task in demo.TASKS.items()}
    faults |= {
        "not printable ASCII, 40 characters at most": len(text) < len(said) or max(map(len, text)) > 40,
        "whatever the word is": len({*text}) == 1,
        "another answer each time": any(trick(word) != answer for word, answer in said.items()),
        "the same word": said["hotswap"] == "hotswap",
    }
    found = [fault for fault, is_so in faults.items() if is_so][:1]
    return not found, ", ".join([f"hotswap -> {said['hotswap']}", *found])


def trained(trick: Callable[[str], str], adapter: str) -> tuple[bool, str]:
    right = sum(said == trick(word) for said, word in zip(_asked(_fresh(adapter)), WORDS, strict=True))
    return right >= 0.9 * len(WORDS), f"{right} of {len(WORDS)} new words right, at least 36 are needed"


def swapped_in_while_it_trained(
    trick: Callable[[str], str], adapter: str, trainee: Any, live: Any, seen: Sequence[tuple[dict[str, Any], str]]
) -> tuple[bool, str]:
    said, fresh, expected = [answer for _, answer in seen], _fresh(adapter), []
    for tensors, _ in seen:
        set_peft_model_state_dict(fresh, tensors)
        expected += _asked(fresh, ["hotswap"])
    weights = {float(sum(each.double().sum() for each in tensors.values())) for tensors, _ in seen}
    facts = {
        "the live model matches a fresh load": verify_hotswap(live, adapter, base=demo.load_base),
        "the last weights are the folder's": verify_hotswap(fresh, adapter, base=demo.load_base),
        "3 or more different weights were seen": len(weights) > 2,
        "the first answer is wrong, and the last is right": said[:1] != [trick("hotswap")] == said[-1:],
        "live was swapped into": any(each.when for each in loaded(live)),
        "live is in eval mode": not live.training,
        "live and trainee share nothing": _addresses(live).isdisjoint(_addresses(trainee)),
    }
    wrong = "".join(f"; not so: {fact}" for fact, is_so in facts.items() if not is_so)
    answers = f"{' -> '.join(said)}; a fresh load of these weights says {' -> '.join(expected)}"
    return said == expected and not wrong, answers + wrong


def in_a_pool_with_rows(adapter: str, live: Any, pool: AdapterPool) -> tuple[bool, str]:
    names, words = [MINE, "reverse", None, MINE], WORDS[:4]
    with pool.assigned(names):
        said = demo.ask_all(pool.model, demo.load_tokenizer(), words)
    models = {MINE: _fresh(adapter), "reverse": demo.load("reverse")[0], None: demo.load_base()}
    expected = [_asked(models[name], [word])[0] for name, word in zip(names, words, strict=True)]
    missing = {MINE, *demo.adapter_names()} - {*pool}
    lacks = f"; not in the pool: {', '.join(sorted(missing))}" if missing else ""
    lacks += "" if (same := pool.model is live) else "; it is not the pool of live"
    return said == expected and same and not missing, f"{', '.join(said)}; expected {', '.join(expected)}{lacks}"


def compiled_once(adapter: str, pool: AdapterPool, compiled: Any) -> tuple[bool, str]:
    torch.compiler.reset()  # graphs of a try before, or of another model of the same code, don't count
    with RecompileWatch() as watch:
        same = [_agrees(compiled, _fresh(adapter) if name == MINE else demo.load(name)[0], pool, name) for name in pool]
    is_once = watch.compiles == 1 and not watch.recompiles
    return is_once and all(same), f"{sum(same)} of {len(same)} adapters right, {watch.summary}"


def packaged(adapter: str, pool: AdapterPool, package: str) -> tuple[bool, str]:
    same = _agrees(aoti_load(package, pool), _fresh(adapter), pool, MINE)
    return same, f"the package computes as a fresh load does: {same}"


STEPS = (a_new_trick, trained, swapped_in_while_it_trained, in_a_pool_with_rows, compiled_once, packaged)


@torch.no_grad()
def rubric(**made: Any) -> bool:
    """Print for each step of the project whether it is done, and how one knows. Returns whether all are.

    Parameters
    ----------
    **made:
        What there is so far: ``trick``, ``adapter`` (its folder), ``trainee`` (the model that was trained), ``live``
        (the model that the adapter was swapped into), ``seen`` (from the training, pairs of the tensors that were
        swapped in and the live model's answer to "hotswap"), ``pool``, ``compiled``, and ``package`` (the file).

    >>> rubric(trick=lambda word: word.upper() + "!")  # doctest: +ELLIPSIS
    ✗ a new trick: hotswap -> HOTSWAP!, as shout does
    - trained: needs adapter
    ...
    False
    """
    if MINE in (pool := made.get("pool") or {}):  # the reader has looked at another one, or the steps below have
        pool.swap(MINE)
    results = []
    for step in STEPS:
        given = {name: made.get(name) for name in inspect.signature(step).parameters}
        needs = [name for name, value in given.items() if value is None]
        try:
            done, says = (None, f"needs {', '.join(needs)}") if needs else step(**given)
        except Exception as error:  # what the reader made may be anything
            # a refusal says what to do next
            said = str(error) if isinstance(error, HotswapError) else str(error).partition("\n")[0]
            done, says = False, f"{type(error).__name__}: {said}"
        results.append(done)
        print(f"{'-' if done is None else '✓' if done else '✗'} {step.__name__.replace('_', ' ')}: {says}")
    return all(results)


def _fresh(adapter: str) -> torch.nn.Module:
    return PeftModel.from_pretrained(demo.load_base(), adapter).eval()


def _addresses(model: torch.nn.Module) -> set[int]:
    return {each.data_ptr() for each in model.parameters()}


def _asked(model: torch.nn.Module, words: Sequence[str] = WORDS) -> list[str]:
    return demo.ask_all(model, demo.load_tokenizer(), list(words))


def _agrees(model: Callable[..., Any], fresh: torch.nn.Module, pool: AdapterPool, name: str) -> bool:
    """Whether ``model`` computes with one of the pool's adapters as a fresh load does."""
    pool.swap(name)
    inputs = dict(demo.load_tokenizer()("hotswap>", return_tensors="pt"), use_cache=False)
    return torch.allclose(model(**inputs).logits, fresh(**inputs).logits, atol=1e-3)
