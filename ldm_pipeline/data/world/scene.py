"""What a picture of the world holds: things on a background, their rules and how scenes are drawn.

Legend: positions and radii are in pixels of the 128 x 128 canvas, x to the right, y downwards.
`radius` is half the longer side of a thing's upright bounding box, contour included. `rng` is a
`numpy.random.Generator`; the same generator state always gives the same scene.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TypeVar

import numpy as np

CANVAS = 128
MARGIN = 2.0  # least distance of a thing's box from the border
GAP = 5.0  # least distance between the boxes of two things

KINDS: tuple[str, ...] = (
    "circle", "square", "triangle", "star", "heart", "ring", "cross", "hexagon", "diamond",
    "arrow", "crescent moon", "house", "tree", "flower", "fish", "boat", "mushroom", "cloud",
    "sun", "smiley face", "umbrella", "cat's face", "car", "butterfly", "apple", "crown", "mug",
    "rocket",
)  # fmt: skip
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 36, 40),
    "orange": (250, 138, 20),
    "yellow": (252, 222, 40),
    "green": (46, 156, 60),
    "blue": (38, 82, 216),
    "purple": (132, 48, 172),
    "pink": (252, 152, 196),
    "brown": (124, 74, 36),
    "black": (24, 24, 28),
    "white": (250, 250, 250),
    "gray": (136, 138, 142),
    "turquoise": (48, 204, 198),
}
SIZES = ("small", "medium", "large")
RADII = {"small": 14.0, "medium": 22.0, "large": 33.0}
SIZE_JITTER = 0.06
STYLES = ("flat", "outlined")
PATTERNS = ("plain", "stripes", "checks", "sunset", "starry night")
COLOURED_PATTERNS = ("plain", "stripes", "checks")
PLACES = (
    "top left corner", "top", "top right corner", "left", "centre", "right",
    "bottom left corner", "bottom", "bottom right corner",
)  # fmt: skip
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
CASES = ("single", "related pair", "pair", "count", "several", "empty")
_CASE_WEIGHTS = (0.35, 0.30, 0.08, 0.17, 0.08, 0.02)

# The (kind, colour) pairs that no training picture shows: 17 of 336, one colour of 17 kinds, every
# colour once or twice. They measure composition: the model knows both words, never together.
_HELD_OUT = {
    "circle": "turquoise", "square": "brown", "triangle": "pink", "star": "purple",
    "heart": "green", "ring": "gray", "hexagon": "orange", "crescent moon": "red",
    "tree": "pink", "flower": "black", "fish": "white", "mushroom": "blue", "cloud": "yellow",
    "umbrella": "orange", "cat's face": "purple", "car": "turquoise", "crown": "green",
}  # fmt: skip

# The gradient of the sunset, (height from 0 at the top to 1 at the bottom, colour).
SUNSET = ((0.0, (88, 62, 140)), (0.5, (232, 108, 84)), (1.0, (255, 204, 96)))
NIGHT = (22, 28, 88)
_TOO_CLOSE = 82.0  # least distance in RGB of a thing's colour from every tone of the background
_NEVER_ON = {
    "sunset": {"orange", "pink", "red", "purple"},
    "starry night": {"black", "blue", "purple"},
}

T = TypeVar("T")


@dataclass(frozen=True)
class Thing:
    """One thing: what it is, its look, the centre of its box, and its tilt in whole degrees."""

    kind: str
    colour: str
    size: str
    style: str
    x: float
    y: float
    radius: float
    tilt: float = 0.0


@dataclass(frozen=True)
class Background:
    """A pattern and its colour; sunset and starry night have their own colours (None)."""

    pattern: str
    colour: str | None


@dataclass(frozen=True)
class Scene:
    """The truth of a picture; `stars` varies where the stars of a starry night stand."""

    background: Background
    things: tuple[Thing, ...]
    stars: int = 0


def held_out_pair(kind: str, colour: str) -> bool:
    """Whether no training picture shows this kind in this colour (a fixed 5 % of all pairs)."""
    return _HELD_OUT.get(kind) == colour


HELD_OUT_PAIRS: tuple[tuple[str, str], ...] = tuple(_HELD_OUT.items())


def mix(a: Sequence[float], b: Sequence[float], share: float) -> tuple[int, int, int]:
    """The colour that lies `share` of the way from `a` to `b`, rounded to whole levels."""
    red, green, blue = (round(p + (q - p) * share) for p, q in zip(a, b, strict=True))
    return red, green, blue


def distance(a: Sequence[float], b: Sequence[float]) -> float:
    """Euclidean distance of two RGB colours, 0 to 441."""
    return float(sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) ** 0.5)


@cache
def tones(background: Background) -> tuple[tuple[int, int, int], ...]:
    """The tones that a background is made of: one, two, or samples along the sunset."""
    if background.pattern == "sunset":
        return tuple(sunset(step / 16) for step in range(17))
    if background.pattern == "starry night":
        return (NIGHT,)
    assert background.colour is not None, "only sunset and starry night have no colour"
    colour = COLOURS[background.colour]
    if background.pattern == "plain":
        return (colour,)
    if background.colour == "black":
        return mix(colour, (255, 255, 255), 0.18), colour
    if background.colour == "white":
        return colour, mix(colour, (0, 0, 0), 0.16)
    return mix(colour, (255, 255, 255), 0.26), mix(colour, (0, 0, 0), 0.10)


def sunset(height: float) -> tuple[int, int, int]:
    """The sunset's colour at `height`, 0 at the top of the picture and 1 at the bottom."""
    for (low, first), (high, second) in pairwise(SUNSET):
        if height <= high:
            return mix(first, second, (height - low) / (high - low))
    return SUNSET[-1][1]


@cache
def stands_out(colour: str, background: Background) -> bool:
    """Whether a thing of this colour is clearly visible everywhere on the background."""
    if colour == background.colour or colour in _NEVER_ON.get(background.pattern, ()):
        return False
    return all(distance(COLOURS[colour], tone) >= _TOO_CLOSE for tone in tones(background))


def place_of(x: float, y: float) -> str | None:
    """The place that a centre clearly has, or None between two places."""
    column, row = _third(x), _third(y)
    return None if column is None or row is None else PLACES[3 * row + column]


def _third(position: float) -> int | None:
    for index, (low, high) in enumerate(_THIRDS):
        if low <= position <= high:
            return index
    return None


_THIRDS = ((0.0, 46.0), (52.0, 76.0), (82.0, 128.0))


def relation_of(a: Thing, b: Thing) -> str | None:
    """How `a` clearly stands to `b`, or None where they stand askew."""
    dx, dy = b.x - a.x, b.y - a.y
    if abs(dy) <= _ASKEW * abs(dx):
        return "left of" if dx > 0 else "right of"
    if abs(dx) <= _ASKEW * abs(dy):
        return "above" if dy > 0 else "below"
    return None


_ASKEW = 0.36  # largest distance across the axis of a relation, as a share of that along it


def apart(a: Thing, b: Thing) -> bool:
    """Whether the boxes of two things keep the least gap."""
    return max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius + GAP


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of the options, all equally likely."""
    return options[int(rng.random() * len(options))]


def pick_weighted(rng: np.random.Generator, options: Sequence[T], weights: Sequence[float]) -> T:
    """One of the options, with chances in proportion to the weights."""
    point = rng.random() * sum(weights)
    for option, weight in zip(options, weights, strict=True):
        point -= weight
        if point < 0:
            return option
    return options[-1]


def sample_scene(
    rng: np.random.Generator,
    *,
    case: str | None = None,
    allowed: Callable[[str, str], bool] | None = None,
    first: tuple[str, str] | None = None,
) -> Scene:
    """A random scene that keeps the world's rules.

    `case` is one of CASES (None: drawn in the world's mix); `allowed(kind, colour)` says which
    pairs may appear; `first` fixes the first thing's pair.
    """
    while True:
        chosen = case or pick_weighted(rng, CASES, _CASE_WEIGHTS)
        things = _LAYOUTS[chosen](rng, _Look(rng, allowed, first))
        background = _sample_background(rng, {thing.colour for thing in things})
        if background is not None:
            return Scene(background, things, stars=int(rng.random() * 1_000_000))


@dataclass
class _Look:
    """Draws kinds and colours under the caller's limits."""

    rng: np.random.Generator
    allowed: Callable[[str, str], bool] | None
    first: tuple[str, str] | None

    def pairs(self, n: int, distinct_kinds: bool) -> list[tuple[str, str]]:
        """`n` different (kind, colour) pairs; the kinds differ too where asked."""
        found: list[tuple[str, str]] = [self.first] if self.first is not None else []
        while len(found) < n:
            pair = (pick(self.rng, KINDS), pick(self.rng, tuple(COLOURS)))
            if self.allowed is not None and not self.allowed(*pair):
                continue
            if pair in found or (distinct_kinds and any(pair[0] == kind for kind, _ in found)):
                continue
            # Things of one colour do occur, but mostly the colours differ, as words need telling.
            if any(pair[1] == colour for _, colour in found) and self.rng.random() < 0.6:
                continue
            found.append(pair)
        return found

    def style(self) -> str:
        return "outlined" if self.rng.random() < 0.4 else "flat"

    def tilt(self) -> float:
        return 0.0 if self.rng.random() < 0.5 else float(int(self.rng.random() * 17) - 8)

    def radius(self, size: str) -> float:
        return RADII[size] * (1 + SIZE_JITTER * (2 * self.rng.random() - 1))

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.rng.random()


def _thing(look: _Look, pair: tuple[str, str], size: str, x: float, y: float, radius: float,
           style: str) -> Thing:  # fmt: skip
    return Thing(pair[0], pair[1], size, style, round(x, 2), round(y, 2), round(radius, 2),
                 look.tilt())  # fmt: skip


def _single(rng: np.random.Generator, look: _Look) -> tuple[Thing, ...]:
    size = pick_weighted(rng, SIZES, (0.3, 0.38, 0.32))
    radius = look.radius(size)
    low, high = MARGIN + radius + 0.01, CANVAS - MARGIN - radius - 0.01
    if rng.random() < 0.75:  # clearly at one of the nine places
        spans = [_THIRDS[int(rng.random() * 3)] for _ in "xy"]
        x, y = (look.between(max(a, low), min(b, high)) for a, b in spans)
    else:
        x, y = look.between(low, high), look.between(low, high)
    return (_thing(look, look.pairs(1, False)[0], size, x, y, radius, look.style()),)


def _related_pair(rng: np.random.Generator, look: _Look) -> tuple[Thing, ...]:
    sizes = pick_weighted(
        rng,
        (("small", "small"), ("small", "medium"), ("medium", "medium"), ("small", "large"),
         ("medium", "large")),
        (0.22, 0.3, 0.28, 0.12, 0.08),
    )  # fmt: skip
    if rng.random() < 0.5:
        sizes = (sizes[1], sizes[0])
    radii = [look.radius(size) for size in sizes]
    slack = CANVAS - 2 * MARGIN - 2 * sum(radii) - GAP - 0.1
    cuts = sorted((rng.random(), rng.random()))
    along = [
        MARGIN + radii[0] + cuts[0] * slack + 0.05,
        CANVAS - MARGIN - radii[1] - (1 - cuts[1]) * slack - 0.05,
    ]
    low = [MARGIN + radius + 0.01 for radius in radii]
    high = [CANVAS - MARGIN - radius - 0.01 for radius in radii]
    big = 0 if radii[0] >= radii[1] else 1  # the bigger one has less room: it is placed first
    across = [0.0, 0.0]
    across[big] = look.between(low[big], high[big])
    reach = (_ASKEW - 0.04) * (along[1] - along[0])
    other = 1 - big
    across[other] = look.between(
        max(low[other], across[big] - reach), min(high[other], across[big] + reach)
    )
    ends = [0, 1]
    if rng.random() < 0.5:  # which of the two stands first in the picture
        ends = [1, 0]
    upright = rng.random() < 0.5
    pairs = look.pairs(2, distinct_kinds=rng.random() < 0.88)
    things = []
    for pair, end in zip(pairs, ends, strict=True):
        x, y = (across[end], along[end]) if upright else (along[end], across[end])
        things.append(_thing(look, pair, sizes[end], x, y, radii[end], look.style()))
    return tuple(things)


def _scatter(rng: np.random.Generator, look: _Look, pairs: list[tuple[str, str]],
             sizes: Sequence[str], style: str | None) -> tuple[Thing, ...] | None:  # fmt: skip
    """Things at random free spots, or None where no spots were found."""
    found: list[Thing] = []
    for pair, size in zip(pairs, sizes, strict=True):
        radius = look.radius(size)
        low, high = MARGIN + radius + 0.01, CANVAS - MARGIN - radius - 0.01
        for _ in range(40):
            x, y = look.between(low, high), look.between(low, high)
            thing = Thing(*pair, size, style or look.style(), round(x, 2), round(y, 2),
                          round(radius, 2), look.tilt())  # fmt: skip
            if all(apart(thing, other) for other in found):
                found.append(thing)
                break
        else:
            return None
    return tuple(found)


def _pair(rng: np.random.Generator, look: _Look) -> tuple[Thing, ...]:
    pairs = look.pairs(2, distinct_kinds=rng.random() < 0.88)
    while True:
        sizes = [pick_weighted(rng, SIZES, (0.4, 0.5, 0.1)) for _ in pairs]
        things = _scatter(rng, look, pairs, sizes, None)
        if things is not None:
            return things


def _count(rng: np.random.Generator, look: _Look) -> tuple[Thing, ...]:
    n = pick_weighted(rng, (2, 3, 4), (0.34, 0.36, 0.30))
    pair = look.pairs(1, False)[0]
    style = look.style()
    while True:
        size = "medium" if rng.random() < (0.5, 0.4, 0.3)[n - 2] else "small"
        things = _scatter(rng, look, [pair] * n, [size] * n, style)
        if things is not None:
            return things


def _several(rng: np.random.Generator, look: _Look) -> tuple[Thing, ...]:
    n = 3 if rng.random() < 0.65 else 4
    pairs = look.pairs(n, distinct_kinds=True)
    while True:
        sizes = ["medium" if rng.random() < 0.35 else "small" for _ in pairs]
        things = _scatter(rng, look, pairs, sizes, None)
        if things is not None:
            return things


def _empty(rng: np.random.Generator, look: _Look) -> tuple[Thing, ...]:
    return ()


_LAYOUTS: dict[str, Callable[[np.random.Generator, _Look], tuple[Thing, ...]]] = {
    "single": _single,
    "related pair": _related_pair,
    "pair": _pair,
    "count": _count,
    "several": _several,
    "empty": _empty,
}


def _sample_background(rng: np.random.Generator, colours: set[str]) -> Background | None:
    """A background on which all the colours stand out, or None where a few tries found none."""
    for _ in range(24):
        pattern = pick_weighted(rng, PATTERNS, (0.56, 0.13, 0.13, 0.08, 0.10))
        named = pattern in COLOURED_PATTERNS
        background = Background(pattern, pick(rng, tuple(COLOURS)) if named else None)
        if all(stands_out(colour, background) for colour in colours):
            return background
    return None
