"""All arguments of the server, for ``python -m hotswap_lab.serving --help``."""

import inspect
import re
import textwrap
from dataclasses import fields

from . import Options, app

#: one or more names in double backticks and a colon, and the text up to the next ones
NAMED = re.compile(r"((?:``\w+``(?:,\s)?)+):\s(.*?)(?=\s(?:``\w+``(?:,\s)?)+:\s|\n\n|$)", re.DOTALL)


def arguments() -> dict[str, str]:
    """The meaning of each argument of the server, with its default, from the docstrings of ``app`` and ``Options``."""
    defaults = {each.name: f" [{each.default or repr(each.default)}]" for each in fields(Options)}
    return {
        name: " ".join(meaning.replace("``", "").split()).rstrip(".") + defaults.get(name, "")
        for documented in (app, Options)
        for names, meaning in NAMED.findall(inspect.getdoc(documented) or "")
        for name in re.findall(r"\w+", names)
    }


def main() -> None:
    """Prints how the server is started, and its arguments."""
    print("serve run hotswap_lab.serving:app [argument=value ...]\n")
    for name, meaning in arguments().items():
        print(textwrap.fill(f"{name:16}{meaning}", 110, subsequent_indent=" " * 16))


if __name__ == "__main__":
    main()
