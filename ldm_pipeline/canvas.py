"""The picture that is drawn on: opened before any network runs, encoded, and laid back at the end.

Legend
    N, M, B    pictures, masks, and images of the run; the first two are dealt out in turn
    pixels     [N, 3, H, W] in [-1, 1]
    mask       [M, 1, H, W]: 1 where is to be painted, 0 where the picture stays
    box        the part of the picture that is drawn, (left, top, right, bottom) in its pixels
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from ldm_pipeline.diffusion.noise import Noise
from ldm_pipeline.errors import UserError
from ldm_pipeline.images import opened
from ldm_pipeline.models.autoencoder import Autoencoder, draws_noise, sample, tiled
from ldm_pipeline.randomness import SharedNoise, first_rows
from ldm_pipeline.request import Request

logger = logging.getLogger(__name__)

EDGE = 1.002
"""How large a value of `pixels` may be: what rounding adds to 1 is no mistake."""

HALF = 128
"""A mask's grey level from which on is painted, of 255: stock takes it at 0.5."""


@dataclass(frozen=True, eq=False)
class Canvas:
    """What a run draws on. `image` holds pixels, or latents [N, C, h, w] where `encoded`.

    `picture` and `mask_picture` are the whole ones, where only the `box` of them is drawn.
    """

    image: Tensor
    encoded: bool
    mask: Tensor | None = None
    box: tuple[int, int, int, int] | None = None
    picture: Image.Image | None = None
    mask_picture: Image.Image | None = None

    def latent_size(self, factor: int) -> tuple[int, int]:
        """(h, w) of the latents, each of which spans `factor` pixels."""
        high, wide = self.image.shape[-2:]
        return (high, wide) if self.encoded else (high // factor, wide // factor)

    def latent_mask(self, size: tuple[int, int], count: int) -> Tensor:
        """The mask over latents of `size`, [count, 1, h, w]: that of the nearest pixel."""
        assert self.mask is not None
        return tiled(torch.nn.functional.interpolate(self.mask, size=size), count)

    def latents(self, vae: Autoencoder, request: Request, noise: Noise, like: Tensor) -> Tensor:
        """z [B, C, h, w] of the picture, in the dtype and on the device of `like`.

        An encoder may leave its latents with the channels last in memory. Stock image-to-image
        goes on with them so, and its inpainting does not; convolutions round otherwise by that.
        """
        if self.encoded:
            z = tiled(self.image.to(like), request.image_count)
        else:
            z = _encoded(self.image, vae, request, noise, like)
        return z.contiguous() if request.paints else z

    def staying(
        self,
        vae: Autoencoder,
        request: Request,
        noise: Noise,
        like: Tensor,
        shape: Sequence[int],
        needed: bool,
    ) -> Tensor | None:
        """What an inpainting UNet is shown, [B, C, h, w]: the picture, grey where is to be painted.

        Where that is not `needed`, only the noise is drawn that its encoding takes: stock encodes
        it in any case, and what is drawn after it is to be the same.
        """
        assert self.mask is not None
        if request.masked_image_latents is not None:
            return tiled(request.masked_image_latents.to(like), request.image_count)
        if self.encoded:
            return None
        shown = self.image * (self.mask < 0.5)
        if needed:
            return _encoded(shown, vae, request, noise, like)
        if draws_noise(vae):
            first_rows(noise, _drawn(shown, request, noise)).draw(shape, like.dtype, like.device)
        return None

    def keep(self, images: Tensor) -> Tensor:
        """`images` [B, 3, H, W] in [-1, 1] with the picture's own pixels where the mask is 0.

        They survive the way to 8 bits exactly, whatever the precision of the drawn ones.
        """
        assert self.mask is not None
        count = images.shape[0]
        mask, pixels = (tiled(each, count).to(images.device) for each in (self.mask, self.image))
        return torch.where(mask < 0.5, pixels, images)

    def lay_back(self, drawn: Image.Image, processor: VaeImageProcessor, keep: bool) -> Image.Image:
        """The whole picture with the drawn box in it; with `keep`, untouched outside the mask."""
        assert self.picture is not None
        assert self.mask_picture is not None
        laid: Image.Image = processor.apply_overlay(
            self.mask_picture, self.picture, drawn, self.box
        )
        if not keep:
            return laid
        painted = _black_or_white(self.mask_picture)
        return Image.composite(laid, self.picture, painted)


def open_canvas(
    request: Request,
    processor: VaeImageProcessor,
    mask_processor: VaeImageProcessor,
    size: tuple[int | None, int | None],
) -> Canvas:
    """The canvas of a request with an `image`, resized to `size` (height, width) as stock does.

    None is the picture's own size, less what the latents cannot hold. Raises `UserError` for what
    is no picture, and for pictures and masks that do not go together.
    """
    height, width = size
    how: dict[str, Any] = {"height": height, "width": width}
    pictures, masks = (_readable(name, getattr(request, name)) for name in ("image", "mask_image"))
    if (pad := request.padding_mask_crop) is not None:
        picture, mask = _whole(pictures, masks)
        box = mask_processor.get_crop_region(mask, width, height, pad=pad)
        how |= {"crops_coords": box, "resize_mode": "fill"}
    image = _tensor("image", processor, pictures, how)
    given = pictures[0] if isinstance(pictures, list) else pictures
    channels = processor.config.vae_latent_channels
    encoded = isinstance(given, Tensor) and image.shape[1] == channels
    if not encoded and image.shape[1] != 3:
        raise UserError(
            f"image has {image.shape[1]} channels; pass pictures of 3, as arrays [H, W, 3] or"
            " tensors [3, H, W], or latents"
        )
    if not encoded and image.abs().max() > EDGE:
        raise UserError(
            "image holds values outside of [0, 1], or of [-1, 1] where some are negative; divide"
            " those of 0 to 255 by 255"
        )
    if not request.paints:
        return Canvas(_dealt("image", image, request), encoded)

    mask_tensor = _tensor("mask_image", mask_processor, masks, how)
    if mask_tensor.shape[1] != 1:
        raise UserError(f"mask_image has {mask_tensor.shape[1]} channels; pass one of 1 channel")
    if not (mask_tensor >= 0.5).any():
        logger.warning("mask_image paints nothing: no pixel is lighter than half of white")
    if encoded and request.keep_unmasked:
        raise UserError("keep_unmasked needs the picture's pixels; image holds latents")
    rows = {image.shape[0], mask_tensor.shape[0]}
    if len(rows - {1}) > 1:
        raise UserError(
            f"{image.shape[0]} images and {mask_tensor.shape[0]} masks do not pair; pass one mask"
            " for all images, or one for each"
        )
    canvas = Canvas(
        _dealt("image", image, request).float(), encoded, _dealt("mask_image", mask_tensor, request)
    )
    if pad is None:
        return canvas
    return Canvas(canvas.image, encoded, canvas.mask, box, picture, mask)


def _encoded(
    images: Tensor, vae: Autoencoder, request: Request, noise: Noise, like: Tensor
) -> Tensor:
    """Latents [B, C, h, w] of `images` [N, 3, H, W], drawn from the run's own noise, in the dtype
    of `like`; the autoencoder may be kept in a wider one."""
    images = images.to(like.device, vae.dtype)
    rows = _drawn(images, request, noise)
    shared = isinstance(noise, SharedNoise)
    z = sample(vae, images, rows, first_rows(noise, rows), singly=not shared)
    return tiled(z.to(like.dtype), request.image_count)


def _drawn(images: Tensor, request: Request, noise: Noise) -> int:
    """How many latents are drawn of `images` [N, …]: one for each image of the run, or N, which
    are dealt out.

    With seeds every image draws its own, so that it does not depend on the batch. Generators draw
    as in stock pipelines: in inpainting the first N of them.
    """
    if isinstance(noise, SharedNoise) or (request.paints and request.seeds is None):
        return images.shape[0]
    return request.image_count


def _whole(image: Any, mask: Any) -> tuple[Image.Image, Image.Image]:
    """Picture and mask of which a box is to be drawn; `UserError` unless both are pictures."""
    for name, given in (("image", image), ("mask_image", mask)):
        if not isinstance(given, Image.Image):
            raise UserError(
                f"padding_mask_crop cuts out of a picture: {name} must be a PIL.Image, not"
                f" {type(given).__name__}"
            )
    if image.size != mask.size:
        raise UserError(
            f"padding_mask_crop needs a mask of the picture's size: image is {_size(image)},"
            f" mask_image {_size(mask)}"
        )
    if _black_or_white(mask).getbbox() is None:
        raise UserError("mask_image is black: there is nothing to paint, and no part to cut out")
    return image, mask


def _black_or_white(mask: Image.Image) -> Image.Image:
    """A mask as it is painted: what is lighter than half of white is white, all else black."""
    return mask.convert("L").point(lambda level: 255 * (level >= HALF))


def _size(picture: Image.Image) -> str:
    return f"{picture.width}x{picture.height}"


def _readable(name: str, given: Any) -> Any:
    """`given` as stock's processors read it: an `image` in RGB, no more than 8 bits a channel, and
    for a mask of True and False the numbers 1 and 0."""
    if isinstance(given, list | tuple):
        return [_readable(name, each) for each in given]
    if isinstance(given, Image.Image):
        picture = opened(name, given)
        return picture.convert("RGB") if name == "image" else picture
    if isinstance(given, np.ndarray) and given.dtype == bool:
        return given.astype(np.float32)
    if isinstance(given, Tensor) and given.dtype == torch.bool:
        return given.float()
    return given


def _tensor(name: str, processor: VaeImageProcessor, images: Any, how: dict[str, Any]) -> Tensor:
    """[N, C, H, W] of whatever stock pipelines take; `UserError` for anything else."""
    if name == "mask_image" and isinstance(images, np.ndarray) and images.shape[2:] in ((3,), (4,)):
        raise UserError(f"mask_image has {images.shape[2]} channels; pass one of 1 channel")
    try:
        made: Tensor = processor.preprocess(images, **how)
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        listed = images if isinstance(images, list) else [images]
        shapes = [f"{each.dtype} {tuple(each.shape)}" for each in listed if hasattr(each, "shape")]
        kinds = {type(each).__name__ for each in listed}
        why = f"a list of {' and '.join(sorted(kinds))}" if len(kinds) > 1 else ", ".join(shapes)
        why = why or " ".join(str(error).split())
        channels = 3 if name == "image" else 1
        raise UserError(
            f"{name} cannot be read: {why}; pass a PIL.Image, an array [H, W, {channels}] or a"
            f" tensor [{channels}, H, W] of floats in [0, 1], or a list or a batch of one kind"
        ) from error
    if made.ndim != 4 or 0 in made.shape:
        raise UserError(f"{name} is too small: {tuple(made.shape)}")
    if not made.isfinite().all():
        raise UserError(f"{name} holds values that are not finite")
    return made


def _dealt(name: str, rows: Tensor, request: Request) -> Tensor:
    """`rows`, if they can be dealt out to the images of the run."""
    if request.image_count % rows.shape[0]:
        raise UserError(
            f"{name} has {rows.shape[0]} entries for {request.image_count} images"
            f" ({request.prompt_count} prompts x {request.num_images_per_prompt}); pass one for"
            " all, or a number that divides them"
        )
    return rows
