"""The JSON schema of what each command prints with ``--json``, made from the types of what the commands find.

python docs/commands.py
"""

from __future__ import annotations

import json
from functools import reduce
from operator import or_
from types import NoneType
from typing import Any, Literal

from pydantic import ConfigDict, create_model

from hotswap_lab.bench import Measured
from hotswap_lab.core.errors import Refusal
from hotswap_lab.files.summary import Summary
from hotswap_lab.verify import Verification

#: what a command didn't decide needs these: the base's weights, or inputs
UNDECIDED: dict[str, Any] = {"ok": NoneType, "needs": list[str]}
#: a swap, a file or a folder that was refused
REFUSED: dict[str, Any] = {"ok": Literal[False], "error": str, "refusals": list[Refusal]}
WRONG_USE: dict[str, Any] = {"ok": Literal[False], "error": str}
TOLD = create_model("Told", answer=(str, ...), rows=(list[Measured], ...))
DAMAGED = create_model("Damaged", name=(str, ...), error=(str, ...))
#: the documents of each command, besides the last two above, which any command may print
DOCUMENTS: dict[str, list[dict[str, Any]]] = {
    "tour": [{"ok": bool, "adapters": dict[str, TOLD]}],
    "show": [{"ok": bool, "adapters": list[Summary], "damaged": list[DAMAGED]}],
    "plan": [
        {"ok": bool, "layers": dict[str, int], "nbytes": int, "notes": list[str], "refusals": list[Refusal]},
        UNDECIDED,
    ],
    "verify": [
        {"ok": bool, **{name: field.type for name, field in Verification.__dataclass_fields__.items()}},
        UNDECIDED,
    ],
    "mix": [{"ok": Literal[True], "out": str, "rank": int}],
}


def strict(schema: Any) -> Any:
    """The same schema, with all of its fields and no others, and with null for NaN and infinity, which JSON lacks."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: strict(each) for key, each in schema.items() if key not in ("default", "title")}
    if schema.get("type") == "number":
        schema["type"] = ["number", "null"]
    if isinstance(schema.get("properties"), dict):
        schema |= {"additionalProperties": False, "required": [*schema["properties"]]}
    return schema


def schema_of(command: str) -> dict[str, Any]:
    """The schema of what a command prints: one of several documents."""
    documents = []
    for number, fields in enumerate([*DOCUMENTS[command], REFUSED, WRONG_USE]):
        model = create_model(
            f"{command}{number}",
            __config__=ConfigDict(extra="forbid"),
            __module__="hotswap_lab.verify",  # where the names in Verification's annotations are looked up
            **{name: (kind, ...) for name, kind in fields.items()},
        )
        documents.append(model)
    wanted = create_model(command, of=(reduce(or_, documents), ...)).model_json_schema()
    return strict({"$defs": wanted["$defs"], "anyOf": wanted["properties"]["of"]["anyOf"]})


def schemas() -> dict[str, Any]:
    """All of them, by the names of the commands."""
    return {command: schema_of(command) for command in DOCUMENTS}


if __name__ == "__main__":
    print(json.dumps(schemas(), indent=2))
