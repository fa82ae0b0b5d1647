"""Chapter 06: its pictures are true, its large example runs.

The shapes of layers are compared in the chapter itself.
"""

from __future__ import annotations

import base64
import functools
import io
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from exercises import assert_is_svg_with_a_text_form
from PIL import Image
from safetensors.torch import save_file
from test_pipeline import KINDS, lora

from hotswap_lab.lessons import diffusion

SVG = "{http://www.w3.org/2000/svg}"


def pixels(svg: ElementTree.Element) -> list[torch.Tensor]:
    """What the embedded pictures of a figure show, 0 to 1."""
    found = []
    for image in svg.iter(f"{SVG}image"):
        data = base64.b64decode(image.attrib["href"].removeprefix("data:image/png;base64,"))
        found.append(torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("L"))) / 255)
    return found


def test_a_grid_shows_its_pictures_in_their_places():
    images = torch.linspace(0, 1, 16).view(1, 1, 16).expand(3, 16, 16).clone()
    images[1] = 0
    figure = diffusion.grid({"one": images, "two": 1 - images}, columns=["a", "b", "c"])
    root = assert_is_svg_with_a_text_form(figure)
    one, two = pixels(root)
    assert one.shape == (16, 48)
    assert (one - torch.cat(list(images), dim=1)).abs().max() < 0.05
    assert (two - torch.cat(list(1 - images), dim=1)).abs().max() < 0.05
    rows = [float(image.attrib["y"]) for image in root.iter(f"{SVG}image")]
    assert rows[1] - rows[0] >= diffusion.CELL
    labels = [text.text for text in root.iter(f"{SVG}text")]
    assert labels == ["a", "b", "c", "one", "two"]
    assert str(figure) == "3 pictures in each row: one, two, from left to right a, b, c"


def test_drawn_digits_have_a_short_text_form():
    assert repr(diffusion.Drawn(torch.zeros(3, 16, 16))) == "3 drawn digits"


# ---- a large pipeline, small


@pytest.mark.long
def test_the_sdxl_example_on_a_tiny_sdxl(tmp_path, capsys, monkeypatch):
    kind, files = KINDS["sdxl"], []
    for number, rank in enumerate((4, 7)):
        save_file(lora(kind, rank=rank, seed=number), tmp_path / f"{number}.safetensors")
        files.append((str(tmp_path), f"{number}.safetensors"))
    pipe = kind()
    pipe.set_progress_bar_config(disable=True)
    # the same graph and guards, without building code for minutes
    monkeypatch.setattr(pipe.unet, "compile", functools.partial(pipe.unet.compile, backend="aot_eager"))
    call = dict(prompt="a cat", height=64, width=64, num_inference_steps=2, output_type="latent")
    torch.compiler.reset()
    try:
        before, after = (images.clone() for images in diffusion.swap_in_pipeline(pipe, *files, **call))
    finally:
        torch.compiler.reset()
    for images, (folder, file) in zip((before, after), files, strict=True):
        fresh = kind.loaded(folder, weight_name=file)
        fresh.set_progress_bar_config(disable=True)
        expected = fresh(generator=torch.Generator().manual_seed(0), **call).images
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-3 * expected.abs().max().item())
    assert (before - after).abs().max() > 0.01
    assert "possible" in capsys.readouterr().out


def test_a_machine_without_a_gpu_or_without_the_hub_is_told_apart(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert diffusion.why_not_here() == "no GPU with 12 GB"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    large = type("Properties", (), {"total_memory": 80e9})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: large)
    import huggingface_hub

    def unreachable(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    assert diffusion.why_not_here() == "the Hub is out of reach"
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *arguments, **options: object())
    assert diffusion.why_not_here() is None
