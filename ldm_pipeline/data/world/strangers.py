"""Words that no caption of the world has, put among those of one.

People also type "a beautiful painting of …" or ", highly detailed". A model that never met a word
it does not know takes it for one of those that it does, and draws something else; one that met
many of them, each another one, learns to listen to the rest.
"""

from __future__ import annotations

import numpy as np

from ldm_pipeline.data.world.scene import pick
from ldm_pipeline.data.world.words import VOCABULARY

ONSETS = (*"bcdfghjklmnprstvwyz", "bl", "ch", "cr", "fl", "gr", "pl", "sh", "sp", "st", "th", "tr",
          "")  # fmt: skip
VOWELS = (*"aeiou", "ai", "ea", "ee", "io", "ou")
CODAS = (*"dklmnrst", "ck", "ful", "ing", "nd", "ng", "ry", "st", "ty", "", "", "")

BEFORE = ("{w} {t}", "{w} {v} {t}", "a {w} picture of {t}", "a {w} {v}: {t}", "{w}: {t}")
AFTER = ("{t} {w}", "{t}, {w}", "{t}, {w}, {v}", "{t} in {w} {v}", "{t} by a {w} {v}",
         "{t} for my {w}", "{t}. {w} {v}")  # fmt: skip


def strange_word(rng: np.random.Generator) -> str:
    """A word of one to three random syllables that no caption has, such as "brelaing"."""
    while True:
        syllables = int(rng.integers(1, 4))
        parts = [pick(rng, ONSETS) + pick(rng, VOWELS) for _ in range(syllables)]
        word = "".join(parts) + pick(rng, CODAS)
        if len(word) > 2 and word not in VOCABULARY:
            return word


def among_strangers(caption: str, rng: np.random.Generator) -> str:
    """A caption with strange words before it, after it, or between two of its words."""
    words = {"w": strange_word(rng), "v": strange_word(rng)}
    where = rng.random()
    if where < 0.35:
        return pick(rng, BEFORE).format(t=caption, **words)
    if where < 0.7:
        return pick(rng, AFTER).format(t=caption, **words)
    told = caption.split(" ")
    place = int(rng.integers(len(told)))
    return " ".join((*told[:place], words["w"], *told[place:]))
