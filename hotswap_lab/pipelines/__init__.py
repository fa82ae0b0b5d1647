"""Swaps of a LoRA in all components of a diffusers pipeline (``pipeline``), reading its files (``lora_files``), and the
hotswap of PEFT, diffusers and transformers replaced by this one (``patching``)."""
