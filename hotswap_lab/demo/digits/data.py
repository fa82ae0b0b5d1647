"""Training data: scikit-learn's digits with a margin around them, and a function that slants them.

scikit-learn ships 1,797 handwritten digits of 8 x 8 pixels (``sklearn.datasets.load_digits``), the test set of
"Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, CC BY 4.0.

A picture is a tensor of brightness: 0 is black ink, 1 is white paper, as in any image file.

Tests: ``tests/demo/test_digits.py``.
"""

import torch
import torch.nn.functional as F

#: side of a picture and of the digit on it, in pixels; the margin leaves room for slanted and thick strokes
SIZE = 16
DIGIT_SIZE = 12
#: the largest pixel value in scikit-learn's digits
FULL_INK = 16
#: the classifier is trained on every third digit, and the model on the others
EVERY = 3


def read(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Load digits as pictures, with their labels.

    Parameters
    ----------
    part:
        ``"model"`` for the two thirds that the diffusion model is trained on, ``"classifier"`` for the rest.

    Returns
    -------
    tuple of torch.Tensor
        The pictures, of shape ``(count, 16, 16)``, from 0 for ink to 1 for paper, and the labels, integers of shape
        ``(count,)``.

    Raises
    ------
    ImportError
        If scikit-learn is not installed.

    Examples
    --------
    >>> images, labels = read("classifier")
    >>> images.shape, labels[:5].tolist()
    (torch.Size([599, 16, 16]), [0, 3, 6, 9, 2])
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    is_the_classifiers = torch.arange(len(raw.target), device="cpu") % EVERY == 0
    chosen = {"classifier": is_the_classifiers, "model": ~is_the_classifiers}[part]
    small = torch.from_numpy(raw.images).float()[chosen] / FULL_INK
    large = F.interpolate(small[:, None], size=DIGIT_SIZE, mode="bicubic", align_corners=False)
    on_a_page = F.pad(large, [(SIZE - DIGIT_SIZE) // 2] * 4)[:, 0].clamp(0, 1)
    return 1 - on_a_page, torch.from_numpy(raw.target).long()[chosen]


def slanted(images: torch.Tensor, slope: float = 0.4) -> torch.Tensor:
    """Slant digits to the right: each row moves by ``slope`` pixels more than the one below it.

    >>> line = torch.ones(1, 16, 16)
    >>> line[0, 2:14, 8] = 0
    >>> top, bottom = slanted(line)[0, [3, 12]].argmin(-1).tolist()
    >>> top - bottom  # nine rows apart
    4
    """
    shear = torch.tensor([[1.0, slope, 0.0], [0.0, 1.0, 0.0]], device="cpu").expand(len(images), 2, 3)
    grid = F.affine_grid(shear, [len(images), 1, SIZE, SIZE], align_corners=False)
    return 1 - F.grid_sample(1 - images[:, None], grid, align_corners=False)[:, 0]
