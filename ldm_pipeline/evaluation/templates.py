"""The world's shapes as the judge compares them: soft, on a grid, one layer for each paint.

Everything here is asked for `kinds`, the kinds that the judge knows: the world's own, or more.

Legend: a *grid* is a box resampled to SIDE x SIDE points with a narrow rim around it; N templates,
P = SIDE² points, R roles (the paints that a shape is made of, see `data.world.shapes`). What a
template looks like in a colour is linear in its layers: shares [P, R] times paints [R, 3].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ldm_pipeline.data.world.render import FINE, draw_parts, palette
from ldm_pipeline.data.world.scene import (
    COLOURS,
    KINDS,
    RADII,
    STYLES,
    Background,
    Thing,
    tones,
)
from ldm_pipeline.data.world.shapes import Part, contour_width, half_box

SIDE = 32  # points along each side of a grid
RIM = 0.08  # rim around the box, as a share of its sides
TILTS = (-8.0, -4.0, 0.0, 4.0, 8.0)
BLURS = (0.7, 1.4)  # pixels; templates are soft, as every decoded picture is, then softer still
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Templates:
    """All shapes of one size: what each is, the share of each role at each point of its grid
    [N, R, P], the share of the whole [N, P], log(width / height) [N], and which role is the
    named colour's [N]."""

    looks: tuple[tuple[str, str, float], ...]
    roles: tuple[tuple[Part | None, ...], ...]
    shares: np.ndarray
    whole: np.ndarray
    aspect: np.ndarray
    mains: np.ndarray


@cache
def templates_of(size: str, blur: float, kinds: tuple[str, ...] = KINDS) -> Templates:
    """The templates of one size, soft by `blur` pixels."""
    looks = tuple((kind, style, tilt) for kind in kinds for style in STYLES for tilt in TILTS)
    drawn = [_template(kind, style, tilt, size, blur) for kind, style, tilt in looks]
    most = max(len(roles) for roles, _, _ in drawn)
    shares = np.zeros((len(looks), most, SIDE * SIDE), dtype=np.float32)
    for i, (_, share, _) in enumerate(drawn):
        shares[i, : len(share)] = share
    aspect = np.array([aspect for _, _, aspect in drawn], dtype=np.float32)
    roles = tuple(each for each, _, _ in drawn)
    mains = np.array([_main_role(each) for each in roles])
    return Templates(looks, roles, shares, shares.sum(1), aspect, mains)


def _main_role(roles: tuple[Part | None, ...]) -> int:
    return next(i for i, part in enumerate(roles) if part is not None and part.paint == "main")


@cache
def _template(
    kind: str, style: str, tilt: float, size: str, blur: float
) -> tuple[tuple[Part | None, ...], np.ndarray, float]:
    """The roles of a shape, their shares on its grid [R, P], and log(width / height)."""
    radius = RADII[size]
    edge = contour_width(size) if style == "outlined" else 0.0
    pad = 8
    side = int(2 * radius) + 2 * pad
    thing = Thing(kind, "red", size, style, side / 2, side / 2, radius, tilt)
    roles: list[Part | None] = []
    codes: dict[tuple[str, bool], int] = {}

    def ink(part: Part | None) -> int:
        key = ("contour", True) if part is None else (part.paint, part.silhouette)
        if key not in codes and not (part is None and style == "flat"):
            codes[key] = len(roles) + 1
            roles.append(part)
        return codes.get(key, 0)

    plan = Image.new("L", (side * FINE, side * FINE), 0)
    draw_parts(ImageDraw.Draw(plan), thing, 0, 0, ink)
    wide, high = (half * (radius - edge) + edge for half in half_box(kind, tilt))
    box = (side / 2 - wide, side / 2 - high, side / 2 + wide, side / 2 + high)
    left, top, right, bottom = (FINE / 2 * at for at in rimmed(box))
    codemap = np.asarray(plan)
    shares = []
    for code in range(1, len(roles) + 1):
        layer = Image.fromarray(np.where(codemap == code, 255, 0).astype(np.uint8)).reduce(2)
        layer = layer.filter(ImageFilter.GaussianBlur(blur * FINE / 2))
        where = (left, top, right, bottom)
        grid = layer.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=where)
        shares.append(np.asarray(grid, dtype=np.float32).reshape(-1) / 255)
    return tuple(roles), np.stack(shares), float(np.log(wide / high))


def rimmed(box: Box) -> Box:
    wide, high = RIM * (box[2] - box[0]), RIM * (box[3] - box[1])
    return box[0] - wide, box[1] - high, box[2] + wide, box[3] + high


@cache
def paints_of(size: str, background: Background, kinds: tuple[str, ...] = KINDS) -> np.ndarray:
    """The colour of each role of each template in each colour, [N, colours, R, 3]."""
    templates = templates_of(size, BLURS[0], kinds)
    most = templates.shares.shape[1]
    out = np.zeros((len(templates.looks), len(COLOURS), most, 3), dtype=np.float32)
    for c, colour in enumerate(COLOURS):
        ink = palette(colour, tones(background))
        for n, roles in enumerate(templates.roles):
            out[n, c, : len(roles)] = [ink(part) for part in roles]
    return out
