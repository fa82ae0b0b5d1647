"""The notebook beside PEFT: tiny models, random adapters, and a table whose rows are tried, not remembered."""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from ..figures.palette import BASE, INK, WHITE, WRONG, mix
from ..verify import verify_hotswap
from .beyond import ATTENTION, disturb

# --- models ----------------------------------------------------------------------------------------------------------


class Base(NamedTuple):
    """A model to try swaps on: what makes it, from which arguments, and the shape of its inputs (None: token ids)."""

    make: Callable[..., nn.Module]
    arguments: tuple[Any, ...] = ()
    shape: tuple[int, ...] | None = None

    def __call__(self) -> nn.Module:
        """A fresh base model, with the same random weights every time."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.make(*copy.deepcopy(self.arguments)).eval()
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    nn.init.normal_(parameter, std=0.1)  # they start at zero, and a swap that loses them wouldn't show
        return model

    def inputs(self) -> torch.Tensor:
        if self.shape is None:
            return torch.arange(1, 10) + torch.tensor([[0], [3]])
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    """PyTorch's own multi-head attention, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention: nn.MultiheadAttention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head: nn.Linear = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.attention(x, x, x)[0])


def convolutions() -> nn.Module:
    """Convolutions in one, two and three dimensions; of the two in the middle the second one is grouped."""
    conv1d, conv2d, conv3d = nn.Conv1d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv3d(8, 4, 1)
    grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
    return nn.Sequential(conv1d, nn.Unflatten(-1, (4, 4)), conv2d, nn.Tanh(), grouped, nn.Unflatten(-1, (4, 1)), conv3d)


def embedded() -> nn.Module:
    """An embedding and a linear layer."""
    return nn.Sequential(nn.Embedding(40, 10), nn.Tanh(), nn.Linear(10, 20))


def _tiny(name: str, head: str, **options: object) -> Base:
    sizes = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    config = getattr(transformers, f"{name}Config")(**sizes, **options)
    return Base(getattr(transformers, f"{name}For{head}"), (config,))


LLAMA = _tiny("Llama", "CausalLM", num_key_value_heads=1)
TIED_LLAMA = _tiny("Llama", "CausalLM", num_key_value_heads=1, tie_word_embeddings=True)
CLASSIFIER = _tiny("Llama", "SequenceClassification", num_key_value_heads=1, num_labels=3, pad_token_id=0)
MIXTRAL = _tiny("Mixtral", "CausalLM", num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2)
# with a smaller range, its attention hardly looks anywhere and adapters do nothing
BERT = _tiny("Bert", "SequenceClassification", num_labels=3, initializer_range=0.2)
GPT2 = Base(
    transformers.GPT2LMHeadModel,
    (transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0),),
)
CONVOLUTIONS = Base(convolutions, (), (2, 4, 16))
EMBEDDED = Base(embedded)
MULTIHEAD = Base(Attention, (), (2, 5, 8))

# --- adapters --------------------------------------------------------------------------------------------------------


def lora(**options: object) -> LoraConfig:
    """Rank 4, on a Llama's attention, unless ``options`` say something else."""
    return LoraConfig(**{"r": 4, "target_modules": ATTENTION, **options})


def load(folder: str, base: Base = LLAMA) -> PeftModel:
    """What a user does: a fresh base model, and PEFT's own loading."""
    return PeftModel.from_pretrained(base(), folder).eval()


def values(model: nn.Module, part: str = "") -> dict[str, torch.Tensor]:
    """Copies of all weights whose names have ``part`` in them."""
    return {key: value.clone() for key, value in model.state_dict().items() if part in key}


def changed(model: nn.Module, before: dict[str, torch.Tensor], part: str = "") -> bool:
    """Whether any of those weights is another one than ``before``, or has another shape."""
    after = values(model, part)
    return after.keys() != before.keys() or any(not torch.equal(after[key], before[key]) for key in before)


# --- the table -------------------------------------------------------------------------------------------------------

Swap = Callable[[PeftModel, str], object]

#: how verdicts begin that say what a user wants; all others are wrong, unless nothing was done
RIGHT = ("equals a fresh load", "untouched", "only read", "0 recompiles", "16 tensors saved")
RIGHT += ("weights of rank 4, config of rank 4", "the adapter of rank 4 says that it has rank 4")
TINTS = {"✓": "", "✗": BASE, "≠": mix(WRONG, 0.25, WHITE)}


def signed(verdicts: str, *, tinted: bool = False) -> str:
    """Put a sign before each verdict: ✓ right, ✗ refused and untouched, ≠ wrong.

    ``tinted``: with a background for all that is not right, in HTML.

    >>> signed("KeyError, untouched; refused, half swapped; equals a fresh load")
    '✗ KeyError, untouched; ≠ refused, half swapped; ✓ equals a fresh load'
    """
    found = []
    for verdict in verdicts.split("; "):
        sign = "✓" if verdict.startswith(RIGHT) else "✗" if verdict.endswith(", untouched") else "≠"
        head = f'<span style="background-color:{TINTS[sign]};color:{INK}">' if tinted and TINTS[sign] else ""
        found.append(f"{head}{sign} {verdict}{'</span>' if head else ''}")
    return ("<br>" if tinted else "; ").join(found)


def refusal(swap: Swap, model: PeftModel, new: str) -> str:
    """What a swap raised and what that left of the model, in words; nothing where nothing was raised."""
    before = values(model)
    try:
        swap(model, new)
    except Exception as error:
        kind = "refused" if isinstance(error, (ValueError, RuntimeError)) else type(error).__name__
        return f"{kind}, {'half swapped' if changed(model, before) else 'untouched'}"
    return ""


def verdict(model: PeftModel, new: str, base: Base = LLAMA) -> str:
    """How a model compares with a fresh load of ``new``, in words."""
    try:
        model(base.inputs())
    except RuntimeError:
        return "broken model"
    found = verify_hotswap(model, new, inputs=base.inputs(), base=base)
    assert found.conclusive, "the adapter hardly changes anything, so a comparison would show nothing"
    if found.difference > found.tolerance:
        return "other outputs, no error"
    old_config = any(line.startswith("config.") for line in found.mismatches)
    return "equals a fresh load" if found else f"equal outputs, {'old config' if old_config else 'other values saved'}"


def outcome(swap: Swap, old: str, new: str, base: Base = LLAMA) -> str:
    """What became of a swap, in words: the same judge for both libraries.

    Parameters
    ----------
    swap:
        Puts its second argument, a folder, into its first, a model.
    old, new:
        The folders of the adapter that is loaded and of the one that takes its place.
    base:
        The model that both are for.

    Examples
    --------
    >>> from hotswap_lab import hotswap_adapter
    >>> beside = Beside(None, lambda model, new: hotswap_adapter(model, new, "default"))
    >>> old, new = beside.save(lora()), beside.save(lora(r=8))
    >>> outcome(beside.ours, old, new)
    'equals a fresh load'
    >>> outcome(lambda model, new: None, old, new)
    'other outputs, no error'
    """
    model = load(old, base)
    return refusal(swap, model, new) or verdict(model, new, base)


class Beside:
    """A table of cases: each is tried in both ways, printed, and kept as a row.

    Parameters
    ----------
    theirs, ours:
        Two ways to swap: ``theirs(model, folder)``.
    """

    def __init__(self, theirs: Swap | None, ours: Swap | None) -> None:
        self.theirs: Swap | None = theirs
        self.ours: Swap | None = ours
        self.rows: list[tuple[str, str, str]] = []
        self._root = tempfile.TemporaryDirectory()
        self._folders = 0

    def folder(self) -> str:
        """A new folder, gone with the table."""
        self._folders += 1
        return f"{self._root.name}/{self._folders}"

    def save(self, config: PeftConfig, base: Base = LLAMA) -> str:
        """Makes an adapter with random weights and saves it, both with PEFT alone; returns the folder."""
        folder = self.folder()
        with torch.random.fork_rng():
            torch.manual_seed(self._folders)
            model = get_peft_model(base(), copy.deepcopy(config))
            disturb(model)
        model.save_pretrained(folder)
        return folder

    def swaps(self, case: str, *configs: PeftConfig, base: Base = LLAMA, ours: Swap | None = None) -> None:
        """Swaps an adapter of each config for one of each other config, in both ways, and adds a row."""
        folders = [self.save(config, base) for config in configs]
        pairs = list(itertools.permutations(folders, 2))
        self.both(case, lambda swap: "; ".join(sorted({outcome(swap, *pair, base) for pair in pairs})), ours=ours)

    def both(
        self, case: str, attempt: Callable[..., str], theirs: Callable | None = None, ours: Callable | None = None
    ) -> None:
        """Adds a row: what ``attempt`` returns for each of the two ways, or of two other functions."""
        row = case, attempt(theirs or self.theirs), attempt(ours or self.ours)
        self.rows.append(row)
        print(f"PEFT         {signed(row[1])}\nhotswap_lab  {signed(row[2])}")

    def __repr__(self) -> str:
        return f"{len(self.rows)} cases beside PEFT's hotswap"

    def _repr_markdown_(self) -> str:
        lines = ["| case | `peft.utils.hotswap` | hotswap_lab |", "| --- | --- | --- |"]
        for case, *verdicts in self.rows:
            lines.append(" | ".join(["| " + case, *(signed(each, tinted=True) for each in verdicts)]) + " |")
        return "\n".join(lines)
