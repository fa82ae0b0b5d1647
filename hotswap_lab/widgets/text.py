"""Stream a language model's answers token by token.

Tests: ``tests/widgets/test_swap_panel.py``.
"""

from collections.abc import Callable, Iterator

import torch

from .. import generating
from ..core.errors import refused


def text_stream(
    model: torch.nn.Module, tokenizer: object, *, template: str | None = None, max_new_tokens: int = 64
) -> Callable[[str], Iterator[str]]:
    """Return a function that answers a prompt greedily and yields the answer so far after each token.

    Parameters
    ----------
    model, tokenizer:
        A causal language model of transformers, with or without PEFT around it. Pass the model itself, not the result
        of ``torch.compile``, which would recompile for each length.
    template:
        A text with ``{}`` in place of the prompt. Default: the tokenizer's chat template, if it has one.
    max_new_tokens:
        The largest number of tokens in an answer.

    Raises
    ------
    HotswapError
        If the template has no ``{}``. The function raises it if the prompt is empty or the tokenizer doesn't know it.

    Examples
    --------
    >>> from hotswap_lab import demo
    >>> model, tokenizer = demo.load("shout")
    >>> list(text_stream(model, tokenizer, template="{}>")("oh"))
    ['O', 'OH', 'OH!']
    """

    if template is not None and "{}" not in template:
        raise refused("template_without_prompt", template=template, example="{}" + template)

    def stream(prompt: str) -> Iterator[str]:
        known = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if not known:
            raise refused("empty_prompt")
        if tokenizer.unk_token_id in known:
            raise refused("unknown_prompt", prompt=prompt, read=tokenizer.decode(known))
        if template is None and getattr(tokenizer, "chat_template", None):
            ids = generating.prompt_of(tokenizer, prompt)
        else:
            ids = tokenizer((template or "{}").replace("{}", prompt), return_tensors="pt")["input_ids"][0]
        ids = ids.to(next(model.parameters()).device)
        longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        limit = max_new_tokens if longest is None else min(max_new_tokens, longest - len(ids))
        past = {}

        # for each call, because a generator must not turn its caller's gradients off between two tokens
        @torch.no_grad()
        def logits_after(ids: torch.Tensor) -> torch.Tensor:
            output = model(input_ids=ids[None], **past, use_cache=True)
            # the KV cache has the same name in a model's outputs and inputs, which newer versions call `cache`
            name = "cache" if "cache" in output else "past_key_values"
            past[name] = output[name]
            return output.logits[0, -1]

        yield from generating.stream(logits_after, ids, limit, model, tokenizer)

    return stream
