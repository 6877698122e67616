"""Which words go with a picture in a step: several captions, shuffled and dropped tags, no words.

For every picture there is a fixed, finite list of *wordings*: each of its captions in `variants`
versions, where version v of a picture is drawn from (seed, key, v) alone. A step picks one of
them, or the empty text with probability `dropout`. So the text embeddings of all wordings can be
computed once, the text encoder can be unloaded, and a run with a cache sees exactly the words of a
run without one. Without shuffling and tag dropout all versions would be the same, and there is one
for each caption.

Legend: a *tag* is a part of a caption between commas; V the number of a picture's wordings.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ldm_pipeline.data.captioned import Item
from ldm_pipeline.data.draws import stream
from ldm_pipeline.errors import UserError

EMPTY = ""


@dataclass(frozen=True)
class Wording:
    """How captions are varied. Raises `UserError` for values out of range.

    dropout         probability of the empty text, 0 to 1 (what guidance needs to be learnt)
    shuffle_tags    put the tags in another order
    tag_dropout     probability with which each tag is left out, 0 to 1
    keep_tags       so many tags at the beginning stay, in their place
    variants        versions of each caption that are drawn, at least 1
    """

    dropout: float = 0.0
    shuffle_tags: bool = False
    tag_dropout: float = 0.0
    keep_tags: int = 0
    variants: int = 4

    def __post_init__(self) -> None:
        for name in ("dropout", "tag_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)} must be from 0 to 1")
        for name, least in (("keep_tags", 0), ("variants", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be at least {least}")

    @property
    def varies(self) -> bool:
        """Whether versions of a caption can differ."""
        return self.shuffle_tags or self.tag_dropout > 0


def count(item: Item, settings: Wording) -> int:
    """V, the number of a picture's wordings, at least one."""
    return max(1, len(item.captions)) * (settings.variants if settings.varies else 1)


def wording(item: Item, settings: Wording, seed: int, v: int) -> str:
    """Wording v of a picture, from 0 to V - 1: version v // n of caption v % n, of n captions.

    The empty text stands in for a missing caption. Wordings of one picture need not all differ.
    """
    captions = item.captions or (EMPTY,)
    caption = captions[v % len(captions)]
    if not settings.varies:
        return caption
    return reword(caption, settings, stream(seed, "wording", item.key, v))


def reword(caption: str, settings: Wording, rng: np.random.Generator) -> str:
    """One version of a caption: tags dropped and shuffled behind the kept ones, joined by ", "."""
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    kept, rest = tags[: settings.keep_tags], tags[settings.keep_tags :]
    stays = rng.random(len(rest)) >= settings.tag_dropout
    rest = [tag for tag, stay in zip(rest, stays, strict=True) if stay]
    if settings.shuffle_tags:
        rest = [rest[i] for i in rng.permutation(len(rest))]
    return ", ".join(kept + rest)


def pick(n: int, settings: Wording, rng: np.random.Generator) -> int | None:
    """Which v of `n` wordings a step uses, evenly; None for the empty text."""
    dropped, which = rng.random() < settings.dropout, int(rng.integers(n))
    return None if dropped else which


def caption_for(item: Item, settings: Wording, seed: int, rng: np.random.Generator) -> str:
    """The words of a picture in a step. `seed` fixes the wordings, `rng` (the step's) picks one."""
    v = pick(count(item, settings), settings, rng)
    return EMPTY if v is None else wording(item, settings, seed, v)


def texts_to_encode(items: list[Item], settings: Wording, seed: int) -> list[str]:
    """Every text that any step can ask for, once each, the empty one first: what a complete cache
    of embeddings holds."""
    every = (
        wording(item, settings, seed, v) for item in items for v in range(count(item, settings))
    )
    return list(dict.fromkeys((EMPTY, *every)))
