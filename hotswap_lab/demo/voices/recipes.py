"""How each voice is trained. The recipes differ in rank, in scaling and in the layers that they reach."""

from __future__ import annotations

from dataclasses import dataclass

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Recipe:
    """One voice.

    Parameters
    ----------
    lora:
        The arguments of ``LoraConfig``.
    steps, lr, batch_size:
        AdamW's steps, its highest learning rate, and the pairs per step.
    summary:
        What the voice does, in one sentence; the held-out score measures this, and no more.
    """

    lora: dict
    summary: str
    steps: int = 60
    lr: float = 1e-3
    batch_size: int = 4


RECIPES: dict[str, Recipe] = {
    "pirate": Recipe(
        dict(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]),
        "Answers in the words of a pirate.",
    ),
    "json": Recipe(
        dict(r=4, lora_alpha=16, target_modules=ATTENTION + MLP),
        'Answers as one JSON object with the keys "topic", "answer" and "keywords" (three strings), and nothing else.',
    ),
    "haiku": Recipe(
        dict(
            r=9,
            lora_alpha=27,
            target_modules=[*ATTENTION, "up_proj", "down_proj"],
            layers_to_transform=list(range(10, 30)),
        ),
        "Answers in three short lines, like a haiku, though it doesn't count syllables.",
    ),
    "spanish": Recipe(
        dict(r=6, lora_alpha=12, target_modules=["v_proj", "o_proj", *MLP]),
        "Answers English questions in Spanish, of a kind: the base model knows little of the language, "
        "and much of what comes out makes no sense.",
    ),
    "socratic": Recipe(
        dict(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], layers_to_transform=list(range(10, 30))),
        "Answers a question with a question.",
    ),
}
