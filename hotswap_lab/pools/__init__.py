"""Pools beyond the engine's own: undo, a limit of memory, and batches in which each row has its own adapter."""

from pathlib import Path

from ..core.errors import TEXTS
from .adapter_pool import AdapterPool

TEXTS.append(Path(__file__).with_name("refusals.ini"))

__all__ = ["AdapterPool"]
