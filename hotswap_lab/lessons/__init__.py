"""The notebooks' exercises, one module per chapter, and their pictures.

No swap logic is in here. ``figures`` draws, and shows the drawings in the folder ``pictures``. ``exercise`` has the
base class of exercises. ``building`` has the checks of the file that the reader builds in 01, 02, 03, 04 and 08.
``start`` belongs to chapter 00, ``compiling`` to 03, ``pools`` to 04, ``real_llm`` to 05, ``diffusion`` to 06,
``beyond`` to 07, ``rows`` to 08, ``serving`` to 09, ``ahead`` to 10, ``policy`` to 11, ``engine`` to the engine, read,
and ``project`` to the last project.
"""

import ast
import inspect
import logging
import textwrap
import warnings
from collections.abc import Callable

import torch

from .. import figures

__all__ = ["begin", "figures", "source"]


def begin() -> None:
    """Set a notebook up: use one thread, so that times can be compared, and hide warnings that don't help a reader.

    The demo models are so small that threads would mostly wait for one another, and on a busy machine for other
    processes.

    PyTorch logs an error where a CUDA compiler is installed without a GPU. PEFT 0.21 with transformers 5.24 warns about
    a deprecated name at every load, and torch.export about one of its own.

    >>> begin()
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    torch.set_num_threads(1)


class Source(str):
    """The code of a function. A notebook shows it as Markdown, whose code every front end highlights in its theme."""

    def __repr__(self) -> str:
        return str(self)

    def _repr_markdown_(self) -> str:
        return f"```python\n{self}\n```"


def source(function: Callable) -> Source:
    """Return the code of a function or class without its docstring.

    >>> source(begin)  # doctest: +ELLIPSIS
    def begin() -> None:
        warnings.filterwarnings(...
    """
    text = textwrap.dedent(inspect.getsource(function))
    lines, node = text.splitlines(), ast.parse(text).body[0]
    if ast.get_docstring(node) is not None:
        del lines[node.body[0].lineno - 1 : node.body[0].end_lineno]
    return Source("\n".join(lines))
