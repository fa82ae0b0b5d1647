"""A path with a typing error in it: what is there instead comes first, then what the Hub has to say."""

from __future__ import annotations

import pytest

from hotswap_lab import Adapter, HotswapError


def found(source: object) -> str:
    with pytest.raises(HotswapError, match=r"Can't find 'adapter_config\.json'") as error:
        Adapter.load(source)
    return error.value.refusals[0].found


def test_what_is_in_the_nearest_folder(tmp_path, monkeypatch):
    (tmp_path / "adapters" / "pirate").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    # the Hub has something to say of the first alone: the others can't be ids
    for source in ("adapters/pirat", tmp_path / "adapters" / "pirat", "adapters/pirat/last", "./adapters/pirat"):
        text, here = found(source), f"no folder {str(source)!r} here (in {tmp_path / 'adapters'}: 'pirate')"
        assert text.startswith(f"{here}; and the Hub: ") if source == "adapters/pirat" else text == here
    assert found("adapter").startswith(f"no folder 'adapter' here (in {tmp_path}: 'adapters'); and the Hub: ")


def test_a_hub_id_is_no_path(tmp_path, monkeypatch):
    (tmp_path / "private").touch()
    monkeypatch.chdir(tmp_path)
    assert found("team/adapter").startswith("no folder 'team/adapter' here; and the Hub: OfflineModeIsEnabled")


def test_a_file_is_no_folder(tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    path.touch()
    assert found(path).startswith(f"{path} is a file")
