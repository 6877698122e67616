"""What captions claim and how they say it.

Legend: a `Description` is the claims alone, free of wording; `phrase` words one. `rng` is a
`numpy.random.Generator`. Captions are lower case; their only marks are commas and apostrophes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ldm_pipeline.data.world.scene import (
    COLOURED_PATTERNS,
    COLOURS,
    KINDS,
    OPPOSITE,
    PATTERNS,
    PLACES,
    SIZES,
    Background,
    Scene,
    Thing,
    pick,
    place_of,
    relation_of,
)
from ldm_pipeline.data.world.words import (
    A_PICTURE_OF,
    AFTER_BACKGROUND,
    BACKGROUND_PHRASES,
    COLOUR_WORDS,
    COUNT_WORDS,
    EMPTY_PHRASES,
    PLACE_PHRASES,
    RELATION_PHRASES,
    SINGULAR,
    SIZE_WORDS,
    STYLE_TAILS,
    STYLE_WORDS,
    THERE_ARE,
    THERE_IS,
    VOCABULARY,
    plural,
    words_of,
)

__all__ = [
    "VOCABULARY",
    "Description",
    "Mention",
    "describe",
    "hard_negatives",
    "held_out_caption",
    "phrase",
    "words_of",
]

HELD_OUT_SHARE = 0.05


@dataclass(frozen=True)
class Mention:
    """What a caption says of one thing, or of `count` alike; None where it says nothing."""

    kind: str
    colour: str | None
    count: int = 1
    size: str | None = None
    style: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Description:
    """Everything that a caption claims, and nothing else.

    The mentions are all that the picture holds. `relation` says how mention 0 stands to mention 1.
    """

    mentions: tuple[Mention, ...]
    relation: str | None = None
    background: Background | None = None


def held_out_caption(text: str) -> bool:
    """Whether this caption is among the 5 % that training never sees (a stable hash decides)."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < HELD_OUT_SHARE * 2**64


def describe(scene: Scene, rng: np.random.Generator) -> Description:
    """True claims about a scene: everything on some days, the bare minimum on others."""
    background = scene.background if rng.random() < 0.6 or not scene.things else None
    things = list(scene.things)
    if not things:
        return Description((), None, background)
    if len(things) == 1:
        mention = _mention(things[0], rng, lone=True)
        place = place_of(things[0].x, things[0].y)
        if place is not None and rng.random() < 0.55:
            mention = replace(mention, place=place)
        return Description((mention,), None, background)
    if len({(thing.kind, thing.colour) for thing in things}) == 1:
        mention = _mention(things[0], rng, chance=0.5, count=len(things))
        return Description((mention,), None, background)
    if len(things) == 2:
        if rng.random() < 0.5:
            things.reverse()
        relation = relation_of(things[0], things[1])
        if rng.random() < 0.12:
            relation = None
        mentions = tuple(_mention(thing, rng, chance=0.45) for thing in things)
        return Description(mentions, relation, background)
    order = np.argsort(rng.random(len(things)))
    mentions = tuple(_mention(things[i], rng, chance=0.15) for i in order)
    return Description(mentions, None, background)


def _mention(
    thing: Thing, rng: np.random.Generator, *, lone: bool = False, chance: float = 0.8,
    count: int = 1,
) -> Mention:  # fmt: skip
    """A mention whose size and style are told with a chance in proportion to `chance`."""
    size = thing.size if rng.random() < chance * (0.15 if thing.size == "medium" else 0.6) else None
    style = thing.style if rng.random() < chance * (0.1 if thing.style == "flat" else 0.5) else None
    colour = None if lone and rng.random() < 0.03 else thing.colour
    return Mention(thing.kind, colour, count, size, style)


def phrase(description: Description, rng: np.random.Generator) -> str:
    """One of the many ways to say a description, at most 40 words."""
    background = description.background
    if not description.mentions:
        assert background is not None, "an empty picture is described by its background"
        return _background_words(EMPTY_PHRASES, background, rng)
    articles = rng.random() < 0.85
    parts = [_thing_words(mention, rng, articles) for mention in description.mentions]
    if description.relation is not None:
        form = pick(rng, RELATION_PHRASES[description.relation])
        text = form.format(a=parts[0], b=parts[1])
        lead = "" if form[0] != "{" or " is " in form else _lead_in(rng, articles, False)
    else:
        text = _listed(parts, rng)
        many = description.mentions[0].count > 1
        lead = _lead_in(rng, articles or many, many)
    text = f"{lead} {text}".strip()
    if background is None:
        return text
    words = _background_words(BACKGROUND_PHRASES, background, rng)
    if rng.random() < 0.12 and not lead.endswith("of"):
        return pick(rng, AFTER_BACKGROUND).format(bg=words, rest=text)
    joint = ", " if rng.random() < 0.12 else " "
    return f"{text}{joint}{words}"


def _lead_in(rng: np.random.Generator, full: bool, many: bool) -> str:
    """Sometimes "a picture of" or "there is"; never before words without articles."""
    if not full or rng.random() > 0.28:
        return ""
    if rng.random() < 0.25:
        return THERE_ARE if many else THERE_IS
    return pick(rng, A_PICTURE_OF)


def _listed(parts: Sequence[str], rng: np.random.Generator) -> str:
    if len(parts) == 1:
        return parts[0]
    if rng.random() < 0.15:
        return ", ".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def _thing_words(mention: Mention, rng: np.random.Generator, articles: bool) -> str:
    names = SINGULAR[mention.kind]
    name = names[0] if rng.random() < 0.7 else pick(rng, names)
    if mention.count > 1:
        name = plural(name)
    adjectives: list[str] = []
    tail = ""
    if mention.size is not None:
        adjectives.append(pick(rng, SIZE_WORDS[mention.size]))
    if mention.style is not None:
        if rng.random() < 0.6:
            adjectives.append(pick(rng, STYLE_WORDS[mention.style]))
        else:
            tail = " " + pick(rng, STYLE_TAILS[mention.style])
    if mention.colour is not None:
        words = COLOUR_WORDS[mention.colour]
        adjectives.append(words[0] if rng.random() < 0.75 else pick(rng, words))
    text = " ".join([*adjectives, name])
    if mention.count > 1:
        text = f"{pick(rng, COUNT_WORDS[mention.count])} {text}"
    elif articles:
        text = f"{'an' if text[0] in 'aeiou' else 'a'} {text}"
    text += tail
    if mention.place is not None:
        text += " " + pick(rng, PLACE_PHRASES[mention.place])
    return text


def _background_words(
    phrases: dict[str, tuple[str, ...]], background: Background, rng: np.random.Generator
) -> str:
    form = pick(rng, phrases[background.pattern])
    if background.colour is None:
        return form
    colour = pick(rng, COLOUR_WORDS[background.colour])
    if colour[0] in "aeiou":
        form = form.replace("a {c}", "an {c}")
    return form.format(c=colour)


def hard_negatives(description: Description, rng: np.random.Generator, n: int
                   ) -> list[Description]:  # fmt: skip
    """`n` different descriptions close to this one, each false wherever this one is true.

    Colours and kinds change places between things, the relation turns round, or one colour, kind,
    count, size, style, place or background changes. The list is shorter where fewer were found.
    """
    found: list[Description] = []
    seen = {_meaning(description)}
    for _ in range(30 * n):
        if len(found) == n:
            break
        changed = pick(rng, _CHANGES)(description, rng)
        if changed is not None and _meaning(changed) not in seen:
            seen.add(_meaning(changed))
            found.append(changed)
    return found


def turned(description: Description) -> Description | None:
    """The description with its relation turned round; None for one that has none."""
    if description.relation is None:
        return None
    return replace(description, relation=OPPOSITE[description.relation])


def _meaning(description: Description) -> tuple[object, ...]:
    """Equal for descriptions that say the same in another order."""
    mentions, relation = description.mentions, description.relation
    if relation in ("right of", "below"):
        mentions, relation = (mentions[1], mentions[0]), OPPOSITE[relation]
    if relation is None:
        mentions = tuple(sorted(mentions, key=repr))
    return mentions, relation, description.background


_Change = Callable[[Description, np.random.Generator], Description | None]


def _other(rng: np.random.Generator, options: Sequence[str], than: str) -> str:
    return pick(rng, [option for option in options if option != than])


def _with_mention(description: Description, i: int, mention: Mention) -> Description | None:
    """The description with mention `i` replaced, unless two mentions would then be one pair."""
    mentions = (*description.mentions[:i], mention, *description.mentions[i + 1 :])
    if len({(m.kind, m.colour) for m in mentions}) < len(mentions):
        return None
    return replace(description, mentions=mentions)


def _swap_colours(description: Description, rng: np.random.Generator) -> Description | None:
    return _swap(description, rng, colours=True)


def _swap_kinds(description: Description, rng: np.random.Generator) -> Description | None:
    return _swap(description, rng, colours=False)


def _swap(description: Description, rng: np.random.Generator, colours: bool) -> Description | None:
    mentions = list(description.mentions)
    if len(mentions) < 2:
        return None
    i, j = (int(k) for k in np.argsort(rng.random(len(mentions)))[:2])
    a, b = mentions[i], mentions[j]
    if a.colour == b.colour or a.kind == b.kind:
        return None
    if colours:
        mentions[i], mentions[j] = replace(a, colour=b.colour), replace(b, colour=a.colour)
    else:
        mentions[i], mentions[j] = replace(a, kind=b.kind), replace(b, kind=a.kind)
    if len({(m.kind, m.colour) for m in mentions}) < len(mentions):
        return None
    return replace(description, mentions=tuple(mentions))


def _reverse(description: Description, rng: np.random.Generator) -> Description | None:
    return turned(description)


def _one(change: Callable[[Mention, np.random.Generator], Mention | None]) -> _Change:
    """A change of one mention, drawn at random."""

    def apply(description: Description, rng: np.random.Generator) -> Description | None:
        if not description.mentions:
            return None
        i = int(rng.random() * len(description.mentions))
        mention = change(description.mentions[i], rng)
        return None if mention is None else _with_mention(description, i, mention)

    return apply


def _colour(mention: Mention, rng: np.random.Generator) -> Mention | None:
    if mention.colour is None:
        return None
    return replace(mention, colour=_other(rng, tuple(COLOURS), mention.colour))


def _kind(mention: Mention, rng: np.random.Generator) -> Mention | None:
    return replace(mention, kind=_other(rng, KINDS, mention.kind))


def _count(mention: Mention, rng: np.random.Generator) -> Mention | None:
    if mention.count == 1:
        return None
    return replace(mention, count=pick(rng, [n for n in (2, 3, 4) if n != mention.count]))


def _size(mention: Mention, rng: np.random.Generator) -> Mention | None:
    if mention.size is None:
        return None
    return replace(mention, size=_other(rng, SIZES, mention.size))


def _style(mention: Mention, rng: np.random.Generator) -> Mention | None:
    if mention.style is None:
        return None
    return replace(mention, style="flat" if mention.style == "outlined" else "outlined")


def _place(mention: Mention, rng: np.random.Generator) -> Mention | None:
    if mention.place is None:
        return None
    return replace(mention, place=_other(rng, PLACES, mention.place))


def _background(description: Description, rng: np.random.Generator) -> Description | None:
    old = description.background
    if old is None:
        return None
    if old.colour is not None and rng.random() < 0.6:
        new = replace(old, colour=_other(rng, tuple(COLOURS), old.colour))
    else:
        pattern = _other(rng, PATTERNS, old.pattern)
        colour = old.colour if old.colour is not None else pick(rng, tuple(COLOURS))
        new = Background(pattern, colour if pattern in COLOURED_PATTERNS else None)
    if any(mention.colour == new.colour for mention in description.mentions if new.colour):
        return None
    return replace(description, background=new)


_CHANGES: tuple[_Change, ...] = (
    _swap_colours, _swap_colours, _swap_kinds, _reverse, _reverse, _one(_colour), _one(_colour),
    _one(_kind), _one(_kind), _one(_count), _one(_size), _one(_style), _one(_place), _background,
)  # fmt: skip
