r"""Prompts as people write them: weights in brackets, BREAK, and what stands for itself.

    (words)        1.1 times as strong; brackets nest, and their factors multiply
    (words:1.3)    1.3 times as strong; 0 and negative numbers are allowed
    [words]        1.1 times weaker
    BREAK          what follows is read apart from what came before
    \( \) \[ \]    the bracket itself; also \\, \< and \BREAK

This is the syntax of AUTOMATIC1111's web interface, read as it reads it: a bracket that is never
closed closes at the end, one that closes nothing is a word, and so is what stands in the place of a
weight and is no number. Any text can be read; what was not understood is told in `complaints`.
Nothing here knows of tokens; the standard library is enough.

Legend
    part       some text under one weight
    section    the parts between two BREAKs
    piece      a part in the making, [text, weight]; None where BREAK stands
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

EMPHASIS = 1.1
"""The factor of a pair of brackets without a number."""

HEAVIEST = 100.0
"""The largest weight, of either sign: beyond it half precision overflows."""

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_SYNTAX = re.compile(
    rf"""
      \\(?P<escaped> [()\[\]\\<] | BREAK\b )
    | (?P<opening> [(\[] )
    | :\s*(?P<weight> {_NUMBER} )\s*\)
    | (?P<closing> [)\]] )
    | (?P<section> \bBREAK\b )
    | (?P<adapter> <(?:lora|lyco|lycoris|hypernet):[^<>]*> )
    | [^\\()\[\]:<B]+ | .
    """,
    re.VERBOSE | re.DOTALL,
)
_NO_WEIGHT = re.compile(r":\s*([^\s:()\[\]\\]+)\s*$")
_EDITING = re.compile(rf"\||:\s*{_NUMBER}\s*$")
_SPECIAL = re.compile(r"[()\[\]\\<]|\bBREAK\b")


@dataclass(frozen=True)
class Part:
    """Some text, without any syntax left in it, and how strongly it counts."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class Prompt:
    """What a text says: at least one section, each of its parts in order.

    Neighbouring parts differ in weight, and none is empty; only the empty text has a section
    without parts. `complaints` says, each in a few words, what was not understood.
    """

    sections: tuple[tuple[Part, ...], ...]
    complaints: tuple[str, ...] = ()


def parse(text: str) -> Prompt:
    """What `text` says. No text is refused."""
    pieces: list[list | None] = []
    opened: dict[str, list[tuple[int, int]]] = {"(": [], "[": []}  # piece and place in the text
    complaints: list[str] = []

    def close(bracket: str, factor: float) -> int:
        """Weigh what stands since the last open `bracket`; the place where that was opened."""
        first, place = opened[bracket].pop()
        for piece in pieces[first:]:
            if piece is not None:
                piece[1] = _held(piece[1] * factor, complaints)
        return place

    for found in _SYNTAX.finditer(text):
        kind = found.lastgroup
        if kind == "opening":
            opened[found[0]].append((len(pieces), found.start()))
        elif kind == "weight" and opened["("]:
            close("(", float(found["weight"]))
        elif kind == "closing" and opened[_opening(found[0])]:
            round_ = found[0] == ")"
            place = close(_opening(found[0]), EMPHASIS if round_ else 1 / EMPHASIS)
            inside = text[place + 1 : found.start()]
            if round_ and (word := _NO_WEIGHT.search(inside)):
                complaints.append(f"{word[1]!r} is no number, and is read as words")
            if not round_ and _EDITING.search(inside):
                complaints.append(f"'[{inside}]' would change the words while it is drawn, which"
                                  " is not known here; all of it is read as words")  # fmt: skip
        elif kind == "section":
            pieces.append(None)
        elif kind == "adapter":
            complaints.append(f"{found[0]} is left out: adapters are not named in the prompt")
        else:
            if found[0].endswith((")", "]")) and kind != "escaped":
                complaints.append(f"{found[0][-1]!r} closes nothing, and is read as a word")
            pieces.append([found["escaped"] or found[0], 1.0])
    for bracket, places in opened.items():
        while places:
            complaints.append(f"{bracket!r} is never closed, and taken to close at the end")
            close(bracket, EMPHASIS if bracket == "(" else 1 / EMPHASIS)
    if re.search(r"\bAND\b", text):
        complaints.append("AND does not join pictures here; it is read as a word")
    return Prompt(_sections(pieces), tuple(dict.fromkeys(complaints)))


def write(prompt: Prompt) -> str:
    """A text that `parse` reads as the sections of `prompt`."""
    return " BREAK ".join("".join(map(_written, section)) for section in prompt.sections)


def escape(text: str) -> str:
    """`text` so written that `parse` reads it as it stands, under weight 1."""
    return _SPECIAL.sub(r"\\\g<0>", text)


def _written(part: Part) -> str:
    text = escape(part.text)
    return text if part.weight == 1 else f"({text}:{part.weight!r})"


def _opening(bracket: str) -> str:
    return "(" if bracket == ")" else "["


def _held(weight: float, complaints: list[str]) -> float:
    """`weight` within the heaviest, either way."""
    if abs(weight) <= HEAVIEST:
        return weight
    complaints.append(f"a weight is held at {HEAVIEST:g}, the heaviest")
    return HEAVIEST if weight > 0 else -HEAVIEST


def _sections(pieces: Iterable[list | None]) -> tuple[tuple[Part, ...], ...]:
    """The pieces between BREAKs as parts; sections that say nothing are left out."""
    between: list[list[list]] = [[]]
    for piece in pieces:
        if piece is None:
            between.append([])
        else:
            between[-1].append(piece)
    last = len(between) - 1
    found = [_trimmed(_merged(each), i > 0, i < last) for i, each in enumerate(between)]
    return tuple(parts for parts in found if parts) or ((),)


def _merged(pieces: Iterable[list]) -> list[Part]:
    """Parts, neighbours of one weight together."""
    return [
        Part("".join(text for text, _ in group), weight)
        for weight, group in groupby(pieces, lambda piece: piece[1])
    ]


def _trimmed(parts: list[Part], left: bool, right: bool) -> tuple[Part, ...]:
    """`parts` without the white space beside a BREAK on these sides."""
    while left and parts:
        text = parts[0].text.lstrip()
        parts = [Part(text, parts[0].weight), *parts[1:]] if text else parts[1:]
        if text:
            break
    while right and parts:
        text = parts[-1].text.rstrip()
        parts = [*parts[:-1], Part(text, parts[-1].weight)] if text else parts[:-1]
        if text:
            break
    return tuple(parts)
