"""The words of the world's captions: names, synonyms and phrases, as tables.

Legend: in a phrase `{a}` and `{b}` stand for things, `{bg}` for a background phrase, `{c}` for a
colour word. The tables are everything that captions are made of, so VOCABULARY is closed.
"""

from __future__ import annotations

from ldm_pipeline.data.world.scene import COLOURS, KINDS

SINGULAR: dict[str, tuple[str, ...]] = {kind: (kind,) for kind in KINDS} | {
    "circle": ("circle", "disc"),
    "ring": ("ring", "hoop"),
    "cross": ("cross", "plus sign"),
    "diamond": ("diamond", "rhombus"),
    "crescent moon": ("crescent moon", "crescent", "moon"),
    "house": ("house", "cottage"),
    "flower": ("flower", "blossom"),
    "boat": ("boat", "sailboat"),
    "mushroom": ("mushroom", "toadstool"),
    "smiley face": ("smiley face", "smiling face", "smiley"),
    "umbrella": ("umbrella", "parasol"),
    "cat's face": ("cat's face", "cat face", "kitty face"),
    "car": ("car", "automobile"),
    "mug": ("mug", "cup"),
    "rocket": ("rocket", "spaceship"),
}
PLURAL = {
    "cross": "crosses", "fish": "fish", "rhombus": "rhombuses", "butterfly": "butterflies",
    "smiley": "smileys",
}  # fmt: skip
"""Of last words that do not just take an s."""
COLOUR_WORDS: dict[str, tuple[str, ...]] = {colour: (colour,) for colour in COLOURS} | {
    "purple": ("purple", "violet"),
    "turquoise": ("turquoise", "teal"),
    "gray": ("gray", "grey"),
}
SIZE_WORDS = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium sized", "medium"),
    "large": ("large", "big", "huge"),
}
STYLE_WORDS = {"flat": ("flat",), "outlined": ("outlined",)}
STYLE_TAILS = {
    "flat": ("without an outline", "with no outline"),
    "outlined": ("with an outline",),
}
COUNT_WORDS = {2: ("two", "two", "2", "a pair of"), 3: ("three", "three", "3"),
               4: ("four", "four", "4")}  # fmt: skip
PLACE_PHRASES: dict[str, tuple[str, ...]] = {
    "top left corner": ("in the top left corner", "in the upper left corner", "at the top left"),
    "top": ("at the top", "near the top", "at the top of the picture"),
    "top right corner": (
        "in the top right corner", "in the upper right corner", "at the top right"),
    "left": ("on the left", "on the left side", "at the left"),
    "centre": ("in the centre", "in the center", "in the middle"),
    "right": ("on the right", "on the right side", "at the right"),
    "bottom left corner": (
        "in the bottom left corner", "in the lower left corner", "at the bottom left"),
    "bottom": ("at the bottom", "near the bottom", "at the bottom of the picture"),
    "bottom right corner": (
        "in the bottom right corner", "in the lower right corner", "at the bottom right"),
}  # fmt: skip
RELATION_PHRASES: dict[str, tuple[str, ...]] = {
    "left of": (
        "{a} to the left of {b}", "{a} left of {b}", "{a} is to the left of {b}",
        "{a} on the left and {b} on the right", "to the left of {b} there is {a}",
    ),
    "right of": (
        "{a} to the right of {b}", "{a} right of {b}", "{a} is to the right of {b}",
        "{a} on the right and {b} on the left", "to the right of {b} there is {a}",
    ),
    "above": (
        "{a} above {b}", "{a} above {b}", "{a} over {b}", "{a} is above {b}",
        "{a} at the top and {b} at the bottom", "above {b} there is {a}",
    ),
    "below": (
        "{a} below {b}", "{a} below {b}", "{a} under {b}", "{a} beneath {b}", "{a} is below {b}",
        "{a} at the bottom and {b} at the top", "below {b} there is {a}",
    ),
}  # fmt: skip
BACKGROUND_PHRASES: dict[str, tuple[str, ...]] = {
    "plain": (
        "on a {c} background", "on a {c} background", "on a plain {c} background", "on {c}",
        "on plain {c}", "against a {c} background", "against {c}", "with a {c} background",
    ),
    "stripes": (
        "on {c} stripes", "on a striped {c} background", "on a {c} striped background",
        "against {c} stripes", "with a {c} striped background", "over {c} stripes",
    ),
    "checks": (
        "on {c} checks", "on a checked {c} background", "on a {c} checkered background",
        "against {c} checks", "with a {c} checked background", "over {c} checks",
    ),
    "sunset": (
        "at sunset", "against a sunset", "in front of a sunset", "with a sunset sky",
        "on a sunset background",
    ),
    "starry night": (
        "on a starry night", "in a starry night sky", "against a starry night", "at night",
        "in the night sky", "with a starry night background",
    ),
}  # fmt: skip
EMPTY_PHRASES: dict[str, tuple[str, ...]] = {
    "plain": ("a plain {c} background", "an empty {c} background", "nothing but {c}",
              "a {c} picture with nothing in it"),
    "stripes": ("{c} stripes", "an empty striped {c} background", "nothing but {c} stripes",
                "a {c} striped background"),
    "checks": ("{c} checks", "an empty checked {c} background", "nothing but {c} checks",
               "a {c} checkered background"),
    "sunset": ("a sunset", "an empty sunset sky", "nothing but a sunset", "a sunset sky"),
    "starry night": ("a starry night", "an empty starry night sky", "the night sky",
                     "a starry night sky", "nothing but a starry night"),
}  # fmt: skip
A_PICTURE_OF = ("a picture of", "an image of", "a drawing of", "an illustration of")
THERE_IS, THERE_ARE = "there is", "there are"
AFTER_BACKGROUND = ("{bg}, {rest}", "{bg} {rest}")
GLUE = ("and", "a", "an", "the", ",")


def plural(name: str) -> str:
    """The plural of a thing's name."""
    head, _, last = name.rpartition(" ")
    many = PLURAL.get(last, last + "s")
    return f"{head} {many}".strip()


def words_of(text: str) -> list[str]:
    """The words of a caption, without its commas."""
    return text.replace(",", " ").split()


def _vocabulary() -> tuple[str, ...]:
    phrases: list[str] = [*A_PICTURE_OF, THERE_IS, THERE_ARE, *GLUE]
    tables = (SINGULAR, COLOUR_WORDS, SIZE_WORDS, STYLE_WORDS, STYLE_TAILS, PLACE_PHRASES,
              RELATION_PHRASES, BACKGROUND_PHRASES, EMPTY_PHRASES)  # fmt: skip
    for table in tables:
        for options in table.values():
            phrases.extend(options)
    for counts in COUNT_WORDS.values():
        phrases.extend(counts)
    phrases.extend(plural(name) for names in SINGULAR.values() for name in names)
    found = {word for text in phrases for word in words_of(text) if "{" not in word}
    return tuple(sorted(found))


VOCABULARY = _vocabulary()
