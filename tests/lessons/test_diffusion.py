"""Chapter 06: its pictures are true, its large example runs.

The shapes of layers are compared in the chapter itself.
"""

from __future__ import annotations

import base64
import functools
import io

import numpy as np
import pytest
import torch
from exercises import assert_is_svg_with_a_text_form
from oracle import assert_close
from PIL import Image
from safetensors.torch import save_file
from test_exercises import defined_in
from test_pipeline import KINDS, lora

from hotswap_lab.lessons import diffusion

SVG = "{http://www.w3.org/2000/svg}"


def test_a_grid_shows_its_pictures_in_their_places():
    images = torch.linspace(0, 1, 16).view(1, 1, 16).expand(3, 16, 16).clone()
    images[1] = 0
    rows = {"one": images, "two": 1 - images}
    figure = diffusion.grid(rows, columns=["a", "b", "c"])
    root = assert_is_svg_with_a_text_form(figure)
    drawn = list(root.iter(f"{SVG}image"))
    for image, expected in zip(drawn, rows.values(), strict=True):
        data = base64.b64decode(image.attrib["href"].removeprefix("data:image/png;base64,"))
        pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("L"))) / 255
        torch.testing.assert_close(pixels, torch.cat(list(expected), dim=1), rtol=0, atol=0.05)
    assert float(drawn[1].attrib["y"]) - float(drawn[0].attrib["y"]) >= diffusion.CELL
    assert [text.text for text in root.iter(f"{SVG}text")] == ["a", "b", "c", "one", "two"]
    assert str(figure) == "3 pictures in each row: one, two, from left to right a, b, c"
    assert repr(diffusion.Drawn(images)) == "3 drawn digits"


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
        swap_in_pipeline = defined_in("06_diffusion.ipynb").swap_in_pipeline
        before, after = (images.clone() for images in swap_in_pipeline(pipe, *files, **call))
    finally:
        torch.compiler.reset()
    for images, (folder, file) in zip((before, after), files, strict=True):
        fresh = kind.loaded(folder, weight_name=file)
        fresh.set_progress_bar_config(disable=True)
        expected = fresh(generator=torch.Generator().manual_seed(0), **call).images
        assert_close(images, expected)
    assert (before - after).abs().max() > 0.01
    assert "possible" in capsys.readouterr().out
