"""Choosing the tokens of an answer: transformers' logits processors, with the values of each request."""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import transformers
from torch import Tensor

from .. import compat
from ..core.errors import refused

try:
    from pydantic import BeforeValidator, Field
except ModuleNotFoundError as _error:
    raise ImportError(f'{_error}: pip install "hotswap_lab[serve]"', name="pydantic") from _error

#: below this temperature, the most probable token is taken each time
COLDEST = 1e-3
#: the fields that may come from the model
OF_MODEL: dict[str, type] = dict(temperature=float, top_k=int, top_p=float, min_p=float, repetition_penalty=float)
#: fields of a ``generation_config`` that ask for more than choosing one token after the other
BEYOND = ("num_beams", "guidance_scale", "forced_eos_token_id", "stop_strings", "max_time", "penalty_alpha")


def _token_id(text: object) -> object:
    """Convert a token's number that is a key in JSON. Other text stays, and is refused: Python reads ``1_0`` as 10."""
    return int(text) if isinstance(text, str) and re.fullmatch("0|[1-9][0-9]{0,17}", text) else text


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose the tokens of an answer. If a field is None, the model's ``generation_config`` decides.

    ``temperature`` 0 takes the most probable token each time, as does a model whose ``generation_config`` has no
    ``do_sample``. Otherwise a token is drawn with the random numbers of ``seed``: from the ``top_k`` most probable ones
    (all of them if it is 0 or less), of these from the most probable ones that together have the probability ``top_p``,
    and of these from those that are at least ``min_p`` times as probable as the first. ``repetition_penalty`` divides
    the logits of all tokens of the prompt and the answer, or multiplies negative ones. ``frequency_penalty`` is
    subtracted from a token's logit as often as the answer has it, and ``presence_penalty`` once. ``logit_bias`` is
    added to the logits of these tokens. The limits are checked where a request comes in over HTTP.
    """

    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_k: Annotated[int | None, Field(ge=-1)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    repetition_penalty: Annotated[float | None, Field(ge=0.01, le=100)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    logit_bias: dict[Annotated[int, BeforeValidator(_token_id)], Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None


class Sampler:
    """Chooses the tokens of one answer to ``prompt``, from logits of the length ``vocabulary``.

    As in vLLM, a field that the request leaves out is taken from ``defaults``, the model's ``generation_config``, and
    the two penalties of OpenAI's count the tokens of the answer, not those of the prompt. The steps and their order are
    those of the model's ``generate``, also for fields that no request has, such as ``no_repeat_ngram_size``.
    """

    def __init__(self, how: Sampling, prompt: Sequence[int], model: Any, defaults: Any, ends: Sequence[int]):
        vocabulary, biases = model.config.get_text_config().vocab_size, how.logit_bias or {}
        if unknown := [token for token in biases if not 0 <= token < vocabulary]:
            raise refused("no_such_token", tokens=unknown[:8], last=vocabulary - 1)
        self.how: Sampling = how
        self.prompt: Sequence[int] = prompt
        self.random: torch.Generator = torch.Generator()
        self.random.seed() if how.seed is None else self.random.manual_seed(how.seed)

        config = copy.deepcopy(defaults)
        vars(config).update(dict.fromkeys(BEYOND))
        for name, kind in OF_MODEL.items():
            values = getattr(how, name), getattr(config, name, None)
            setattr(config, name, next((kind(value) for value in values if value is not None), None))
        heat = 1.0 if config.temperature is None else config.temperature
        self.is_drawn: bool = heat >= COLDEST and bool(how.temperature is not None or config.do_sample)
        config.do_sample, config.top_k = self.is_drawn, max(config.top_k or 0, 0)
        setattr(config, compat.ENDS, torch.tensor(ends, device="cpu"))
        bias = [[[token], float(added)] for token, added in biases.items()]
        self.steps: list[Any] = [transformers.SequenceBiasLogitsProcessor(bias)] if bias else []
        penalties = [self._penalize] if how.frequency_penalty or how.presence_penalty else []
        ids = torch.tensor([prompt], device="cpu")
        more: dict[str, Any] = dict(encoder_input_ids=ids, logits_processor=penalties, device="cpu")
        self.steps += getattr(model, compat.LOGITS_PROCESSOR)(config, len(prompt), **more)

    def _penalize(self, ids: Tensor, scores: Tensor) -> Tensor:
        counts = torch.bincount(ids[0, len(self.prompt) :], minlength=scores.shape[-1])
        frequency, presence = self.how.frequency_penalty or 0, self.how.presence_penalty or 0
        return scores - frequency * counts - presence * (counts > 0)

    def choose(self, logits: Tensor, best: int, answer: Sequence[int]) -> int:
        """Return the next token after those of the answer; ``best`` is the most probable one, before any other step."""
        if not (self.steps or self.is_drawn):  # transformers has no step for temperature 1
            return best
        ids, scores = torch.tensor([[*self.prompt, *answer]], device="cpu"), logits.cpu()[None]
        for step in self.steps:
            scores = step(ids, scores)
        drawn = torch.multinomial(scores.softmax(-1), 1, generator=self.random) if self.is_drawn else scores.argmax()
        return int(drawn)
