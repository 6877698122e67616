"""The bytes of a picture file to its pixels, by rules that are the same for every dataset.

    formats     JPEG, PNG, WebP, BMP and TIFF, told by the first bytes and never by the name
    size        at most `max_pixels`, read from the header before anything is decoded
    rotation    EXIF orientation is applied
    alpha       laid over white (or `background`) as the values are stored; kept as the mask
    16 bits     the high byte is kept; 32-bit pixels are refused
    CMYK        R = (255 - C)(255 - K) / 255 and so on; colour profiles are not applied
    palette     looked up; grey is repeated in the three channels
    animation   refused, and so are TIFFs of several pages
    damage      refused, wherever the data ends too early

Every refusal is a `BadPicture` of one line that names the file.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import (
    BmpImagePlugin,
    ExifTags,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from PIL.ImageFile import ImageFile

from ldm_pipeline.data.sources import BadPicture
from ldm_pipeline.values import WIDE_MODES

__all__ = ["FORMATS", "MAX_PIXELS", "BadPicture", "Picture", "decode", "decode_mask", "read_size"]

FORMATS = ("JPEG", "PNG", "WebP", "BMP", "TIFF")

MAX_PIXELS = 2**27
"""134 million, more than the largest cameras have; its pixels fill 400 MB."""

WHITE, BLACK = (255, 255, 255), (0, 0, 0)
PLAIN_MODES = {"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr"}
ALPHA_MODES = {"LA", "PA", "RGBA", "RGBa"}

# Pillow's classes are called by themselves: `Image.open` would warn of large pictures by a limit
# of its own, and make a film of a JPEG that carries a preview.
_SIGNATURES: tuple[tuple[bytes, int, Callable[..., ImageFile]], ...] = (
    (b"\xff\xd8\xff", 0, JpegImagePlugin.JpegImageFile),
    (b"\x89PNG\r\n\x1a\n", 0, PngImagePlugin.PngImageFile),
    (b"WEBP", 8, WebPImagePlugin.WebPImageFile),
    (b"BM", 0, BmpImagePlugin.BmpImageFile),
    (b"II*\0", 0, TiffImagePlugin.TiffImageFile),
    (b"MM\0*", 0, TiffImagePlugin.TiffImageFile),
)

_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}
"""What turns a picture upright, by its EXIF orientation (EXIF 2.32, section 4.6.4 A)."""


@dataclass(frozen=True, eq=False)
class Picture:
    """Decoded pixels, uint8 [H, W, 3], and a mask, uint8 [H, W] (255 counts fully), or None."""

    pixels: np.ndarray
    mask: np.ndarray | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.pixels.shape[1], self.pixels.shape[0]


def decode(
    data: bytes,
    name: str,
    *,
    max_pixels: int = MAX_PIXELS,
    background: tuple[int, int, int] = WHITE,
) -> Picture:
    """The upright picture in `data`; its mask is the alpha channel where it has one.

    Raises `BadPicture`, whose message begins with `name`, for all that the rules above refuse.
    """
    with _one_reason(name):
        picture = _open(data, name, max_pixels)
        if getattr(picture, "n_frames", 1) > 1:
            raise BadPicture(f"{name}: holds several frames; save the one to use by itself")
        picture.load()
        pixels, alpha = _channels(picture, name)
        upright = _UPRIGHT.get(_orientation(picture), lambda a: a)
    pixels, alpha = upright(pixels), None if alpha is None else upright(alpha)
    if alpha is not None:
        pixels = _over(pixels, alpha, background)
        alpha = np.ascontiguousarray(alpha)
    return Picture(np.ascontiguousarray(pixels), alpha)


def decode_mask(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A mask picture as grey levels, uint8 [H, W]: white counts fully, black and transparent not.

    Colours are weighted as in ITU-R 601. Raises `BadPicture` as `decode` does.
    """
    picture = decode(data, name, max_pixels=max_pixels, background=BLACK)
    return np.array(Image.fromarray(picture.pixels).convert("L"))


def read_size(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) of the upright picture, from the header alone; `BadPicture` as `decode`."""
    with _one_reason(name):
        picture = _open(data, name, max_pixels)
        width, height = picture.size
        if picture.format == "TIFF" or (picture.format == "PNG" and not _may_be_turned(data)):
            return width, height  # Pillow swaps the sides of a TIFF itself
        return (height, width) if _orientation(picture) >= 5 else (width, height)


def _may_be_turned(data: bytes) -> bool:
    """Whether a PNG has any chunk for an orientation; Pillow decodes all of it to find none."""
    return any(mark in data for mark in (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp"))


@contextmanager
def _one_reason(name: str) -> Iterator[None]:
    """Within the block every failure is a `BadPicture`."""
    try:
        yield
    except (BadPicture, MemoryError):
        raise
    except Exception as error:  # Pillow's readers raise a dozen kinds over damaged bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadPicture(f"{name}: truncated or damaged ({reason})") from error


def _open(data: bytes, name: str, max_pixels: int) -> ImageFile:
    """The picture with its header read and nothing decoded, of an allowed format and size."""
    for mark, offset, reader in _SIGNATURES:
        if data[offset : offset + len(mark)] == mark:
            picture = reader(io.BytesIO(data))
            break
    else:
        what = "is no" if data else "is empty, not a"
        raise BadPicture(f"{name}: {what} {', '.join(FORMATS)} picture; convert it to one of these")
    width, height = picture.size
    if width * height > max_pixels:
        raise BadPicture(
            f"{name}: {width}x{height} is more than {max_pixels} pixels; make it smaller"
        )
    return picture


def _channels(picture: ImageFile, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """uint8 colours [H, W, 3], and alpha [H, W] where there is one."""
    if picture.mode in WIDE_MODES:
        grey = (np.asarray(picture) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2), None
    if picture.mode not in PLAIN_MODES | ALPHA_MODES:
        raise BadPicture(
            f"{name}: has pixels of the kind {picture.mode}; save it as grey, RGB or CMYK with at"
            " most 16 bits"
        )
    if picture.has_transparency_data:
        both = np.asarray(picture.convert("RGBA"))
        return both[..., :3], both[..., 3]
    return np.asarray(picture.convert("RGB")), None


def _orientation(picture: ImageFile) -> int:
    """The EXIF orientation, 1 to 8; 1 where it is missing or cannot be read."""
    try:
        value = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF takes nothing from the pixels
        return 1
    return value if value in _UPRIGHT else 1


def _over(pixels: np.ndarray, alpha: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """`pixels` [H, W, 3] laid over one colour, rounded to the nearest level."""
    weight = alpha[..., None].astype(np.uint16)  # the sum is at most 255² + 127: 16 bits hold it
    behind = np.array(background, np.uint16)
    return ((pixels * weight + behind * (255 - weight) + 127) // 255).astype(np.uint8)
