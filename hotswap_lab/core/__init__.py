"""LoRA in a live model: the engine, to be read in one sitting."""
