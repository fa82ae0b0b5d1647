"""Every other method of PEFT: PEFT itself loads the new adapter, beside the model, and the live model is made equal.

``stand_in`` (the base model's modules once more, around the same memory), ``donor`` (a fresh load onto it),
``difference`` (what the live model lacks to equal it: a ``graft``), ``decide`` (whether that can be written).
``places`` remembers where everything is, for the next adapter with the same config. ``wrappers`` knows what PEFT puts
around modules, ``base_values`` the base weights that adapters overwrite.
"""
