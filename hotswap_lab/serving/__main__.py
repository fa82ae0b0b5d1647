"""The meaning of all arguments of the server, for ``python -m hotswap_lab.serving --help``."""

import inspect

from . import Options, app


def main() -> None:
    """Prints how the server is started, and its arguments with their defaults."""
    print("hotswap-lab serve [BASE [ADAPTERS]] [--set argument=value ...]")
    print("serve run hotswap_lab.serving:app [argument=value ...]\n")
    for documented in (app, Options):
        print(inspect.getdoc(documented), end="\n\n")
    print(f"Defaults: {Options()}")


if __name__ == "__main__":
    main()
