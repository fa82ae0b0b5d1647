"""LoRA in a live model: the engine, to be read in one sitting, in this order.

Ground
    ``errors`` (one exception; its words are in ``refusals.ini``), ``host`` (where adapters are in a model),
    ``compiled`` (what is compiled there), ``journal`` (the way back), ``interrupts`` (Ctrl-C while a model is written),
    ``guard`` (the door for threads).
What comes in, and where it goes
    ``sources`` (files), ``adapter``, ``parts`` (one tensor of an adapter in a model), ``lora`` (what PEFT keeps of LoRA
    on a layer), ``methods`` (the door for all other methods), ``slot``.
A swap
    ``plan`` (what will be), ``decide`` and ``layers`` (how it is filled in), ``change`` (what is written, and the one
    function that writes), ``writing`` (from one to the other), ``commit``, ``hotswap`` (what people call).
A prepared model
    ``prepared`` (a layer that no graph takes for constant, and what is noted on layers), ``arena`` and ``room``
    (its memory), ``shadow`` (layers that it lacked), ``prepare``.
Many adapters
    ``pool`` (what only some pools need is in ``hotswap_lab.pools``), ``strength``; ``report`` draws tables.

It imports nothing else of the package. What else there is comes in by six doors: ``methods.rest``, ``change.Change``,
``sources.elsewhere``, ``guard.turns``, ``change.ON_CONFIG`` and ``parts.KINDS``. Beside some of these stand lists of
those who know rare cases: ``decide.FIRST`` and ``decide.CHECKS``, ``compiled.BLIND_SPOTS``, ``sources.READERS`` and
``sources.FORMATS``.
"""
