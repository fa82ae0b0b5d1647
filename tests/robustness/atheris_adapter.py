"""Coverage-guided fuzzing of the adapter reader with atheris, which is no dependency of the tests.

``pip install atheris``, then ``python tests/robustness/atheris_adapter.py -max_total_time=120``. Inputs are the bytes
of a safetensors file, a ``.bin`` or a config; whatever comes must be an adapter or a HotswapError. The other file of
the folder is a good one. Arguments are libFuzzer's.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from pathlib import Path


def main() -> None:
    import atheris
    import torch

    with atheris.instrument_imports(
        include=["hotswap_lab.core.adapter", "hotswap_lab.files.weights_file", "json", "zipfile"]
    ):
        from hotswap_lab import Adapter, HotswapError, demo
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    source = Path(demo.adapter_path("double"))
    folder = Path(tempfile.mkdtemp())
    names = ("adapter_model.safetensors", "adapter_config.json", "adapter_model.bin")
    good = {name: (source / name).read_bytes() for name in names[:2]}

    def try_one(data: bytes) -> None:
        if not data:
            return
        name, content = names[data[0] % 3], data[1:]
        for each in names:
            (folder / each).unlink(missing_ok=True)
        for each in (names[1], *(() if name == names[2] else (names[0],))):
            (folder / each).write_bytes(good[each])
        (folder / name).write_bytes(content)
        try:
            Adapter.load(folder)
        except HotswapError as error:
            if "found:" not in str(error):
                raise

    corpus = Path(tempfile.mkdtemp())
    for number, (name, content) in enumerate(good.items()):
        (corpus / name).write_bytes(bytes([number]) + content[:20_000])
    tensors = {"base_model.model.x.lora_A.weight": torch.ones(2, 3)}
    torch.save(tensors, folder / names[2])
    (corpus / names[2]).write_bytes(b"\x02" + (folder / names[2]).read_bytes())
    from safetensors.torch import save

    (corpus / "small").write_bytes(b"\x00" + save(tensors))
    os.environ["HF_HUB_OFFLINE"] = "1"
    atheris.Setup([*sys.argv, str(corpus)], try_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
