"""Pictures <-> tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_pipeline.errors import UserError
from ldm_pipeline.images import grown, to_output, to_pictures, to_tensor


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)


def test_there_and_back_is_exact() -> None:
    """All 256 values of a byte survive the way through [-1, 1]."""
    pages = noise(3, 16, 24, 3)
    pages[0, :, :16, 0] = np.arange(256).reshape(16, 16)
    images = to_tensor(pages)
    assert images.shape == (3, 3, 16, 24)
    assert images.dtype == torch.float32
    assert -1 <= images.min() < images.max() <= 1
    pictures = to_output(images, "pil")
    assert (np.stack([np.asarray(picture) for picture in pictures]) == pages).all()
    assert torch.equal(to_tensor(pictures), images)
    assert torch.equal(to_tensor(pages[:, :, ::-1]), images.flip(3)), "a view, not a copy"
    assert images.is_contiguous(), "as stock's: other strides round otherwise"


def test_formats_agree() -> None:
    images = torch.linspace(-1.5, 1.5, 2 * 3 * 4 * 5).view(2, 3, 4, 5)
    tensor = to_output(images, "pt")
    assert (tensor.min(), tensor.max()) == (0, 1)
    array = to_output(images, "np")
    assert (array == tensor.permute(0, 2, 3, 1).numpy()).all()
    grey = to_pictures(array[..., :1])
    assert [(picture.mode, picture.size) for picture in grey] == [("L", (5, 4))] * 2


def test_checked_images_are_not_scaled_again() -> None:
    images = torch.full((2, 3, 4, 4), 0.5)
    shown = to_output(images, "pt", already=[False, True])
    assert shown[0].unique().tolist() == [0.75]
    assert shown[1].unique().tolist() == [0.5]


def test_other_pictures() -> None:
    grey = Image.new("L", (8, 16), 255)
    assert to_tensor(grey).shape == (1, 3, 16, 8)
    assert to_tensor(noise(8, 8, 3)).shape == (1, 3, 8, 8)
    with pytest.raises(UserError, match="8x16"):
        to_tensor([grey, Image.new("RGB", (8, 8))])
    others: list[Any] = ["a", None, [grey, noise(8, 8, 3)]]
    for other in others:
        with pytest.raises(UserError, match=r"picture must be a PIL.Image, not"):
            to_tensor(other)
    wide = Image.fromarray(np.full((4, 4), 128 * 256 + 200, np.uint16))
    assert torch.equal(to_tensor(wide), to_tensor(Image.new("L", (4, 4), 128)))
    for wrong in (noise(8, 8), noise(8, 8, 4), noise(8, 8, 3).astype(np.float32)):
        with pytest.raises(UserError, match="must be uint8"):
            to_tensor(wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"right": -5}, "right=-5 must be a whole number of at least 0"),
        ({"top": 1.5}, "top=1.5 must be"),
        ({"picture": "x"}, "picture must be a PIL.Image, not str"),
        ({"mask": 3}, "mask must be a PIL.Image, not int"),
        ({"mask": Image.new("L", (8, 9))}, "must have one size"),
    ],
)
def test_what_cannot_grow_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        grown(**{"picture": Image.new("RGB", (8, 8)), "left": 1, **wrong})
