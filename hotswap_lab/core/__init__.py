"""LoRA adapters in a live model, and how they are swapped. Read its modules in this order.

Foundations
    ``errors`` (one exception; its texts are in ``refusals.ini``), ``compiled`` (finds compiled code in a model),
    ``host`` (finds the model that carries the adapters), ``journal`` (undo after an error, and Ctrl-C that waits),
    ``change`` (a list of writes, and the one function that makes them), ``tensors`` (one tensor of an adapter).
An adapter and its place
    ``adapter``, ``method`` (what differs between PEFT's methods), ``lora`` (PEFT's data for LoRA on a layer), ``slot``,
    ``memory`` (tensors that share memory, and the two invariants about them that plans are checked for).
A swap
    ``plan`` (what will be written), ``planner`` (makes plans), ``shadow`` (layers that a model lacks).
    :mod:`hotswap_lab.beyond.passes` lists all passes, and :mod:`hotswap_lab.swap` has the public functions.
A prepared model
    ``prepared`` (layers whose scaling is no constant of a graph, and marks on layers), ``arena`` and ``room`` (its
    memory), ``prepare``.
Others
    ``strength``; ``wrappers`` (the modules that PEFT puts around others); ``report`` (tables); ``loaded`` (what is in
    a model now, and the log).

Core imports only ``hotswap_lab.compat`` from the rest of the package.
"""
