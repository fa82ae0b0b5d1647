"""The last project: the reader's own adapter, from training to a package, and a rubric that checks each step.

Tests: ``tests/lessons/test_lessons.py``.
"""

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
    answers = {word: trick(word) for word in [*WORDS, "hotswap"]}
    texts = [text for text in answers.values() if isinstance(text, str) and text.isascii() and text.isprintable()]
    faults = {
        f"as {name} does": all(answer == task(word) for word, answer in answers.items())
        for name, task in demo.TASKS.items()
    }
    faults |= {
        "not printable ASCII, 40 characters at most": len(texts) < len(answers) or max(map(len, texts)) > 40,
        "whatever the word is": len({*texts}) == 1,
        "another answer each time": any(trick(word) != answer for word, answer in answers.items()),
        "the same word": answers["hotswap"] == "hotswap",
    }
    first_fault = [fault for fault, is_so in faults.items() if is_so][:1]
    return not first_fault, ", ".join([f"hotswap -> {answers['hotswap']}", *first_fault])


def trained(trick: Callable[[str], str], adapter: str) -> tuple[bool, str]:
    right = sum(answer == trick(word) for answer, word in zip(_answers(_fresh(adapter)), WORDS, strict=True))
    return right >= 0.9 * len(WORDS), f"{right} of {len(WORDS)} new words right, at least 36 are needed"


def swapped_in_while_it_trained(
    trick: Callable[[str], str], adapter: str, trainee: Any, live: Any, seen: Sequence[tuple[dict[str, Any], str]]
) -> tuple[bool, str]:
    answers, fresh, expected = [answer for _, answer in seen], _fresh(adapter), []
    for tensors, _ in seen:
        set_peft_model_state_dict(fresh, tensors)
        expected += _answers(fresh, ["hotswap"])
    weights = {float(sum(tensor.double().sum() for tensor in tensors.values())) for tensors, _ in seen}
    facts = {
        "the live model matches a fresh load": verify_hotswap(live, adapter, base=demo.load_base),
        "the last weights are the folder's": verify_hotswap(fresh, adapter, base=demo.load_base),
        "3 or more different weights were seen": len(weights) > 2,
        "the first answer is wrong, and the last is right": answers[:1] != [trick("hotswap")] == answers[-1:],
        "live was swapped into": any(adapter.when for adapter in loaded(live)),
        "live is in eval mode": not live.training,
        "live and trainee share nothing": _addresses(live).isdisjoint(_addresses(trainee)),
    }
    wrong = "".join(f"; not so: {fact}" for fact, is_so in facts.items() if not is_so)
    text = f"{' -> '.join(answers)}; a fresh load of these weights says {' -> '.join(expected)}"
    return answers == expected and not wrong, text + wrong


def in_a_pool_with_rows(adapter: str, live: Any, pool: AdapterPool) -> tuple[bool, str]:
    names, words = [MINE, "reverse", None, MINE], WORDS[:4]
    with pool.assigned(names):
        answers = demo.ask_all(pool.model, demo.load_tokenizer(), words)
    models = {MINE: _fresh(adapter), "reverse": demo.load("reverse")[0], None: demo.load_base()}
    expected = [_answers(models[name], [word])[0] for name, word in zip(names, words, strict=True)]
    missing = {MINE, *demo.adapter_names()} - {*pool}
    faults = f"; not in the pool: {', '.join(sorted(missing))}" if missing else ""
    faults += "" if pool.model is live else "; it is not the pool of live"
    return answers == expected and not faults, f"{', '.join(answers)}; expected {', '.join(expected)}{faults}"


def compiled_once(adapter: str, pool: AdapterPool, compiled: Any) -> tuple[bool, str]:
    torch.compiler.reset()  # graphs of a previous try, or of another model of the same code, don't count
    with RecompileWatch() as watch:
        right = [
            _is_right(compiled, _fresh(adapter) if name == MINE else demo.load(name)[0], pool, name) for name in pool
        ]
    is_once = watch.compiles == 1 and not watch.recompiles
    return is_once and all(right), f"{sum(right)} of {len(right)} adapters right, {watch.summary}"


def packaged(adapter: str, pool: AdapterPool, package: str) -> tuple[bool, str]:
    is_right = _is_right(aoti_load(package, pool), _fresh(adapter), pool, MINE)
    return is_right, f"the package computes as a fresh load does: {is_right}"


STEPS = (a_new_trick, trained, swapped_in_while_it_trained, in_a_pool_with_rows, compiled_once, packaged)


@torch.no_grad()
def rubric(**made: Any) -> bool:
    """Print for each step of the project whether it is done, and the evidence. Return whether all steps are done.

    Parameters
    ----------
    **made:
        The results so far: ``trick``, ``adapter`` (its folder), ``trainee`` (the model that was trained), ``live``
        (the model that the adapter was swapped into), ``seen`` (from the training, pairs of the tensors that were
        swapped in and the live model's answer to "hotswap"), ``pool``, ``compiled``, and ``package`` (the file).

    >>> rubric(trick=lambda word: word.upper() + "!")  # doctest: +ELLIPSIS
    ✗ a new trick: hotswap -> HOTSWAP!, as shout does
    - trained: needs adapter
    ...
    False
    """
    pool = made.get("pool") or {}
    if MINE in pool:  # the reader or a previous rubric may have swapped another adapter in
        pool.swap(MINE)
    results = []
    for step in STEPS:
        arguments = {name: made.get(name) for name in inspect.signature(step).parameters}
        missing = [name for name, value in arguments.items() if value is None]
        try:
            done, text = (None, f"needs {', '.join(missing)}") if missing else step(**arguments)
        except Exception as error:  # the reader's objects may raise any error
            # the lines of a refusal after the first have the next step
            message = str(error) if isinstance(error, HotswapError) else str(error).partition("\n")[0]
            done, text = False, f"{type(error).__name__}: {message}"
        results.append(done)
        mark = {None: "-", True: "✓", False: "✗"}[done]
        print(f"{mark} {step.__name__.replace('_', ' ')}: {text}")
    return all(results)


def _fresh(adapter: str) -> torch.nn.Module:
    return PeftModel.from_pretrained(demo.load_base(), adapter).eval()


def _addresses(model: torch.nn.Module) -> set[int]:
    return {parameter.data_ptr() for parameter in model.parameters()}


def _answers(model: torch.nn.Module, words: Sequence[str] = WORDS) -> list[str]:
    return demo.ask_all(model, demo.load_tokenizer(), list(words))


def _is_right(model: Callable[..., Any], fresh: torch.nn.Module, pool: AdapterPool, name: str) -> bool:
    """Whether ``model`` with one of the pool's adapters gives the logits of a fresh load."""
    pool.swap(name)
    inputs = dict(demo.load_tokenizer()("hotswap>", return_tensors="pt"), use_cache=False)
    return torch.allclose(model(**inputs).logits, fresh(**inputs).logits, atol=1e-3)
