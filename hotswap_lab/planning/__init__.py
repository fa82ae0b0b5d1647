"""Planning: decides a swap. Compares an adapter with a slot, layer by layer, and writes nothing.

``decide`` has the order: are both of a kind that can be swapped and is the slot in a state for it (``beforehand``),
what happens to each of its layers (``layers``), what is left over (``leftovers``), and what is said of all of it
(``whole``). A swap that changes more than values and ranks is decided in ``beyond_values``. Whatever speaks against the
swap is collected in the ``draft``, so that a user sees all of it at once.
"""

from .decide import make_plan

__all__ = ["make_plan"]
