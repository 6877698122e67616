"""How often a concept of `data.world.concepts` appears where it is asked for, read by the judge.

The prompts put the concept in colours, places and company that its training folder never shows.
A cactus *appears* where a cactus of the told colour is seen; the comic style where the picture is
in comic style and the thing told first is seen in its colour.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ldm_pipeline.data.world.concepts import (
    BURST,
    Concept,
    concept_named,
    concept_prompts,
)
from ldm_pipeline.data.world.scene import KINDS, PATTERNS, Background
from ldm_pipeline.data.world.world import Sample
from ldm_pipeline.errors import UserError
from ldm_pipeline.evaluation.judge import Reading, Verdict, agrees, is_comic, read
from ldm_pipeline.evaluation.metrics import Share

Draw = Callable[[Sequence[str]], Sequence[np.ndarray]]
"""Prompts to as many pictures, uint8 [128, 128, 3] each; batches and seeds are its own affair."""
AIM = 0.90
"""The share of prompts in which a well trained concept appears."""


@dataclass(frozen=True)
class Outcome:
    """What the judge makes of the picture drawn for one prompt.

    `kind`: a thing of the subject's kind is seen; `colour`: one in its colour; `style`: the picture
    is in the concept's style (true of concepts without one).
    """

    sample: Sample
    reading: Reading
    verdict: Verdict
    kind: bool
    colour: bool
    style: bool

    @property
    def appears(self) -> bool:
        """Whether the concept is there, on a thing of the right kind and colour."""
        return self.colour and self.style

    @property
    def all(self) -> bool:
        """Whether everything that the prompt says is kept."""
        return self.verdict.all and self.style


@dataclass(frozen=True)
class ConceptReport:
    """The outcomes of all prompts, in order; `str` is a table."""

    concept: str
    seed: int
    outcomes: tuple[Outcome, ...] = field(repr=False)

    @property
    def shares(self) -> dict[str, Share]:
        """What share of the prompts came out right, and in which respect."""

        def among(outcomes: Sequence[Outcome]) -> Share:
            return Share.of(outcome.appears for outcome in outcomes)

        alone = [o for o in self.outcomes if len(o.sample.description.mentions) == 1]
        company = [o for o in self.outcomes if len(o.sample.description.mentions) > 1]
        return {
            "appears": among(self.outcomes),
            "appears alone": among(alone),
            "appears in company": among(company),
            "kind, in any colour": Share.of(o.kind for o in self.outcomes),
            "style": Share.of(o.style for o in self.outcomes),
            "place, of those alone": Share.of(o.verdict.place for o in alone),
            "everything the words say": Share.of(o.all for o in self.outcomes),
        }

    def __str__(self) -> str:
        head = f"{self.concept:30}share  95 % interval    (trials)       aim {AIM:.2f}"
        return "\n".join([head, *(f"{name:30}{share}" for name, share in self.shares.items())])

    def to_json(self) -> dict[str, Any]:
        """The figures as plain values."""
        shares = {name: share.to_json() for name, share in self.shares.items() if share.n}
        return {"concept": self.concept, "seed": self.seed, "aim": AIM, "shares": shares}


def measure_concept(draw: Draw, name: str, prompts: int = 200, seed: int = 0) -> ConceptReport:
    """Have `prompts` prompts of a concept drawn, read the pictures and count where it appears.

    `draw` is called once, with all prompts. Raises `UserError` for an unknown concept, fewer than
    one prompt, another number of pictures than of prompts, or pictures of another shape or type.
    """
    concept = concept_named(name)
    samples = concept_prompts(name, prompts, seed)
    pictures = draw([sample.caption for sample in samples])
    if len(pictures) != len(samples):
        raise UserError(
            f"the drawing function returned {len(pictures)} pictures for {len(samples)} prompts; "
            "it must return one for each"
        )
    outcomes = (judged(concept, *pair) for pair in zip(samples, pictures, strict=True))
    return ConceptReport(name, seed, tuple(outcomes))


def judged(concept: Concept, sample: Sample, picture: np.ndarray) -> Outcome:
    """What the judge makes of a picture (uint8 [128, 128, 3]) drawn for a sample's caption."""
    reading = read_concept(concept, picture)
    subject = next(
        (m for m in sample.description.mentions if m.kind == concept.kind),
        sample.description.mentions[0],
    )
    alike = [thing for thing in reading.things if thing.kind == subject.kind]
    return Outcome(
        sample,
        reading,
        agrees(reading, sample.description),
        kind=bool(alike),
        colour=any(thing.colour == subject.colour for thing in alike),
        style=concept.kind is not None or is_comic(picture),
    )


def read_concept(concept: Concept, picture: np.ndarray) -> Reading:
    """What a picture shows to a judge who knows the concept, in the words of its captions: behind
    a comic picture lies a plain background."""
    if concept.kind is not None:
        return read(picture, kinds=(*KINDS, concept.kind))
    reading = read(picture, patterns=(*PATTERNS, BURST))
    if reading.background is None or reading.background.pattern != BURST:
        return reading
    return replace(reading, background=Background("plain", reading.background.colour))
