"""Runs the benchmark: python -m hotswap_lab.bench."""

from __future__ import annotations

import sys

from .terminal import main

if __name__ == "__main__":
    sys.exit(main())
