"""Diffusers' pipelines, all components swapped as one (``pipeline``), and their LoRA files (``lora_files``)."""
