"""The vector shapes of the world's kinds: polygons with a paint each, in unit coordinates.

Legend: a shape is a tuple of `Part`s, drawn in order; points are [N, 2] (x to the right, y down).
Paints are roles, not colours: "main" is the thing's named colour, the others follow from it (see
`paint`). Parts with `silhouette` make up the outside, around which an outlined thing has its
contour; the others are details that lie within.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import cos, pi, sin

import numpy as np

from ldm_pipeline.data.world.scene import COLOURS, distance, mix

Point = tuple[float, float]
INK = (26, 24, 30)
CHALK = (250, 250, 250)
LEAD = (128, 128, 128)


@dataclass(frozen=True)
class Part:
    """One polygon: its points, the role of its paint, and whether it is part of the outside."""

    points: np.ndarray
    paint: str
    silhouette: bool = True


def _part(points: list[Point], paint: str = "main", silhouette: bool = True) -> Part:
    return Part(np.asarray(points, dtype=np.float64), paint, silhouette)


def _detail(points: list[Point], paint: str) -> Part:
    return _part(points, paint, silhouette=False)


def _arc(cx: float, cy: float, rx: float, ry: float, start: float, stop: float, n: int
         ) -> list[Point]:  # fmt: skip
    """Points of an ellipse's arc between two angles in degrees (0 right, 90 down)."""
    angles = [(start + (stop - start) * i / (n - 1)) * pi / 180 for i in range(n)]
    return [(cx + rx * cos(a), cy + ry * sin(a)) for a in angles]


def _oval(cx: float, cy: float, rx: float, ry: float | None = None, n: int = 32) -> list[Point]:
    return _arc(cx, cy, rx, rx if ry is None else ry, 0, 360 * (n - 1) / n, n)


def _box(left: float, top: float, right: float, bottom: float) -> list[Point]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _spikes(n: int, outer: float, inner: float) -> list[Point]:
    """A star polygon with `n` points, one of them straight up."""
    radii = (outer, inner)
    return [(radii[i % 2] * sin(pi * i / n), -radii[i % 2] * cos(pi * i / n)) for i in range(2 * n)]


def _band(cx: float, cy: float, outer: float, inner: float, start: float, stop: float
          ) -> list[Point]:  # fmt: skip
    """A piece of a ring between two angles in degrees."""
    n = max(8, round(44 * (stop - start) / 360))
    return _arc(cx, cy, outer, outer, start, stop, n) + _arc(cx, cy, inner, inner, stop, start, n)


def _heart() -> list[Point]:
    points = []
    for i in range(48):
        t = 2 * pi * i / 48
        y = 13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t)
        points.append((16 * sin(t) ** 3, -y))
    return points


def _rays(n: int, inner: float, outer: float, half_width: float) -> list[Part]:
    parts = []
    for i in range(n):
        a = 2 * pi * i / n
        c, s = cos(a), sin(a)
        corners = [(inner, -half_width), (outer, 0.0), (inner, half_width)]
        parts.append(_part([(u * c - v * s, u * s + v * c) for u, v in corners], "shade"))
    return parts


def _petals(n: int, ring: float, radius: float) -> list[Part]:
    turns = [2 * pi * i / n - pi / 2 for i in range(n)]
    return [_part(_oval(ring * cos(a), ring * sin(a), radius, n=24)) for a in turns]


def _make() -> dict[str, list[Part]]:
    main, detail = _part, _detail
    rocket = [(0.0, -1.0), (0.2, -0.78), (0.34, -0.5), (0.4, -0.15), (0.4, 0.3), (0.3, 0.62)]
    return {
        "circle": [main(_oval(0, 0, 1, n=48))],
        "square": [main(_box(-1, -1, 1, 1))],
        "triangle": [main([(0, -0.95), (1, 0.8), (-1, 0.8)])],
        "star": [main(_spikes(5, 1, 0.44))],
        "heart": [main(_heart())],
        "ring": [main(_band(0, 0, 1, 0.54, -4, 184)), main(_band(0, 0, 1, 0.54, 176, 364))],
        "cross": [main([(-0.36, -1), (0.36, -1), (0.36, -0.36), (1, -0.36), (1, 0.36),
                        (0.36, 0.36), (0.36, 1), (-0.36, 1), (-0.36, 0.36), (-1, 0.36),
                        (-1, -0.36), (-0.36, -0.36)])],
        "hexagon": [main([(cos(i * pi / 3), sin(i * pi / 3)) for i in range(6)])],
        "diamond": [main([(0, -1), (0.66, 0), (0, 1), (-0.66, 0)])],
        "arrow": [main([(-1, -0.3), (0.05, -0.3), (0.05, -0.8), (1, 0), (0.05, 0.8),
                        (0.05, 0.3), (-1, 0.3)])],
        "crescent moon": [main(_arc(0, 0, 1, 1, 52.4, 307.6, 36)
                               + _arc(0.5, 0, 0.8, 0.8, 277.9, 82.1, 30))],
        "house": [
            main(_box(-0.84, -0.42, 0.84, 1)),
            main([(-1, -0.38), (0, -1), (1, -0.38)], "shade"),
            detail(_box(-0.56, 0.3, -0.14, 1), "ink"),
            detail(_box(0.2, 0.12, 0.6, 0.52), "glass"),
        ],
        "tree": [
            main(_box(-0.17, 0.5, 0.17, 1), "wood"),
            main([(0, -0.25), (0.82, 0.62), (-0.82, 0.62)]),
            main([(0, -0.65), (0.66, 0.12), (-0.66, 0.12)]),
            main([(0, -1), (0.5, -0.36), (-0.5, -0.36)]),
        ],
        "flower": [
            *_petals(6, 0.62, 0.38),
            main(_oval(0, 0, 0.6)),
            detail(_oval(0, 0, 0.34), "heart"),
        ],
        "fish": [
            main([(0.35, 0), (1, -0.58), (0.86, 0), (1, 0.58)], "shade"),
            main(_oval(-0.2, 0, 0.8, 0.54)),
            detail([(-0.1, -0.02), (0.3, -0.2), (0.24, 0.24)], "shade"),
            detail(_oval(-0.6, -0.12, 0.13, n=16), "ink"),
        ],
        "boat": [
            main(_box(-0.1, -1, 0.06, 0.4), "wood"),
            main([(0.06, -0.95), (0.86, 0.22), (0.06, 0.22)]),
            main([(-0.1, -0.7), (-0.1, 0.22), (-0.76, 0.22)], "tint"),
            main([(-1, 0.36), (1, 0.36), (0.66, 0.96), (-0.66, 0.96)]),
        ],
        "mushroom": [
            main(_box(-0.27, 0, 0.27, 0.9), "cream"),
            main(_arc(0, 0.1, 1, 1, 180, 360, 30)),
            detail(_oval(-0.5, -0.25, 0.17, n=16), "tint"),
            detail(_oval(0.05, -0.56, 0.17, n=16), "tint"),
            detail(_oval(0.5, -0.2, 0.17, n=16), "tint"),
        ],
        "cloud": [
            main(_box(-0.62, 0.1, 0.62, 0.52)),
            main(_oval(-0.62, 0.16, 0.38)),
            main(_oval(-0.1, -0.12, 0.48)),
            main(_oval(0.38, -0.02, 0.36)),
            main(_oval(0.66, 0.2, 0.33)),
        ],
        "sun": [*_rays(8, 0.5, 1.0, 0.22), main(_oval(0, 0, 0.62))],
        "smiley face": [
            main(_oval(0, 0, 1, n=48)),
            detail(_oval(-0.36, -0.28, 0.15, 0.2, n=16), "ink"),
            detail(_oval(0.36, -0.28, 0.15, 0.2, n=16), "ink"),
            detail(_band(0, 0.06, 0.66, 0.46, 15, 165), "ink"),
        ],
        "umbrella": [
            main(_box(-0.08, -0.2, 0.08, 0.82), "ink"),
            main(_band(-0.17, 0.74, 0.25, 0.09, 0, 180), "ink"),
            main(_arc(0, 0, 1, 1, 180, 360, 32) + _arc(0.667, 0, 0.333, 0.16, 0, -180, 9)
                 + _arc(0, 0, 0.333, 0.16, 0, -180, 9) + _arc(-0.667, 0, 0.333, 0.16, 0, -180, 9)),
            detail([(-0.24, -0.12), (-0.22, -0.4), (-0.14, -0.75), (0, -0.99), (0.14, -0.75),
                    (0.22, -0.4), (0.24, -0.12), (0, -0.16)], "shade"),
        ],
        "cat's face": [
            main([(-0.92, 0.1), (-0.86, -1), (-0.1, -0.5)]),
            main([(0.92, 0.1), (0.86, -1), (0.1, -0.5)]),
            main(_oval(0, 0.16, 0.98, 0.76, n=40)),
            detail([(-0.72, -0.36), (-0.7, -0.72), (-0.42, -0.5)], "shade"),
            detail([(0.72, -0.36), (0.7, -0.72), (0.42, -0.5)], "shade"),
            detail(_oval(-0.4, 0.02, 0.14, 0.19, n=16), "ink"),
            detail(_oval(0.4, 0.02, 0.14, 0.19, n=16), "ink"),
            detail([(-0.2, 0.34), (0.2, 0.34), (0, 0.58)], "ink"),
        ],
        "car": [
            main([(-0.62, -0.04), (-0.36, -0.56), (0.36, -0.56), (0.66, -0.04)]),
            main([(-1, 0.02), (-0.9, -0.12), (0.86, -0.12), (1, 0.1), (1, 0.46), (-1, 0.46)]),
            detail([(-0.4, -0.08), (-0.25, -0.42), (-0.05, -0.42), (-0.05, -0.08)], "glass"),
            detail([(0.1, -0.08), (0.1, -0.42), (0.27, -0.42), (0.44, -0.08)], "glass"),
            main(_oval(-0.52, 0.46, 0.25, n=24), "tyre"),
            main(_oval(0.52, 0.46, 0.25, n=24), "tyre"),
        ],
        "butterfly": [
            main(_oval(-0.5, 0.46, 0.4, 0.4)),
            main(_oval(0.5, 0.46, 0.4, 0.4)),
            main(_oval(-0.55, -0.3, 0.48, 0.52)),
            main(_oval(0.55, -0.3, 0.48, 0.52)),
            detail(_oval(-0.6, -0.34, 0.2, n=16), "tint"),
            detail(_oval(0.6, -0.34, 0.2, n=16), "tint"),
            main(_oval(0, 0.05, 0.13, 0.8, n=24), "ink"),
        ],
        "apple": [
            main([(-0.08, -0.3), (-0.02, -0.95), (0.15, -0.95), (0.08, -0.3)], "wood"),
            main([(0.1, -0.6), (0.28, -0.88), (0.72, -0.94), (0.56, -0.64), (0.3, -0.52)], "leaf"),
            main(_oval(-0.3, 0.2, 0.6, 0.74)),
            main(_oval(0.3, 0.2, 0.6, 0.74)),
            detail(_oval(-0.42, -0.04, 0.13, 0.2, n=16), "tint"),
        ],
        "crown": [
            main([(-1, -0.62), (-0.48, 0), (0, -0.84), (0.48, 0), (1, -0.62), (0.84, 0.76),
                  (-0.84, 0.76)]),
            detail([(-0.9, 0.4), (0.9, 0.4), (0.84, 0.76), (-0.84, 0.76)], "shade"),
        ],
        "mug": [
            main(_band(0.42, 0.02, 0.58, 0.3, -90, 90)),
            main(_box(-0.9, -0.8, 0.46, 0.8)),
            detail(_box(-0.9, -0.8, 0.46, -0.56), "shade"),
        ],
        "rocket": [
            main([(-0.24, 0.5), (0.24, 0.5), (0, 1)], "flame"),
            main([(0.3, 0), (0.74, 0.36), (0.74, 0.8), (0.26, 0.5)], "shade"),
            main([(-0.3, 0), (-0.74, 0.36), (-0.74, 0.8), (-0.26, 0.5)], "shade"),
            main(rocket + [(-x, y) for x, y in reversed(rocket[1:])]),
            detail(_oval(0, -0.26, 0.19, n=20), "glass"),
        ],
    }  # fmt: skip


SHAPES = _make()
"""The parts of each kind, as they are told: neither centred nor scaled yet, see `shape`."""


CONTOUR = "contour"
ROLES = (CONTOUR, *sorted({part.paint for parts in SHAPES.values() for part in parts}))
"""What a point of a thing can be painted with: its contour, or one of its parts' paints."""


@cache
def shape(kind: str, tilt: float = 0.0) -> tuple[Part, ...]:
    """The parts of a kind, turned by `tilt` degrees clockwise, scaled so that the upright box of
    its outside is centred on 0 and its longer side is 2."""
    a = tilt * pi / 180
    turn = np.array([[cos(a), sin(a)], [-sin(a), cos(a)]])
    parts = [Part(part.points @ turn, part.paint, part.silhouette) for part in SHAPES[kind]]
    outside = np.concatenate([part.points for part in parts if part.silhouette])
    low, high = outside.min(0), outside.max(0)
    centre, half = (low + high) / 2, float((high - low).max()) / 2
    return tuple(Part((p.points - centre) / half, p.paint, p.silhouette) for p in parts)


@cache
def half_box(kind: str, tilt: float = 0.0) -> tuple[float, float]:
    """Half the width and half the height of a kind's upright box; the larger is 1."""
    outside = np.concatenate([part.points for part in shape(kind, tilt) if part.silhouette])
    half_width, half_height = outside.max(0)
    return float(half_width), float(half_height)


@cache
def paint(role: str, colour: str) -> tuple[int, int, int]:
    """The colour that a role has on a thing of the named colour."""
    base = COLOURS[colour]
    if role == "main":
        return base
    if role == "shade":
        return mix(base, (255, 255, 255), 0.3) if colour == "black" else mix(base, (0, 0, 0), 0.3)
    if role == "tint":
        if colour in ("white", "pink", "yellow"):
            return mix(base, (0, 0, 0), 0.28)
        return mix(base, (255, 255, 255), 0.65)
    if role == "ink":
        return (225, 225, 228) if colour == "black" else INK
    if role == "tyre":
        return (96, 96, 100) if colour == "black" else INK
    if role == "glass":
        return (150, 190, 222) if colour in ("white", "gray") else (214, 236, 248)
    if role == "heart":
        return (120, 70, 30) if colour in ("yellow", "orange", "white") else (255, 224, 60)
    fixed = {
        "wood": (120, 74, 38) if colour != "brown" else (78, 44, 20),
        "cream": (240, 218, 176),
        "leaf": (60, 150, 60) if colour != "green" else (28, 100, 40),
        "flame": (255, 170, 30) if colour not in ("orange", "yellow") else (214, 50, 40),
    }
    return fixed[role]


Tones = tuple[tuple[int, int, int], ...]


@cache
def paint_on(role: str, colour: str, around: Tones) -> tuple[int, int, int]:
    """The paint of a part of the outside: "main" where the role's own colour would be lost on the
    background's tones (a brown trunk on brown), so that the whole outline is always seen."""
    own = paint(role, colour)
    lost = any(distance(own, tone) < _LOST for tone in around)
    return paint("main", colour) if lost else own


_LOST = 64.0


def contour_width(size: str) -> float:
    """Width in pixels of an outlined thing's contour."""
    return 2.0 if size == "small" else 2.5


@cache
def contour_colour(colour: str, around: Tones) -> tuple[int, int, int]:
    """Dark, unless it would be lost on the thing or the background; then white, else mid gray."""
    for candidate in (INK, CHALK):
        if all(distance(candidate, other) >= 100 for other in (COLOURS[colour], *around)):
            return candidate
    return LEAD
