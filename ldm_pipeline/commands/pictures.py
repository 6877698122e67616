"""What `--image` and its companions ask for: checked, read and paired before any model loads.

The picture keeps its size, unless --height and --width say otherwise. Its sides are continued to
multiples of 8 for drawing and cut off again, so that no pixel is moved. A mask of the picture's
shape and another size is resized to it; one of another shape was made for another picture, and is
refused.

Legend: sides are named left, top, right, bottom; sizes are (width, height), as Pillow has them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_pipeline.commands.hashing import of_bytes
from ldm_pipeline.commands.sources import Source, unet_config
from ldm_pipeline.errors import UserError
from ldm_pipeline.metadata import Origin
from ldm_pipeline.models.original.families import PAINTING_CHANNELS
from ldm_pipeline.request import MAX_PIXELS, MAX_SIDE, SIZE_STEP, Task

if TYPE_CHECKING:
    from PIL.Image import Image

COMPANIONS = ("mask", "strength", "exact_steps", "crop", "grow", "no_keep")
"""Arguments that mean something with --image alone."""

NONE: dict[str, Any] = dict.fromkeys(("image", *COMPANIONS))
"""The arguments where no picture is asked for."""

SAME_SHAPE = 0.01
"""How far the ratio of a mask's sides may be from the picture's: the rounding of a small one."""


@dataclass(frozen=True)
class Given:
    """A picture to draw out of or into, ready for the pipeline.

    `size` is that of the finished picture, `drawn` that of the drawing; None is the model's own.
    """

    origin: Origin
    image: Image
    mask: Image | None
    size: tuple[int, int]
    drawn: tuple[int | None, int | None]

    def arguments(self) -> dict[str, Any]:
        """What the pipeline is called with."""
        origin = self.origin
        arguments = {
            "image": self.image,
            "strength": origin.strength,
            "exact_steps": origin.exact_steps,
            "width": self.drawn[0],
            "height": self.drawn[1],
        }
        if self.mask is not None:
            arguments |= {
                "mask_image": self.mask,
                "padding_mask_crop": origin.crop,
                "keep_unmasked": origin.keep,
            }
        return arguments

    def trimmed(self, picture: Image) -> Image:
        """What the pipeline drew, without what was continued beyond the sides."""
        return picture.crop((0, 0, *self.size))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --image and its companions."""
    add = parser.add_argument
    add("--image", type=Path, metavar="FILE", help="draw out of this picture")
    add("--mask", type=Path, metavar="FILE", help="paint only where this picture is white")
    add(
        "--strength",
        type=float,
        help="how much is drawn anew, above 0 to 1 (0.8, with a mask 1; for SDXL 0.3 and 0.9999)",
    )
    add("--exact-steps", action="store_true", help="run all --steps whatever the strength")
    add(
        "--crop",
        type=int,
        metavar="PIXELS",
        help="draw only what the mask covers and so much around it, enlarged",
    )
    add(
        "--grow",
        metavar="L,T,R,B",
        help="paint so many pixels on at the left, top, right and bottom; one number for all",
    )
    add("--no-keep", action="store_true", help="let pixels outside the mask change a little, too")


def check(args: argparse.Namespace) -> None:
    """Refuse companions without --image, and those of a mask without one."""
    given = [name for name in COMPANIONS if getattr(args, name) not in (None, False)]
    if args.image is None and given:
        raise UserError(f"--{given[0].replace('_', '-')} needs a picture: pass --image FILE")
    for name in ("crop", "no_keep"):
        if name in given and not paints(args):
            raise UserError(f"--{name.replace('_', '-')} needs a mask: pass --mask FILE")
    if args.crop is not None and args.grow is not None:
        raise UserError("--crop and --grow do not go together; leave one out")


def check_model(args: argparse.Namespace, source: Source) -> None:
    """Refuse a model that only paints into pictures where nothing is to be painted."""
    reads = (unet_config(source) or {}).get("in_channels")
    if reads == PAINTING_CHANNELS and not (args.image is not None and paints(args)):
        raise UserError(
            f"--model={source.name} paints into pictures (its UNet reads {reads} channels); pass"
            " --image FILE and --mask FILE to ldm generate"
        )


def paints(args: argparse.Namespace) -> bool:
    """Whether a part of a picture is to be painted, or what is grown around it."""
    return args.mask is not None or args.grow is not None


def read(args: argparse.Namespace) -> Given | None:
    """The picture and mask that `args` name; None without --image.

    Raises `UserError` for a file that is missing or no picture, for a mask of another shape or one
    that leaves nothing to paint, and for more pixels than can be drawn.
    """
    if args.image is None:
        return None
    sides = read_sides(args.grow)
    contents = _contents("--image", args.image)
    mask_contents = None if args.mask is None else _contents("--mask", args.mask)

    from PIL import Image as Images

    from ldm_pipeline.data.decoding import decode, decode_mask
    from ldm_pipeline.images import grown

    image = Images.fromarray(decode(contents, f"--image={args.image}").pixels)
    mask = None
    if mask_contents is not None:
        mask = Images.fromarray(decode_mask(mask_contents, f"--mask={args.mask}"))
        mask = _paired(mask, image, args)
    if args.crop is None and (args.height or args.width):
        size = (args.width or image.width, args.height or image.height)
        image = image.resize(size, Images.Resampling.LANCZOS)
        mask = None if mask is None else mask.resize(size, Images.Resampling.NEAREST)
    if args.crop is None:
        _check_size(image.width + sides[0] + sides[2], image.height + sides[1] + sides[3])
    image, painted = grown(image, *sides, mask=mask)
    size = image.size
    drawn: tuple[int | None, int | None] = (args.width, args.height)
    if args.crop is None:
        image, painted = grown(image, *_to_steps(size), mask=painted, painted=False)
        drawn = image.size
    painting = mask is not None or any(sides)
    origin = Origin(
        image=(str(args.image), of_bytes(contents)),
        mask=None if mask_contents is None else (str(args.mask), of_bytes(mask_contents)),
        strength=args.strength,
        exact_steps=args.exact_steps,
        keep=not args.no_keep,
        crop=args.crop,
        grow=sides,
        height=args.height,
        width=args.width,
    )
    return Given(origin, image, painted if painting else None, size, drawn)


def settled(origin: Origin, tasks: Sequence[Task]) -> Origin:
    """`origin` with the strength of the task at hand, one of the model's, unless one was named."""
    painting = origin.mask is not None or any(origin.grow)
    (task,) = (t for t in tasks if "image" in t.needs and ("mask_image" in t.needs) == painting)
    return replace(origin, strength=task.strength if origin.strength is None else origin.strength)


def read_sides(text: str | None) -> tuple[int, int, int, int]:
    """The four numbers of --grow; `UserError` for anything but one or four of them."""
    if text is None:
        return 0, 0, 0, 0
    parts = [part.strip() for part in text.split(",")]
    if len(parts) in (1, 4) and all(part.isdecimal() for part in parts) and any(map(int, parts)):
        left, top, right, bottom = map(int, parts * (4 // len(parts)))
        return left, top, right, bottom
    raise UserError(f"--grow={text!r} must be pixels, as in 32, or left,top,right,bottom: 0,0,64,0")


def _check_size(width: int, height: int) -> None:
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise UserError(
            f"the picture would be {width}x{height}; a side has {MAX_SIDE} pixels at most, and a"
            f" picture {MAX_PIXELS}, such as 8192x8192: name a smaller --height and --width, or"
            " --grow it less"
        )


def _contents(flag: str, path: Path) -> bytes:
    if not path.exists():
        raise UserError(f"{flag}={path}: there is no such file; a prompt stands before {flag}")
    if not (path.is_file() or path.is_fifo()):  # a device may have no end
        raise UserError(f"{flag}={path} is no file; name a picture")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{flag}={path}: {error.strerror or error}") from error


def _paired(mask: Image, image: Image, args: argparse.Namespace) -> Image:
    """The mask at the picture's size, by the rule above."""
    from PIL.Image import Resampling

    ratio = (mask.width / mask.height) / (image.width / image.height)
    if abs(ratio - 1) > SAME_SHAPE:
        raise UserError(
            f"--mask={args.mask} is {mask.width}x{mask.height} and --image={args.image}"
            f" {image.width}x{image.height}: a mask has the picture's size, or its shape and is"
            " resized"
        )
    if mask.size != image.size:
        mask = mask.resize(image.size, Resampling.NEAREST)
    if not mask.point(lambda level: level >= 128).getbbox():
        raise UserError(f"--mask={args.mask} is black: nothing is to be painted")
    return mask


def _to_steps(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """How far the right and bottom sides are from multiples of 8."""
    return 0, 0, -size[0] % SIZE_STEP, -size[1] % SIZE_STEP
