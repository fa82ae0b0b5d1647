"""Adapters of every method and of every kind of LoRA, each saved when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from adapters import METHODS, save_random_adapter_of


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> Callable[[str], list[str]]:
    cache: dict[str, list[str]] = {}

    def folders_of(name: str) -> list[str]:
        if name not in cache:
            root, (kind, configs) = tmp_path_factory.mktemp("adapters"), METHODS[name]
            cache[name] = [
                save_random_adapter_of(config, root / str(number), number + 1, kind)
                for number, config in enumerate(configs)
            ]
        return cache[name]

    return folders_of
