"""Diffusers' pipelines, all parts swapped as one (``pipeline``), and their files of one piece (``lora_files``)."""

from pathlib import Path

from ..core.errors import TEXTS

TEXTS.append(Path(__file__).with_name("refusals.ini"))
