"""Diffusers' pipelines, all parts swapped as one (``pipeline``), and their files of one piece (``lora_files``)."""
