"""Measurements of pictures: a classifier that was only trained on real digits, and three statistics.

Tests: ``tests/demo/test_digits.py``.
"""

import functools

import torch

from .data import SIZE, read, slanted


def ink(images: torch.Tensor) -> torch.Tensor:
    """Return the amount of ink on each picture: the mean darkness of its pixels, 0 to 1.

    Parameters
    ----------
    images:
        Pictures of shape ``(count, height, width)``, from 0 for ink to 1 for paper.

    Returns
    -------
    torch.Tensor
        One value for each picture, of shape ``(count,)``.

    Examples
    --------
    >>> ink(torch.tensor([[[0.0, 1.0], [1.0, 1.0]]]))
    tensor([0.2500])
    """
    return 1 - images.mean((1, 2))


def background(images: torch.Tensor) -> torch.Tensor:
    """Return the brightness of the paper: the mean of the pixels along the four edges, outside of the digit, 0 to 1.

    >>> background(torch.ones(1, 16, 16))
    tensor([1.])
    """
    return torch.cat([images[:, 0], images[:, -1], images[:, 1:-1, 0], images[:, 1:-1, -1]], dim=1).mean(1)


def slant(images: torch.Tensor) -> torch.Tensor:
    """Return the slant of each digit to the right, in pixels per row: the shear moment of its ink, mu11 / mu02.

    It is the slope of the line that fits the ink best when x is predicted from y. White ink on black paper works, too:
    see :func:`upright`.

    >>> line = torch.ones(1, 16, 16)
    >>> line[0, torch.arange(3, 13), torch.arange(12, 2, -1)] = 0   # a diagonal, one pixel per row
    >>> round(slant(line).item(), 3)
    1.0
    """
    weight = 1 - upright(images)
    weight = weight / weight.sum((1, 2), keepdim=True).clamp(min=1e-6)
    rows, columns = (torch.arange(size, device="cpu").float() for size in images.shape[1:3])
    y, x = rows[:, None], columns[None]
    dx = x - (weight * x).sum((1, 2), keepdim=True)
    dy = (weight * y).sum((1, 2), keepdim=True) - y
    return (weight * dx * dy).sum((1, 2)) / (weight * dy * dy).sum((1, 2)).clamp(min=1e-6)


def upright(images: torch.Tensor) -> torch.Tensor:
    """Invert pictures with bright ink on dark paper, so that all have dark ink on bright paper.

    >>> upright(torch.zeros(1, 16, 16)).min()
    tensor(1.)
    """
    return torch.where(background(images)[:, None, None] < 0.5, 1 - images, images)


def normalized(images: torch.Tensor) -> torch.Tensor:
    """Normalize pictures for the classifier: dark ink on bright paper, without slant."""
    images = upright(images)
    return torch.cat([slanted(image[None], -float(slope)) for image, slope in zip(images, slant(images), strict=True)])


@functools.cache
def _classifier():
    """Train a support vector machine in a fifth of a second, on digits that weren't used to train the model."""
    from sklearn.svm import SVC

    images, labels = read("classifier")
    return SVC(C=10).fit(normalized(images).flatten(1).numpy(), labels.numpy())


def classify(images: torch.Tensor) -> torch.Tensor:
    """Recognize the digit on each picture, in any style.

    Parameters
    ----------
    images:
        Pictures of shape ``(count, 16, 16)``, 0 to 1.

    Returns
    -------
    torch.Tensor
        Digits, integers of shape ``(count,)``.

    Raises
    ------
    ImportError
        If scikit-learn is not installed. It trains the classifier at the first use.

    Examples
    --------
    >>> images, labels = read("model")     # the classifier has not been trained on these
    >>> labels[:3], classify(images[:3])
    (tensor([1, 2, 4]), tensor([1, 2, 4]))
    """
    if images.shape[1:] != (SIZE, SIZE):
        raise ValueError(f"pictures of shape (count, {SIZE}, {SIZE}) are needed, not {tuple(images.shape)}")
    return torch.from_numpy(_classifier().predict(normalized(images).flatten(1).numpy())).long()


def held_out_accuracy() -> float:
    """Return the accuracy of the classifier on real digits that it was not trained on, 0 to 1.

    >>> held_out_accuracy() > 0.97
    True
    """
    images, labels = read("model")
    return (classify(images) == labels).float().mean().item()
