"""The engine: swaps of LoRA adapters in a live model, which may be prepared and compiled.

Read its modules in this order.

Foundations
    ``errors`` (one exception; its texts are in ``refusals.ini``), ``compiled`` (finds compiled code in a model),
    ``host`` (finds the model that carries the adapters), ``journal`` (undo after an error, and Ctrl-C that waits),
    ``change`` (a list of writes, and the one function that makes them), ``tensors`` (one tensor of an adapter).
An adapter and its place
    ``adapter``, ``settings`` (the fields of a config, each declared once), ``method`` (what differs between PEFT's
    methods), ``lora`` and ``lora_method`` (LoRA as PEFT loads it, and as a method), ``slot``, ``memory`` (tensors that
    share memory, and the two invariants about them that plans are checked for), ``writing`` (scalings and settings).
A swap
    ``plan`` (what will be written), ``planner`` (makes plans), ``checks`` (its passes for rare cases),
    ``added_layers`` (layers that a model lacks), ``state_dict_hooks`` (state dicts without padding).
    :mod:`hotswap_lab.beyond.passes` lists all passes, and :mod:`hotswap_lab.swap` has the public functions.
A prepared model
    ``prepared`` (layers whose scaling is no constant of a graph, and marks on layers), ``arena`` and ``room`` (its
    memory), ``prepare``.
Others
    ``strength``; ``wrappers`` (the modules that PEFT puts around others); ``report`` (tables); ``loaded`` (what is in
    a model now), ``log``; ``numerals`` (numbers in text).

Core imports only ``hotswap_lab.compat`` from the rest of the package, and stands alone: it swaps adapters from memory
that are plain LoRA. It refuses all others, which ``hotswap_lab.beyond`` takes up.

>>> from hotswap_lab import Adapter, demo
>>> from hotswap_lab.core.change import apply
>>> from hotswap_lab.core.host import find_host
>>> from hotswap_lab.core.planner import LORA, LORA_PASSES, make_plan
>>> from hotswap_lab.core.slot import slot_for
>>> model, tokenizer = demo.load("reverse")
>>> slot = slot_for(LORA, find_host(model, "default"), "default")
>>> plan = make_plan(slot, Adapter.load(demo.adapter_path("double")), passes=LORA_PASSES)
>>> plan.raise_if_refused()
>>> apply([plan.change()])
>>> demo.ask(model, tokenizer, "abc")
'abcabc'
"""
