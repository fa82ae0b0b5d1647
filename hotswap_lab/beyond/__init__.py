"""Every other method of PEFT: PEFT itself loads the new adapter, next to the model, and the live model is made equal.

In the order of a swap: ``decide`` (is it such a swap, and can it be done), ``base_twin`` (the base model's modules once
more, around the same memory), ``fresh_adapter`` (PEFT loads the adapter onto it, behind ``guards``), ``difference``
(what the live model lacks to equal it), ``base_values`` (base weights that adapters overwrite), ``targets`` (which
tensor each key of the file went to, for the next adapter with the same config). ``wrappers`` knows what PEFT puts
around modules, ``general`` where the tensors of a method are, ``prepare`` which of them can have room for other ranks.
Of LoRA, ``configs`` judges what a file may say, ``lora`` knows the rare kinds of tensors, ``checks`` has what few
adapters meet, and ``shards`` what is spread over several processes.
"""
