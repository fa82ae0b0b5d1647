"""What is on a picture: a classifier that has never seen the diffusion model, and three plain statistics."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from .data import SIZE, read, slanted


def ink(images: torch.Tensor) -> torch.Tensor:
    """How much ink is on each picture: the mean darkness of its pixels, 0 to 1.

    Parameters
    ----------
    images:
        Pictures of shape ``(count, height, width)``, 0 for ink to 1 for paper.

    Returns
    -------
    torch.Tensor
        Of shape ``(count,)``.

    Examples
    --------
    >>> ink(torch.tensor([[[0.0, 1.0], [1.0, 1.0]]]))
    tensor([0.2500])
    """
    return 1 - images.mean((1, 2))


def background(images: torch.Tensor) -> torch.Tensor:
    """How bright the paper is: the mean of the pixels along the four edges, where no digit reaches, 0 to 1.

    >>> background(torch.ones(1, 16, 16))
    tensor([1.])
    """
    edges = [images[:, 0], images[:, -1], images[:, 1:-1, 0], images[:, 1:-1, -1]]
    return torch.cat(edges, dim=1).mean(1)


def slant(images: torch.Tensor) -> torch.Tensor:
    """How far each digit leans to the right, in pixels per row: the shear moment of its ink, mu11 / mu02.

    It is the slope of the line that fits the ink best when x is predicted from y. The darker of ink and paper may be
    either: see :func:`upright`.

    >>> line = torch.ones(1, 16, 16)
    >>> line[0, torch.arange(3, 13), torch.arange(12, 2, -1)] = 0   # a diagonal, one pixel per row
    >>> round(slant(line).item(), 3)
    1.0
    """
    weight = 1 - upright(images)
    weight = weight / weight.sum((1, 2), keepdim=True).clamp(min=1e-6)
    y, x = torch.arange(images.shape[1]).float()[:, None], torch.arange(images.shape[2]).float()[None]
    dx = x - (weight * x).sum((1, 2), keepdim=True)
    dy = (weight * y).sum((1, 2), keepdim=True) - y
    return (weight * dx * dy).sum((1, 2)) / (weight * dy * dy).sum((1, 2)).clamp(min=1e-6)


def upright(images: torch.Tensor) -> torch.Tensor:
    """Dark ink on bright paper, whichever it was.

    >>> upright(torch.zeros(1, 16, 16)).min()
    tensor(1.)
    """
    return torch.where(background(images)[:, None, None] < 0.5, 1 - images, images)


def normalised(images: torch.Tensor) -> torch.Tensor:
    """What the classifier reads: dark ink on bright paper, not leaning. Only so it can read all styles alike."""
    images = upright(images)
    return torch.cat([slanted(image[None], -float(slope)) for image, slope in zip(images, slant(images), strict=True)])


@functools.cache
def _classifier():
    """A support vector machine, trained in a fifth of a second on digits that the diffusion model has never seen."""
    from sklearn.svm import SVC

    images, labels = read("classifier")
    return SVC(C=10).fit(normalised(images).flatten(1).numpy(), labels.numpy())


def classify(images: torch.Tensor) -> torch.Tensor:
    """Which digit is on each picture, in any style.

    Parameters
    ----------
    images:
        Pictures of shape ``(count, 16, 16)``, 0 to 1.

    Returns
    -------
    torch.Tensor
        Digits, whole numbers of shape ``(count,)``.

    Raises
    ------
    ImportError
        If scikit-learn is not installed; the classifier is trained when it is used first.

    Examples
    --------
    >>> images, labels = read("model")     # the classifier has not been trained on these
    >>> labels[:3], classify(images[:3])
    (tensor([1, 2, 4]), tensor([1, 2, 4]))
    """
    if images.shape[1:] != (SIZE, SIZE):
        raise ValueError(f"pictures of shape (count, {SIZE}, {SIZE}) are needed, not {tuple(images.shape)}")
    return torch.from_numpy(_classifier().predict(normalised(images).flatten(1).numpy())).long()


def held_out_accuracy(style: Callable[[torch.Tensor], torch.Tensor] | None = None) -> float:
    """The share that the classifier reads right of real digits that it was not trained on, 0 to 1.

    ``style`` is what is done to them first, one of :data:`.data.STYLES`.

    >>> held_out_accuracy() > 0.97
    True
    """
    images, labels = read("model")
    return (classify(style(images) if style else images) == labels).float().mean().item()
