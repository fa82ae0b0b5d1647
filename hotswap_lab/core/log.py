"""The log: one record for each swap, refusal and preparation.

Tests: ``tests/core/test_loaded.py``.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterable

from .change import LOG
from .errors import HotswapError
from .loaded import Loaded, loaded_of, names_of
from .report import escaped
from .slot import Slot, slot_for


def log_event(
    event: str, slots: Iterable[Slot | None], error: HotswapError | None = None, wanted: object = None
) -> None:
    """Log an event for each slot. The attributes of the record are the fields of :class:`Loaded` after the event.

    After a refusal, they describe the unchanged model, and ``wanted`` is the refused source, or its name in a pool.
    """
    level = logging.WARNING if error else logging.INFO
    # without handlers, Python would print a warning
    for slot in slots if LOG.hasHandlers() and LOG.isEnabledFor(level) else ():
        now = None
        with contextlib.suppress(Exception):
            # after a swap, no weights are compared: that would take longer than the swap
            now = slot and loaded_of(slot_for(slot.methods, slot.host, slot.adapter_name), is_new=event == "swap")
        fields = {field.name: getattr(now, field.name, None) for field in dataclasses.fields(Loaded)}
        with contextlib.suppress(Exception):  # a handler must not fail a swap that is done, nor hide a refusal
            # one line for each record, so that a log can be read line by line
            sources = [getattr(one, "source", one) for one in (wanted if isinstance(wanted, list) else [wanted])]
            subject = None if wanted is None else escaped(", ".join(map(names_of, sources)))
            text = " | ".join(" ".join(line.split()) for line in str(error or now).splitlines())
            text = f"{subject}: {text}" if subject else text
            LOG.log(level, "%s: %s", event, text, extra=fields | {"event": event, "error": error, "wanted": subject})
