"""Draws scenes: vectors at four times the size, averaged down, so that edges are smooth.

Legend: pictures are uint8 [128, 128, 3] (height, width, RGB); masks are bool [n, 128, 128].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import ceil, floor

import numpy as np
from PIL import Image, ImageDraw

from ldm_pipeline.data.world.scene import CANVAS, Background, Scene, Thing, sunset, tones
from ldm_pipeline.data.world.shapes import (
    CONTOUR,
    ROLES,
    Part,
    Tones,
    contour_colour,
    contour_width,
    paint,
    paint_on,
    shape,
)

FINE = 4  # supersampling along each axis
BAND = 16  # width of stripes and side of checks in pixels
STARS = 30
Ink = int | tuple[int, int, int]


def render(scene: Scene) -> np.ndarray:
    """The picture of a scene, uint8 [128, 128, 3]."""
    picture = _canvas(scene.background).copy()
    if scene.background.pattern == "starry night":
        _draw_stars(picture, scene)
    for thing in scene.things:
        draw_thing(picture, thing, scene.background)
    return np.asarray(picture).copy()


def masks(scene: Scene) -> np.ndarray:
    """For each thing the pixels of which it covers at least half, bool [n, 128, 128]."""
    out = np.zeros((len(scene.things), CANVAS, CANVAS), dtype=bool)
    for i, thing in enumerate(scene.things):
        left, top, right, bottom = _crop_box(thing)
        stencil = Image.new("L", ((right - left) * FINE, (bottom - top) * FINE), 0)
        draw_parts(ImageDraw.Draw(stencil), thing, left, top, _outside)
        out[i, top:bottom, left:right] = np.asarray(stencil.reduce(FINE)) >= 128
    return out


def roles_at(thing: Thing, side: int) -> np.ndarray:
    """What a thing shows at the middles of side x side squares of the canvas, uint8 [side, side]:
    0 where it is not, else 1 + the number of the paint's role in `ROLES`."""
    left, top, right, bottom = _crop_box(thing)
    stencil = Image.new("L", ((right - left) * FINE, (bottom - top) * FINE), 0)
    draw_parts(ImageDraw.Draw(stencil), thing, left, top, lambda part: 1 + ROLES.index(_role(part)))
    middles = (np.arange(side) + 0.5) * CANVAS / side
    columns = np.nonzero((middles >= left) & (middles < right))[0]
    rows = np.nonzero((middles >= top) & (middles < bottom))[0]
    x = ((middles[columns] - left) * FINE).astype(int)
    y = ((middles[rows] - top) * FINE).astype(int)
    out = np.zeros((side, side), dtype=np.uint8)
    out[np.ix_(rows, columns)] = np.asarray(stencil)[np.ix_(y, x)]
    return out


def _role(part: Part | None) -> str:
    return CONTOUR if part is None else part.paint


@cache
def backdrop(background: Background) -> np.ndarray:
    """The background alone, uint8 [128, 128, 3]; a starry night comes without its stars."""
    rows, columns = np.mgrid[0:CANVAS, 0:CANVAS]
    palette = np.asarray(tones(background), dtype=np.uint8)
    if background.pattern == "sunset":
        lines = np.asarray([sunset(y / (CANVAS - 1)) for y in range(CANVAS)], dtype=np.uint8)
        return np.repeat(lines[:, None], CANVAS, axis=1)
    if background.pattern == "stripes":
        return palette[(columns // BAND) % 2]
    if background.pattern == "checks":
        return palette[(columns // BAND + rows // BAND) % 2]
    return np.broadcast_to(palette[0], (CANVAS, CANVAS, 3)).copy()


@cache
def _canvas(background: Background) -> Image.Image:
    return Image.fromarray(backdrop(background))


def _draw_stars(picture: Image.Image, scene: Scene) -> None:
    """Small dots that keep clear of one another and of the things."""
    rng = np.random.default_rng(scene.stars)
    draws = rng.random((STARS, 4))
    kept: list[tuple[float, float]] = []
    for u, v, w, hue in draws.tolist():
        x, y, radius = 3 + u * (CANVAS - 6), 3 + v * (CANVAS - 6), 1.1 + 0.8 * w
        clear = all(max(abs(x - t.x), abs(y - t.y)) > t.radius + radius + 3 for t in scene.things)
        if not clear or any(max(abs(x - p), abs(y - q)) < 9 for p, q in kept):
            continue
        kept.append((x, y))
        left, top = floor(x - 3), floor(y - 3)
        box = (max(left, 0), max(top, 0), min(left + 7, CANVAS), min(top + 7, CANVAS))
        fine = _enlarge(picture, box)
        cx, cy, r = (x - box[0]) * FINE, (y - box[1]) * FINE, radius * FINE
        fill = (255, 250, 225) if hue < 0.6 else (255, 232, 130)
        ImageDraw.Draw(fine).ellipse((cx - r, cy - r, cx + r, cy + r), fill=fill)
        picture.paste(fine.reduce(FINE), box[:2])


def draw_thing(picture: Image.Image, thing: Thing, background: Background) -> None:
    """Draws a thing onto a picture [128, 128]; its contour stands out from this background."""
    box = _crop_box(thing)
    fine = _enlarge(picture, box)
    ink = palette(thing.colour, tones(background))
    draw_parts(ImageDraw.Draw(fine), thing, box[0], box[1], ink)
    picture.paste(fine.reduce(FINE), box[:2])


def _outside(part: Part | None) -> Ink | None:
    return 255 if part is None or part.silhouette else None


def _enlarge(picture: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    size = ((box[2] - box[0]) * FINE, (box[3] - box[1]) * FINE)
    return picture.resize(size, Image.Resampling.NEAREST, box=box)


def _crop_box(thing: Thing) -> tuple[int, int, int, int]:
    reach = thing.radius + 1
    return (
        max(floor(thing.x - reach), 0),
        max(floor(thing.y - reach), 0),
        min(ceil(thing.x + reach), CANVAS),
        min(ceil(thing.y + reach), CANVAS),
    )


def draw_parts(
    draw: ImageDraw.ImageDraw,
    thing: Thing,
    left: int,
    top: int,
    ink: Callable[[Part | None], Ink | None],
) -> None:
    """Draws a thing at FINE times the size on a crop that starts at (left, top) of the canvas.

    `ink(part)` says with what each part is filled (None: it is left out), `ink(None)` with what
    the contour of an outlined thing is drawn, below all parts.
    """
    outlined = thing.style == "outlined"
    contour = contour_width(thing.size) if outlined else 0.0
    scale = (thing.radius - contour) * FINE
    # Pillow counts from pixel centres, hence the half.
    shift = np.array([(thing.x - left) * FINE - 0.5, (thing.y - top) * FINE - 0.5])
    parts = shape(thing.kind, thing.tilt)
    placed = [part.points * scale + shift for part in parts]
    edge = ink(None)
    if outlined and edge is not None:
        reach = contour * FINE
        for part, points in zip(parts, placed, strict=True):
            if part.silhouette:
                path = [*points.ravel().tolist(), *points[0].tolist()]
                draw.line(path, fill=edge, width=round(2 * reach))
                for x, y in points.tolist():  # round joins
                    draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=edge)
    for part, points in zip(parts, placed, strict=True):
        fill = ink(part)
        if fill is not None:
            draw.polygon(points.ravel().tolist(), fill=fill)


def palette(colour: str, around: Tones) -> Callable[[Part | None], Ink]:
    """The paints of a thing of this colour over a background of these tones."""

    def ink(part: Part | None) -> Ink:
        if part is None:
            return contour_colour(colour, around)
        if part.silhouette:
            return paint_on(part.paint, colour, around)
        return paint(part.paint, colour)

    return ink
