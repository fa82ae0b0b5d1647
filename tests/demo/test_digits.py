"""The model that draws digits does what its cards say, on noise that it has never seen."""

from __future__ import annotations

import re
from pathlib import Path

import measure_digits as measure
import pytest
import torch
from train_digits import STYLES

from hotswap_lab import hotswap_adapter
from hotswap_lab.demo import digits
from hotswap_lab.demo.digits import data, judge

NAMES = digits.names()
#: pictures for each score: fewer than for the cards, for a test must not take long
COUNT = 60


@pytest.fixture(scope="module")
def live():
    """One model for all of them: every adapter is swapped in."""
    return digits.load("slanted")


@pytest.fixture(scope="module")
def of_base():
    return measure.measure(digits.load_base(), 150, seed=99)


# ---- scores


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_scores_on_fresh_noise_are_those_of_the_card(live, of_base, name):
    hotswap_adapter(live, digits.path(name), "default", add_layers=True)
    score, card = measure.measure(live, COUNT, seed=99).of(name), Path(digits.path(name), "README.md").read_text()
    claimed = float(re.search(r"\| (\d\.\d+) \|$", card, re.MULTILINE).group(1))
    assert score == pytest.approx(claimed, abs=0.05)
    assert of_base.of(name) != pytest.approx(claimed, abs=0.08)  # what everybody reaches says nothing


@pytest.mark.long
def test_the_classifier_reads_digits_that_it_was_not_trained_on():
    assert judge.held_out_accuracy() > 0.98
    images, labels = data.read("model")
    for name, style in STYLES.items():
        share = (judge.classify(style(images)) == labels).float().mean()
        assert share > (0.94 if name == "bold" else 0.98), name


def test_the_slant_is_that_of_the_ink_on_white_and_on_black_paper():
    images, _ = data.read("classifier")
    slant = judge.slant(images)
    torch.testing.assert_close(judge.slant(1 - images), slant, atol=1e-5, rtol=0)
    assert (judge.slant(data.slanted(images)) - slant).mean() == pytest.approx(0.4, abs=0.02)


def test_pictures_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\(count, 16, 16\) are needed, not \(1, 8, 8\)"):
        digits.classify(torch.zeros(1, 8, 8))


# ---- drawing


def test_the_pipeline_draws_the_same():
    model = digits.load("only_3")
    pipe = digits.pipeline(model)
    assert pipe.unet is model.get_base_model()
    generator = torch.Generator().manual_seed(5)
    images = pipe(batch_size=3, generator=generator, num_inference_steps=8, output_type="np").images
    drawn = digits.draw(model, 3, seed=5, steps=8)
    torch.testing.assert_close(torch.tensor(images[..., 0]), drawn, rtol=0, atol=1e-5)


def test_the_noise_of_a_picture_does_not_depend_on_how_many_are_drawn():
    assert torch.equal(digits.noise(5)[:2], digits.noise(2))
    assert not torch.equal(digits.noise(2, seed=1), digits.noise(2))
