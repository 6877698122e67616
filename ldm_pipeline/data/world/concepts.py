"""Two concepts that the world never shows, to teach a model something new: a kind and a style.

"cactus" is a kind of thing, drawn and worded like the others. "comic" is a style of whole pictures:
the plain background bursts into rays of its two tones, and every thing is outlined.

What a training folder shows and what evaluation asks for share no colour, place or company (see
`TRAINING` and `EVALUATION`): a model that draws the concept for `concept_prompts` has learnt the
concept, not the pictures. The *subject* is the thing of the new kind, or the first thing of a
picture in the new style; it is never small, as eight-fold autoencoders lose small new outlines.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from math import cos, pi, sin
from pathlib import Path

import numpy as np
from PIL import Image

from ldm_pipeline.data.world.captions import Description, describe, phrase
from ldm_pipeline.data.world.render import FINE, draw_thing, render
from ldm_pipeline.data.world.render import backdrop as world_backdrop
from ldm_pipeline.data.world.scene import (
    CANVAS,
    COLOURS,
    KINDS,
    PLACES,
    Background,
    Scene,
    held_out_pair,
    pick,
    place_of,
    sample_scene,
    stands_out,
    tones,
)
from ldm_pipeline.data.world.shapes import SHAPES, Part, Point
from ldm_pipeline.data.world.words import PLURAL, SINGULAR
from ldm_pipeline.data.world.world import Sample, write_samples
from ldm_pipeline.errors import UserError, choose

BURST = "burst"  # the pattern of a comic background
RAYS = 12  # light and dark together
STYLE_FORMS = ("{rest} in comic style", "{rest}, in comic style", "in comic style, {rest}")


@dataclass(frozen=True)
class Concept:
    """Something new: a kind of thing, or else (no kind) a style of whole pictures."""

    name: str
    kind: str | None = None


CONCEPTS = {
    concept.name: concept for concept in (Concept("cactus", kind="cactus"), Concept("comic"))
}


@dataclass(frozen=True)
class Side:
    """What pictures may show: the colours of things and backgrounds, the subject's places, and the
    kinds that keep a new kind company or appear in a new style."""

    colours: tuple[str, ...]
    places: tuple[str, ...]
    company: tuple[str, ...]


def _without(every: Iterable[str], taken: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(each for each in every if each not in taken)


TRAINING = Side(
    colours=("red", "yellow", "green", "purple", "brown", "black", "white"),
    places=("top left corner", "top", "centre", "right", "bottom left corner",
            "bottom right corner"),
    company=KINDS[::2],
)  # fmt: skip
"""What training folders show. Every row and column of the canvas is among the places."""
EVALUATION = Side(
    colours=_without(COLOURS, TRAINING.colours),
    places=_without(PLACES, TRAINING.places),
    company=_without(KINDS, TRAINING.company),
)
"""What evaluation asks for: everything else."""


def concept_sample(name: str, index: int, seed: int = 0) -> Sample:
    """Sample `index` (0 without end) of a concept's training set, fixed by its arguments alone.

    Its picture is uint8 [128, 128, 3]; a scene in comic style keeps its background's plain name.
    Raises `UserError` for an unknown concept or a negative seed or index.
    """
    return _sample(concept_named(name), TRAINING, index, seed)


def concept_prompts(name: str, n: int, seed: int = 0) -> tuple[Sample, ...]:
    """`n` prompts (their captions) of a concept with their truth: descriptions, scenes, pictures.

    Every thing and background has a colour, every subject a place and company that no training
    sample has; the colour is always told, and the place of a thing that is alone.
    Raises `UserError` for an unknown concept, a negative seed or n < 1.
    """
    concept = concept_named(name)
    _at_least("n", n, 1)
    return tuple(_sample(concept, EVALUATION, index, seed) for index in range(n))


def concept_named(name: str) -> Concept:
    """The concept of this name. Raises `UserError` where there is none."""
    return CONCEPTS[choose("concept", name, CONCEPTS)]


def write_concept(out: str | Path, name: str, n: int, seed: int = 0) -> Path:
    """Writes `n` training samples of a concept as an image folder: 000000.png … and
    `metadata.jsonl`, whose lines hold "file_name", "text", the truth as "scene", and "concept".

    Returns the folder. Raises `UserError` for an unknown concept, a negative seed or n < 1.
    """
    concept_named(name)
    _at_least("n", n, 1)
    _at_least("seed", seed, 0)
    samples = (concept_sample(name, index, seed) for index in range(n))
    return write_samples(out, samples, n, {"concept": name})


# --- pictures


def comic(scene: Scene) -> np.ndarray:
    """The picture of a scene on a plain background in comic style, uint8 [128, 128, 3]."""
    assert scene.background.pattern == "plain", "only a plain background bursts into rays"
    behind = burst_of(scene.background)
    picture = Image.fromarray(backdrop(behind))
    for thing in scene.things:
        draw_thing(picture, replace(thing, style="outlined"), behind)
    return np.asarray(picture).copy()


def burst_of(background: Background) -> Background:
    """What a plain background is in comic style."""
    return Background(BURST, background.colour)


@cache
def backdrop(background: Background) -> np.ndarray:
    """A background alone, the world's or a burst, uint8 [128, 128, 3]."""
    if background.pattern != BURST:
        return world_backdrop(background)
    light, dark = (np.asarray(tone, dtype=np.float64) for tone in tones(background))
    return np.rint(dark + _rays()[..., None] * (light - dark)).astype(np.uint8)


def _rays() -> np.ndarray:
    """The share of each pixel that lies in a light ray from the centre, [128, 128]."""
    fine = CANVAS * FINE
    at = (np.arange(fine) + 0.5) / fine - 0.5
    turns = np.arctan2(at[:, None], at[None, :]) / (2 * pi)
    light = np.floor(turns * RAYS) % 2 == 0
    return light.reshape(CANVAS, FINE, CANVAS, FINE).mean((1, 3))


# --- scenes and captions


def _at_least(what: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{what}={value} must be {least} or more")


def _sample(concept: Concept, side: Side, index: int, seed: int) -> Sample:
    _at_least("index", index, 0)
    _at_least("seed", seed, 0)
    key = [seed, list(CONCEPTS).index(concept.name), int(side is EVALUATION), index]
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
    # The subject's colours take turns, so that a small folder shows each of them; and two pictures
    # in three show it in company: what is mostly alone is learnt as a property of whole pictures.
    colour = side.colours[index % len(side.colours)]
    if side is EVALUATION:
        case = pick(rng, ("single", "related pair"))
    else:
        case = "related pair" if index % 3 else "single"
    scene = _scene(concept, side, colour, case, rng)
    description = _description(scene, rng, place_told=side is EVALUATION)
    if concept.kind is not None:
        return Sample(render(scene), phrase(description, rng), description, scene, index)
    # Every thing is outlined in this style: no caption says so.
    description = replace(
        description, mentions=tuple(replace(m, style=None) for m in description.mentions)
    )
    caption = pick(rng, STYLE_FORMS).format(rest=phrase(description, rng))
    return Sample(comic(scene), caption, description, scene, index)


def _scene(concept: Concept, side: Side, colour: str, case: str, rng: np.random.Generator) -> Scene:
    """A scene within one side's limits whose subject, its first thing, has this colour."""

    def allowed(kind: str, colour: str) -> bool:
        return kind in side.company and colour in side.colours and not held_out_pair(kind, colour)

    kinds = [kind for kind in side.company if allowed(kind, colour)]
    while True:
        first = (concept.kind or pick(rng, kinds), colour)
        scene = sample_scene(rng, case=case, first=first, allowed=allowed)
        subject, background = scene.things[0], scene.background
        if subject.size == "small" or place_of(subject.x, subject.y) not in side.places:
            continue
        if background.colour is not None and background.colour not in side.colours:
            continue
        if concept.kind is not None:
            return scene
        if background.pattern == "plain" and all(
            stands_out(thing.colour, burst_of(background)) for thing in scene.things
        ):
            return replace(scene, things=tuple(replace(t, style="outlined") for t in scene.things))


def _description(scene: Scene, rng: np.random.Generator, place_told: bool) -> Description:
    """True claims about a scene with every colour, and with the place of a lone thing if asked."""
    while True:
        description = describe(scene, rng)
        mentions = description.mentions
        if all(m.colour is not None for m in mentions) and (
            not place_told or len(mentions) > 1 or mentions[0].place is not None
        ):
            return description


# --- the new kind


def _capsule(x: float, half_width: float, top: float, bottom: float) -> list[Point]:
    """An upright bar with round ends."""
    angles = [pi * (1 + i / 12) for i in range(13)]
    arc = [(half_width * cos(a), half_width * sin(a)) for a in angles]
    upper = [(x + u, top + half_width + v) for u, v in arc]
    lower = [(x - u, bottom - half_width - v) for u, v in arc]
    return upper + lower


def _cactus() -> list[Part]:
    """A trunk with two raised arms in a pot."""

    def part(points: list[Point], paint: str = "main") -> Part:
        return Part(np.asarray(points, dtype=np.float64), paint)

    return [
        part([(-0.5, 0.52), (0.5, 0.52), (0.36, 1), (-0.36, 1)], "wood"),
        part(_capsule(-0.74, 0.2, -0.5, 0.34)),
        part([(-0.74, -0.02), (0, -0.02), (0, 0.34), (-0.74, 0.34)]),
        part(_capsule(0.74, 0.2, -0.66, 0.16)),
        part([(0, -0.2), (0.74, -0.2), (0.74, 0.16), (0, 0.16)]),
        part([*_capsule(0, 0.28, -1, 0.84)[:13], (0.28, 0.56), (-0.28, 0.56)]),
    ]


# The world's tables learn the new kind, so that whatever draws, words or measures a thing takes it
# like any other. The world itself shows only KINDS, and its VOCABULARY was closed with its own
# words: nothing that it draws or says changes.
SHAPES["cactus"] = _cactus()
SINGULAR["cactus"] = ("cactus",)
PLURAL["cactus"] = "cactuses"
