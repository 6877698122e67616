"""Pictures and masks <-> tensors.

Legend
    images   [B, 3, H, W] in [-1, 1], what the autoencoder reads and writes
    mask     [B, 1, H, W] in [0, 1]; 1 is where something is to be drawn
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm_pipeline.errors import UserError
from ldm_pipeline.values import WIDE_MODES, as_whole, shown


def to_output(images: Tensor, output_type: str, already: Sequence[bool] | None = None) -> Any:
    """`images` as a caller wants them.

    "pil" gives a list of RGB pictures, "np" a float32 array [B, H, W, 3] in [0, 1], "pt" a tensor
    [B, 3, H, W] in [0, 1]. `already[i]` says that image i lies in [0, 1] as it is (a safety
    checker hands back such ones).
    """
    if already is None or not any(already):
        shown = (images * 0.5 + 0.5).clamp(0, 1)
    else:
        rows = zip(images, already, strict=True)
        shown = torch.stack([i if as_is else (i * 0.5 + 0.5).clamp(0, 1) for i, as_is in rows])
    if output_type == "pt":
        return shown
    array = shown.cpu().permute(0, 2, 3, 1).float().numpy()
    return array if output_type == "np" else to_pictures(array)


def to_pictures(array: np.ndarray) -> list[Image.Image]:
    """Pictures of an array [B, H, W, 3 or 1] in [0, 1], each value rounded to the nearest 255th."""
    bytes_ = (array * 255).round().astype(np.uint8)
    return [Image.fromarray(page.squeeze(-1) if page.shape[-1] == 1 else page) for page in bytes_]


def opened(name: str, picture: Any) -> Image.Image:
    """`picture` with its pixels in memory, in at most 8 bits a channel.

    Raises `UserError` for what is no picture or a damaged one, and for pixels of the kinds I and F,
    whose range nothing tells.
    """
    if not isinstance(picture, Image.Image):
        raise UserError(f"{name} must be a PIL.Image, not {type(picture).__name__}")
    try:
        picture.load()
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{name} cannot be read: {shown(str(error))}") from error
    if picture.mode in WIDE_MODES:
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise UserError(
            f"{name} has pixels of the kind {picture.mode}, and nothing tells which of them is"
            " white; pass it in grey (L) or RGB"
        )
    return picture


def to_tensor(pictures: Image.Image | np.ndarray | Sequence[Image.Image]) -> Tensor:
    """`images` [B, 3, H, W] in [-1, 1] of RGB pictures, or of a uint8 array [(B,) H, W, 3].

    Transparent and grey pictures are turned into RGB. Raises `UserError` for other kinds (see
    `opened`), and where the pictures of a list differ in size.
    """
    if isinstance(pictures, np.ndarray):
        if pictures.dtype != np.uint8 or pictures.shape[-1] != 3 or pictures.ndim not in (3, 4):
            raise UserError(
                f"a picture array must be uint8 [(B,) H, W, 3], not {pictures.dtype}"
                f" {list(pictures.shape)}"
            )
        pages = pictures if pictures.ndim == 4 else pictures[None]
    else:
        given = pictures if isinstance(pictures, list | tuple) else [pictures]
        listed = [opened("picture", each) for each in given]
        if len({picture.size for picture in listed}) != 1:
            raise UserError(f"pictures of one batch must have one size, not {_sizes(listed)}")
        pages = np.stack([np.asarray(picture.convert("RGB")) for picture in listed])
    planes = np.array(pages.transpose(0, 3, 1, 2), order="C")
    return torch.from_numpy(planes).float() / 127.5 - 1.0


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of images in [-1, 1], in dB, [B]; the peak is 2."""
    return 10 * torch.log10(4.0 / (x - y).square().flatten(1).mean(dim=1))


def grown(
    picture: Image.Image,
    left: int = 0,
    top: int = 0,
    right: int = 0,
    bottom: int = 0,
    *,
    mask: Image.Image | None = None,
    painted: bool = True,
) -> tuple[Image.Image, Image.Image]:
    """An RGB picture with so many pixels more at its sides, and the mask that paints them.

    Inpainting over the two is outpainting. The sides are continued by the pixels at their edges.
    `mask` (white is painted) is what is to be painted besides; with `painted` False it grows like
    the picture, for sides that are to be cut off again. Raises `UserError` for what is no picture,
    a mask of another size, and sides that are no whole numbers of at least 0.
    """
    picture = opened("picture", picture)
    mask = None if mask is None else opened("mask", mask)
    if mask is not None and mask.size != picture.size:
        raise UserError(f"picture and mask must have one size, not {_sizes([picture, mask])}")
    for name, side in {"left": left, "top": top, "right": right, "bottom": bottom}.items():
        as_whole(name, side, 0)
    margins = ((top, bottom), (left, right))
    pixels = np.pad(np.asarray(picture.convert("RGB")), (*margins, (0, 0)), mode="edge")
    if mask is None:
        inner = np.zeros((picture.height, picture.width), np.uint8)
    else:
        inner = np.asarray(mask.convert("L"))
    if painted:
        around = np.pad(inner, margins, constant_values=255)
    else:
        around = np.pad(inner, margins, mode="edge")
    return Image.fromarray(pixels), Image.fromarray(around)


def _sizes(pictures: Sequence[Image.Image]) -> list[str]:
    return sorted({f"{width}x{height}" for width, height in (p.size for p in pictures)})
