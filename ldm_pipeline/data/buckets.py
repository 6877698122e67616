"""Aspect-ratio buckets: the few sizes that pictures are brought to, so that batches have one shape.

Every bucket of a *family* has nearly the same area. A picture goes to the bucket that is nearest
to its aspect ratio, in the first family (the largest is first) where it fills that bucket. It is
resized until it just covers the bucket, and what juts out is cut off. Nothing is enlarged unless
`upscale` is set; a picture too small for all families is reported by None.

Legend
    Size        (width, height) in pixels
    step        sides are multiples of it: 8 for the autoencoder, and twice more for each time that
                the UNet halves its latents, which makes 64 for Stable Diffusion
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ldm_pipeline.errors import UserError
from ldm_pipeline.request import MAX_SIDE

if TYPE_CHECKING:
    import numpy as np

Size = tuple[int, int]

CENTRE = (0.5, 0.5)


@dataclass(frozen=True)
class Buckets:
    """Families of sizes, the largest area first, and whether small pictures are enlarged."""

    families: tuple[tuple[Size, ...], ...]
    upscale: bool = False

    def choose(self, size: Size) -> Size | None:
        """The one bucket of a picture of this size; None where it is too small for all."""
        for family in self.families:
            bucket = min(family, key=lambda bucket: _distance(size, bucket))
            if self.upscale or (size[0] >= bucket[0] and size[1] >= bucket[1]):
                return bucket
        return None

    def fit(self, size: Size, at: tuple[float, float] = CENTRE) -> Transform | None:
        """What brings a picture of this size into its bucket; None where it is too small."""
        bucket = self.choose(size)
        return None if bucket is None else cover(size, bucket, at)


def aspect_buckets(resolution: int, step: int = 64, *, upscale: bool = False) -> Buckets:
    """Buckets of at most `resolution`² pixels, and smaller families for smaller pictures.

    All sides are multiples of `step`, from a quarter of the resolution to twice it. The families
    go down from `resolution` to half of it in steps. Raises `UserError` for values that do not fit
    together.
    """
    if step < 8 or step % 8:
        raise UserError(f"step={step} must be a multiple of 8")
    if not step <= resolution <= MAX_SIDE or resolution % step:
        raise UserError(
            f"resolution={resolution} must be a multiple of the step, {step}, up to {MAX_SIDE}"
        )
    smallest = -(-resolution // 2 // step) * step
    low = max(step, smallest // 2 // step * step)
    sides = range(resolution, smallest - 1, -step)
    return Buckets(tuple(_family(side, step, low, 2 * resolution) for side in sides), upscale)


def one_size(width: int, height: int, *, upscale: bool = False) -> Buckets:
    """A fixed resolution: one bucket for everything. Raises `UserError` for sides not in eights."""
    for name, side in (("width", width), ("height", height)):
        if side < 8 or side % 8:
            raise UserError(f"{name}={side} must be a multiple of 8")
    return Buckets((((width, height),),), upscale)


def _family(resolution: int, step: int, low: int, high: int) -> tuple[Size, ...]:
    """Every width with the greatest height that keeps the area, if that is no side too long, and
    the same lying down."""
    sizes = set()
    for width in range(low, high + 1, step):
        height = resolution**2 // width // step * step
        if low <= height <= high:
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


def _distance(size: Size, bucket: Size) -> tuple[float, int, Size]:
    """How far apart the aspect ratios are (as a factor, at least 1); then the larger bucket."""
    one, other = size[0] * bucket[1], size[1] * bucket[0]
    return max(one, other) / min(one, other), -bucket[0] * bucket[1], bucket


@dataclass(frozen=True)
class Transform:
    """Resize from `original` to `resized`, then cut the `bucket` out at (left, top).

    A value: equal transforms give equal pixels, so it may be part of a cache's key. `original`,
    and (top, left) as the crop, are also what SDXL is told about each picture.
    """

    original: Size
    resized: Size
    bucket: Size
    left: int
    top: int

    @property
    def key(self) -> str:
        """The whole transform in words, for a cache's key; the filter is part of it."""
        (rw, rh), (w, h) = self.resized, self.bucket
        return f"lanczos {rw}x{rh}, crop {w}x{h}+{self.left}+{self.top}"

    def picture(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels uint8 [H, W, 3] of the original as uint8 [h, w, 3] of the bucket.

        The Lanczos filter widens with the reduction, so that fine patterns do not alias. Where
        the size stays, the pixels do.
        """
        from PIL.Image import Resampling

        return self._apply(pixels, Resampling.LANCZOS)

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """The same of a mask uint8 [H, W]; a filter without overshoot keeps it free of ringing."""
        from PIL.Image import Resampling

        return self._apply(mask, Resampling.BILINEAR)

    def _apply(self, array: np.ndarray, resampling: int) -> np.ndarray:
        import numpy as np
        from PIL import Image

        width, height = self.original
        assert array.shape[:2] == (height, width), "a transform is for pictures of one size"
        if self.resized != self.original:
            picture = Image.fromarray(array)
            array = np.asarray(picture.resize(self.resized, Image.Resampling(resampling)))
        w, h = self.bucket
        return np.ascontiguousarray(array[self.top : self.top + h, self.left : self.left + w])


def cover(size: Size, bucket: Size, at: tuple[float, float] = CENTRE) -> Transform:
    """Resize `size` until it just covers `bucket`, and cut the bucket out at fraction `at` of the
    room that is left: (0, 0) is the upper left corner, (0.5, 0.5) the centre."""
    (width, height), (w, h) = size, bucket
    if w * height >= h * width:  # the width is what just fits
        resized = w, round(height * w / width)
    else:
        resized = round(width * h / height), h
    left, top = (
        min(room, int(fraction * (room + 1)))
        for fraction, room in zip(at, (resized[0] - w, resized[1] - h), strict=True)
    )
    return Transform(size, resized, bucket, left, top)


def crop_at(seed: int, key: str) -> tuple[float, float]:
    """A place for the crop that depends on (seed, key) alone: the same in every epoch, so that
    latents can be cached."""
    from ldm_pipeline.data.draws import stream

    x, y = stream(seed, "crop", key).random(2)
    return float(x), float(y)
