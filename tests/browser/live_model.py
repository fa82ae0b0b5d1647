"""The page's model in Chromium, and the same bytes in PyTorch, for tests of docs/live."""

from __future__ import annotations

import base64
import json
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from front_ends import ROOT

from hotswap_lab import AdapterPool, demo

LIVE = ROOT / "docs" / "live"
#: logits this close are equal: either letter is right
CLOSE = 1e-3
READ = """({base, config, vocabulary, adapters}) => {
    const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt()).buffer
    window.model = new Model(bytes(base), config, vocabulary)
    window.adapters = Object.fromEntries(
        Object.entries(adapters).map(([name, [file, config]]) => [name, readAdapter(bytes(file), config)]))
    const room = {}
    for (const adapter of Object.values(window.adapters))
        for (const [path, {rank}] of Object.entries(adapter)) room[path] = Math.max(room[path] ?? 0, rank)
    window.memory = new Memory(new Layout(window.model.layers, room))
    window.packed = Object.fromEntries(
        Object.entries(window.adapters).map(([name, adapter]) => [name, memory.layout.pack(adapter)]))
}"""


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def read_in(page) -> None:
    """Give an empty page the program and the package's files."""
    page.add_script_tag(content=(LIVE / "model.js").read_text() + "\nObject.assign(window, {Model, Layout, Memory})")
    folders = {name: demo.ADAPTERS_DIR / name for name in demo.adapter_names()}
    adapters = {
        name: (encoded(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text()))
        for name, folder in folders.items()
    }
    files = {each: json.loads((demo.BASE_DIR / f"{each}.json").read_text()) for each in ("config", "tokenizer")}
    base = encoded(demo.BASE_DIR / "model.safetensors")
    vocabulary = files["tokenizer"]["model"]["vocab"]
    page.evaluate(READ, dict(base=base, config=files["config"], vocabulary=vocabulary, adapters=adapters))


class Reference:
    """The demo's model in PyTorch with room for all eight adapters, whose memory tests write to."""

    def __init__(self) -> None:
        self.model, self.tokenizer = demo.load("reverse")
        folders = {name: demo.adapter_path(name) for name in demo.adapter_names()}
        self.pool = AdapterPool(self.model, adapters=folders, progress=False)
        self.room = self.pool._room

    def memory(self) -> tuple[np.ndarray, np.ndarray]:
        """All bytes of the room, band after band, and the scalings."""
        bands = [band.memory.detach().flatten() for band in self.room.bands]
        return torch.cat(bands).numpy(), self.room.scalings[0][:, 0].numpy()

    @torch.no_grad()
    def stop(self, before: str, after: str, step: int) -> None:
        """Write the first so many rows of ``after`` over ``before``, and in the last step the scalings."""
        old, new = (self.pool._members[name].packed for name in (before, after))
        last = max(map(len, (*old.bands, *new.bands))) + 1
        for band, one, two in zip(self.room.bands, old.bands, new.bands, strict=True):
            whole = [band.memory.new_zeros(band.memory.shape) for _ in range(2)]
            whole[0][: len(one)], whole[1][: len(two)] = one, two
            rows = min(step, last - 1)
            band.memory.copy_(torch.cat([whole[1][:rows], whole[0][rows:]]))
        self.room.scalings[0].copy_((new if step >= last else old).scalings)

    def answers(self, words: list[str], model: torch.nn.Module | None = None) -> list[str]:
        """The answers to words of any lengths; each may be as long as if it were asked alone."""
        found: dict[str, str] = {}
        for _, each in groupby(sorted(words, key=len), key=len):
            alike = [*each]
            found.update(zip(alike, demo.ask_all(model or self.model, self.tokenizer, alike), strict=True))
        return [found[word] for word in words]

    @torch.inference_mode()
    def logits(self, text: str, model: torch.nn.Module | None = None) -> np.ndarray:
        """The logits after each letter of a text."""
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
        return (model or self.model)(input_ids=ids).logits[0].numpy()

    def are_as_likely(self, word: str, *answers: str) -> bool:
        """Whether two answers part where their letters are as likely, so that rounding decides."""
        common = next(at for at in range(64) if len({answer[at : at + 1] for answer in answers}) > 1)
        logits = self.logits(word + demo.SEPARATOR + answers[0][:common])[-1]
        vocabulary, end = self.tokenizer.get_vocab(), self.tokenizer.eos_token_id
        both = [logits[vocabulary.get(answer[common : common + 1], end)] for answer in answers]
        return bool(abs(both[0] - both[1]) < CLOSE)
