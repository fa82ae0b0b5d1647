"""Swaps for PEFT's other methods: PEFT loads the new adapter next to the model, then the live model is made equal.

In the order of a swap: ``decide`` (does a swap need this, and can it be done), ``base_twin`` (a second set of modules
around the base model's memory), ``fresh_adapter`` (PEFT loads the adapter onto it, inside ``guards``), ``difference``
(the changes in the live model), ``base_values`` (base weights that adapters overwrite), ``targets`` (the tensor that
each key of the file was loaded into, for the next adapter with the same config). ``general`` finds the tensors of a
method, and ``prepare`` gives those that allow it room for other ranks. For LoRA, ``configs`` checks the fields of a
config, ``lora`` handles rare kinds of tensors, ``checks`` handles cases that few adapters meet, and ``shards`` handles
parameters that are spread over several processes.
"""
