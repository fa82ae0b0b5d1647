"""Swaps of a LoRA in all components of a diffusers pipeline (``pipeline``), and reading its files (``lora_files``)."""
