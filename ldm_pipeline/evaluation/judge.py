"""Reads a picture of the world back into what it shows, and compares that with a description.

No trained network takes part. The background is the known backdrop that fits most pixels; what
differs from it falls into connected pieces; each piece is compared with the world's own shapes,
drawn into its box in every kind, style, tilt and likely colour. The judge knows the world's kinds
and background patterns; where it is asked to, also those of `data.world.concepts`.

Legend: pictures are uint8 [128, 128, 3]; boxes are (left, top, right, bottom) in pixels; a *grid*
is a box resampled to P points, N templates have R roles each (see `evaluation.templates`). A *loss*
is a mean squared RGB distance, each point's share of it limited.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations

import numpy as np
from PIL import Image, ImageFilter

from ldm_pipeline.data.world.captions import Description, Mention
from ldm_pipeline.data.world.concepts import BURST, CONCEPTS, backdrop
from ldm_pipeline.data.world.scene import (
    CANVAS,
    COLOURED_PATTERNS,
    COLOURS,
    KINDS,
    PATTERNS,
    PLACES,
    SIZES,
    Background,
    tones,
)
from ldm_pipeline.errors import UserError, choose
from ldm_pipeline.evaluation.pieces import LEAST_AREA, boxes, label
from ldm_pipeline.evaluation.templates import (
    BLURS,
    SIDE,
    Box,
    Templates,
    paints_of,
    rimmed,
    templates_of,
)

UNKNOWN = "unknown"
SURE = 0.94  # a piece is explained well enough to look no further
FOREGROUND = 38.0  # RGB distance from the backdrop; things keep at least 64
MISFIT = 42.0  # mean clipped RGB distance beyond which no backdrop is believed
CLEAR = 0.85  # explained well enough for a picture with sharp edges
ACCEPT = 0.70  # least share of a piece's contrast that its template must explain


@dataclass(frozen=True)
class Seen:
    """A thing read from a picture; `score` is the share of its contrast that is explained."""

    kind: str
    colour: str
    size: str
    style: str
    x: float
    y: float
    radius: float
    score: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows; no background (and no things) where none of the world's fits."""

    background: Background | None
    things: tuple[Seen, ...]


@dataclass(frozen=True)
class Verdict:
    """Which claims of a description a picture keeps; claims that were not made count as kept.

    `kinds`: the kinds seen are those told, each as often. `colours`: each kind has its own colour.
    `count`: as many things as told. `relation`, `place`, `size`, `style`: true of the things told.
    """

    kinds: bool
    colours: bool
    count: bool
    relation: bool
    place: bool
    size: bool
    style: bool
    background: bool

    @property
    def all(self) -> bool:
        """Whether every claim is kept."""
        return (self.kinds and self.colours and self.count and self.relation and self.place
                and self.size and self.style and self.background)  # fmt: skip


def read(
    picture: np.ndarray,
    kinds: tuple[str, ...] = KINDS,
    patterns: tuple[str, ...] = PATTERNS,
) -> Reading:
    """What a picture shows, in terms of the kinds and background patterns that are to be known.

    Raises `UserError` unless the picture is uint8 [128, 128, 3], the kinds are of the world or of
    its concepts, and the patterns are of the world or BURST.
    """
    for kind in kinds:
        choose("kind", kind, _EVERY_KIND)
    _check(picture)
    colours = picture.astype(np.float32)
    background = read_background(colours, patterns)
    if background is None:
        return Reading(None, ())
    behind, contrast = _difference(colours, background)
    sheets = _Sheets(picture, behind, contrast)
    found = (_identify(sheets, box, background, kinds) for box in boxes(contrast > FOREGROUND))
    return Reading(background, tuple(found))


def is_comic(picture: np.ndarray) -> bool:
    """Whether a picture (uint8 [128, 128, 3], else `UserError`) is in comic style: a burst fits
    what lies behind its things better than every background of the world. Outlines alone do not
    count, as ordinary pictures have them too."""
    _check(picture)
    background = read_background(picture.astype(np.float32), (*PATTERNS, BURST))
    return background is not None and background.pattern == BURST


_EVERY_KIND = (*KINDS, *(concept.kind for concept in CONCEPTS.values() if concept.kind))


def _check(picture: np.ndarray) -> None:
    if picture.shape != (CANVAS, CANVAS, 3) or picture.dtype != np.uint8:
        raise UserError(
            f"the judge reads uint8 pictures of shape ({CANVAS}, {CANVAS}, 3), not "
            f"{picture.dtype} {tuple(picture.shape)}"
        )


def agrees(reading: Reading, description: Description) -> Verdict:
    """Which claims of a description a reading keeps.

    Things are matched with mentions so that as many as possible have the kind and the colour told;
    relation, place, size and style are judged on the matched things, and are false where a thing
    that they are told of is missing.
    """
    told = [mention for mention in description.mentions for _ in range(mention.count)]
    matched = _match(reading.things, told)
    kinds = sorted(m.kind for m in told) == sorted(seen.kind for seen in reading.things)
    pairs = [(mention, seen) for mention, seen in zip(told, matched, strict=True)]
    relation = description.relation is None or (
        all(seen is not None for seen in matched[:2])
        and _stands(matched[0], matched[1]) == description.relation
    )
    return Verdict(
        kinds=kinds,
        colours=kinds and all(s is not None and _is_coloured(s, m) for m, s in pairs),
        count=len(told) == len(reading.things),
        relation=relation,
        place=all(m.place is None or (s is not None and _cell(s) == m.place) for m, s in pairs),
        size=all(m.size is None or (s is not None and s.size == m.size) for m, s in pairs),
        style=all(m.style is None or (s is not None and s.style == m.style) for m, s in pairs),
        background=description.background in (None, reading.background),
    )


def _is_coloured(seen: Seen, mention: Mention) -> bool:
    return mention.colour is None or seen.colour == mention.colour


def _match(things: Sequence[Seen], told: Sequence[Mention]) -> list[Seen | None]:
    """For each mention the thing it is about; None where no thing of that kind is left."""

    def worth(seen: Seen | None, mention: Mention) -> int:
        if seen is None or seen.kind != mention.kind:
            return 0
        return 2 + _is_coloured(seen, mention)

    # More things than the world ever shows are not worth all their orders.
    pool: list[Seen | None] = [*things[:6], *[None] * max(0, len(told) - len(things))]
    best: Sequence[Seen | None] = max(
        permutations(pool, len(told)),
        key=lambda order: sum(worth(s, m) for s, m in zip(order, told, strict=True)),
    )
    return [s if worth(s, m) else None for s, m in zip(best, told, strict=True)]


def _stands(a: Seen | None, b: Seen | None) -> str:
    """How `a` stands to `b`, along the axis on which they are farther apart."""
    assert a is not None, "the caller has both"
    assert b is not None, "the caller has both"
    dx, dy = b.x - a.x, b.y - a.y
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def _cell(seen: Seen) -> str:
    """The place whose ninth of the canvas holds the centre; the borders lie between the places."""
    column, row = (0 if at < 49 else 1 if at <= 79 else 2 for at in (seen.x, seen.y))
    return PLACES[3 * row + column]


# --- background


_TWO_TONED = ("stripes", "checks", BURST)


@cache
def _backdrops(patterns: tuple[str, ...]) -> tuple[tuple[Background, ...], np.ndarray]:
    """Every background of these patterns, and its pixels on a coarse lattice [n, points, 3]."""
    every = [
        Background(pattern, colour)
        for pattern in patterns
        for colour in (COLOURS if pattern in (*COLOURED_PATTERNS, BURST) else (None,))
    ]
    pixels = np.stack([_lattice(backdrop(background)) for background in every])
    return tuple(every), pixels.astype(np.float32)


def _lattice(picture: np.ndarray) -> np.ndarray:
    return picture[2::4, 2::4].reshape(-1, 3)


def read_background(picture: np.ndarray, patterns: tuple[str, ...] = PATTERNS) -> Background | None:
    """The background that fits float32 [128, 128, 3] best, or None where none comes near.

    Raises `UserError` for a pattern that is neither the world's nor BURST.
    """
    for pattern in patterns:
        choose("pattern", pattern, (*PATTERNS, BURST))
    every, pixels = _backdrops(patterns)
    away = np.linalg.norm(pixels - _lattice(picture), axis=2)
    misfit = np.minimum(away, 90.0).mean(1)
    best = int(misfit.argmin())
    return every[best] if misfit[best] < MISFIT else None


def _difference(picture: np.ndarray, background: Background) -> tuple[np.ndarray, np.ndarray]:
    """The backdrop, its tones moved to the picture's own, and each pixel's distance from it."""
    behind = backdrop(background).astype(np.float32)
    two = tones(background) if background.pattern in _TWO_TONED else ()
    groups = [(behind == tone).all(2) for tone in two] or [np.ones((CANVAS, CANVAS), dtype=bool)]
    moved = []
    for group in groups:
        residual = (picture - behind)[group]
        near = np.linalg.norm(residual, axis=1) < 60
        drift = np.median(residual[near], axis=0) if near.any() else np.zeros(3)
        behind[group] += np.clip(drift, -24, 24)
        moved.append(behind[group][0])
    away = np.linalg.norm(picture - behind, axis=2)
    if two:  # between the tones, along their soft edges, every mixture of the two is background
        along = moved[1] - moved[0]
        share = np.clip((picture - moved[0]) @ along / float(along @ along), 0, 1)[..., None]
        mixed = np.linalg.norm(picture - moved[0] - share * along, axis=2)
        away = np.where(_near_edges(groups[0]), np.minimum(mixed, away), away)
    return behind, away


def _near_edges(group: np.ndarray) -> np.ndarray:
    """Pixels within two of an edge between the tones."""
    out = np.zeros_like(group)
    for axis in (0, 1):
        for step in (-2, -1, 1, 2):
            out |= np.roll(group, step, axis) != group
    return out


# --- identification


_COLOURS = np.array(list(COLOURS.values()), dtype=np.float32)
_NAMES = tuple(COLOURS)


class _Sheets:
    """The picture, the backdrop and the contrast between them, to be resampled onto grids."""

    PAD = 24

    def __init__(self, picture: np.ndarray, behind: np.ndarray, contrast: np.ndarray) -> None:
        around = ((self.PAD, self.PAD), (self.PAD, self.PAD), (0, 0))
        levels = np.clip(behind + 0.5, 0, 255).astype(np.uint8)
        self.picture = Image.fromarray(np.pad(picture, around, mode="edge"))
        self.behind = Image.fromarray(np.pad(levels, around, mode="edge"))
        presence = np.clip(contrast / (1.6 * FOREGROUND), 0, 1) * 255
        self.presence = Image.fromarray(np.pad(presence.astype(np.uint8), self.PAD))
        self.contrast = contrast

    def tighter(self, box: Box) -> list[Box]:
        """Boxes of what stands out more clearly within a box, and of that without thin dots."""
        left, top, right, bottom = (int(at) for at in box)
        inside = self.contrast[top:bottom, left:right]
        clear = inside > max(FOREGROUND, 0.4 * float(np.percentile(inside, 90)))
        stencil = Image.fromarray(np.pad(clear, 3).astype(np.uint8) * 255)
        opened = stencil.filter(ImageFilter.MinFilter(5)).filter(ImageFilter.MaxFilter(5))
        found: list[Box] = []
        for mask in (clear, np.asarray(opened)[3:-3, 3:-3] > 0):
            pieces = label(mask)
            if pieces:
                piece = max(pieces, key=lambda piece: piece[4])
                tight = (left + piece[0], top + piece[1], left + piece[2], top + piece[3])
                if piece[4] >= LEAST_AREA and tight != box and tight not in found:
                    found.append(tight)
        return found

    def left_out(self, box: Box, part: Box) -> float:
        """The share of what a box shows that lies clearly outside one of its parts."""
        left, top, right, bottom = (int(at) for at in box)
        shown = self.contrast[top:bottom, left:right] > FOREGROUND
        near = (max(int(part[0]) - 1 - left, 0), max(int(part[1]) - 1 - top, 0))
        kept = shown[near[1] : int(part[3]) + 1 - top, near[0] : int(part[2]) + 1 - left]
        return 1 - float(kept.sum()) / max(float(shown.sum()), 1.0)

    def grid(self, sheet: Image.Image, box: Box) -> np.ndarray:
        """A box of a sheet as float32 [P, channels]."""
        left, top, right, bottom = (at + self.PAD for at in rimmed(box))
        where = (left, top, right, bottom)
        small = sheet.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=where)
        return np.asarray(small, dtype=np.float32).reshape(SIDE * SIDE, -1)


def _identify(sheets: _Sheets, box: Box, background: Background, kinds: tuple[str, ...]) -> Seen:
    """What stands in a box. Its edges are taken where the thing stands out clearly; where that
    is not explained well, at its faintest edges, a little beyond them, and without dots that
    touch it, too."""
    tight = sheets.tighter(box)
    best, sharp = None, True
    grown = (box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1)  # soft tips are lost to the eye
    for where in dict.fromkeys((*tight[:1], box, grown, *tight[1:])):
        if best is not None and where == grown and sharp and best.score >= CLEAR:
            break  # in a sharp picture the edges are where they seem to be
        for blur in BLURS:
            seen = _fit(sheets, where, background, blur, kinds)
            seen = replace(seen, score=seen.score - sheets.left_out(box, where))
            if best is None or seen.score > best.score:
                best, sharp = seen, blur == BLURS[0]
            if best.score >= SURE:
                return best
    assert best is not None, "the box itself is always tried"
    return best if best.score >= ACCEPT else replace(best, kind=UNKNOWN)


def _fit(
    sheets: _Sheets, box: Box, background: Background, blur: float, kinds: tuple[str, ...]
) -> Seen:
    """The template and colour that explain a box best."""
    wide, high = box[2] - box[0], box[3] - box[1]
    size = _size_of(max(wide, high) / 2)
    templates = templates_of(size, blur, kinds)
    paints = paints_of(size, background, kinds)
    presence = sheets.grid(sheets.presence, box)[:, 0] / 255
    unlike = ((templates.whole - presence) ** 2).mean(1) + _askew(templates.aspect, box)
    few = np.argsort(unlike)[:70]
    seen, behind = sheets.grid(sheets.picture, box), sheets.grid(sheets.behind, box)
    # The likely colours of each template: nearest to what stands where its named colour should.
    weight = templates.shares[few, templates.mains[few]] ** 4
    mean = weight @ seen / weight.sum(1, keepdims=True)
    order = np.linalg.norm(mean[:, None] - _COLOURS, axis=2).argsort(1)[:, :2]
    candidates = []
    for rank in (0, 1):
        losses = _losses(templates.shares[few], templates.whole[few],
                         paints[few, order[:, rank]], seen, behind)  # fmt: skip
        losses = losses + _askew(templates.aspect[few], box) * _ASKEW_COST
        candidates += [(float(loss), int(n), int(c))
                       for loss, n, c in zip(losses, few, order[:, rank], strict=True)]  # fmt: skip
    candidates.sort()
    best = (np.inf, -1, -1, box)
    tried: set[tuple[str, str, int]] = set()
    for loss, n, c in candidates:
        kind, style, _ = templates.looks[n]
        if (kind, style, c) in tried or loss > candidates[0][0] * 2 + 200:
            continue
        tried.add((kind, style, c))
        refined = _refine(sheets, templates, n, paints[n, c], box)
        if refined[0] < best[0]:
            best = (refined[0], n, c, refined[1])
        if len(tried) == 6:
            break
    loss, n, c, box = best
    energy = float(_clipped(sheets.grid(sheets.picture, box), sheets.grid(sheets.behind, box)))
    score = 1 - loss / max(energy, 1.0)
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    radius = max(box[2] - box[0], box[3] - box[1]) / 2
    kind, style, _ = templates.looks[n]
    return Seen(kind, _NAMES[c], _size_of(radius), style, x, y, radius, score)


_ASKEW_COST = 2500.0
_CLIP = 110.0**2  # squared RGB distance: a wrong point is wrong, however wrong it is


def _size_of(radius: float) -> str:
    return SIZES[0] if radius < 18 else SIZES[1] if radius < 27.5 else SIZES[2]


def _askew(aspect: np.ndarray, box: Box) -> np.ndarray:
    """How badly a box's proportions fit; a pixel at the edges is forgiven."""
    wide, high = box[2] - box[0], box[3] - box[1]
    slack = 1.2 / min(wide, high)
    off = np.maximum(np.abs(np.log(wide / high) - aspect) - slack, 0)
    return off**2 * 4


def _losses(shares: np.ndarray, whole: np.ndarray, paints: np.ndarray, seen: np.ndarray,
            behind: np.ndarray) -> np.ndarray:  # fmt: skip
    """Mean clipped squared RGB distance between templates and what is seen, [N]."""
    drawn = np.matmul(shares.transpose(0, 2, 1), paints) + (1 - whole)[..., None] * behind
    return np.minimum(((drawn - seen) ** 2).sum(2), _CLIP).mean(1)


def _clipped(a: np.ndarray, b: np.ndarray) -> np.floating:
    return np.minimum(((a - b) ** 2).sum(1), _CLIP).mean()


def _refine(sheets: _Sheets, templates: Templates, n: int, paints: np.ndarray, box: Box
            ) -> tuple[float, Box]:  # fmt: skip
    """The least loss of one template when the edges of its box may move a little, and that box."""
    shares, empty = templates.shares[n].T, (1 - templates.whole[n])[:, None]
    inside = shares @ paints
    aspect = templates.aspect[n : n + 1]

    def loss(where: Box) -> float:
        drawn = inside + empty * sheets.grid(sheets.behind, where)
        off = float(_clipped(drawn, sheets.grid(sheets.picture, where)))
        return off + float(_askew(aspect, where)[0]) * _ASKEW_COST

    best = (loss(box), box)
    for step in (1.0, 0.5):
        for side in range(4):
            for move in (-step, step):
                trial = list(best[1])
                trial[side] += move
                if (value := loss((trial[0], trial[1], trial[2], trial[3]))) < best[0]:
                    best = (value, (trial[0], trial[1], trial[2], trial[3]))
                    break
    return best
