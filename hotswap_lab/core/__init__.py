"""LoRA in a live model: the engine's parts, to be read in one sitting, in this order.

Ground
    ``errors`` (one exception; its words are in ``refusals.ini``), ``compiled`` (what is compiled in a model), ``host``
    (where a model has its adapters), ``journal`` (the way back after an error, and Ctrl-C that waits), ``change`` (what
    is written, and the one function that writes), ``tensors`` (one tensor of an adapter in a model).
What comes in, and where it goes
    ``engine`` (what a swap is made of), ``adapter``, ``lora`` (what PEFT keeps of LoRA on a layer), ``slot``.
A swap
    ``plan`` (what will be written), ``planner`` (how a plan is made), ``shadow`` (layers that a model lacks), ``swap``
    (what people call).
A prepared model
    ``prepared`` (a layer that no graph takes for constant, and what is noted on layers), ``arena`` and ``room`` (its
    memory), ``prepare``.
Others
    ``strength``; ``wrappers`` (what PEFT puts around modules); ``report`` draws tables.

Core imports nothing else of the package but ``hotswap_lab.compat``. Its functions get an engine:
:mod:`hotswap_lab.engine` composes the one that the package uses, and binds them to it.
"""
