"""What is noted on a model about that very model, and holds for no copy of it."""

from __future__ import annotations


class Uncopied(dict):
    """A table that every copy of the model, and every model that is read back from a file, starts without.

    >>> import copy
    >>> copy.deepcopy(Uncopied(default="where its tensors lie"))
    {}
    """

    def __deepcopy__(self, memo: dict) -> Uncopied:
        return type(self)()

    def __reduce__(self) -> tuple:
        return type(self), ()
