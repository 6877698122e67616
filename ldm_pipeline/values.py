"""Values as callers pass them, read as plain types; what cannot be is a `UserError` of one line."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Sequence
from numbers import Real
from typing import Any

from ldm_pipeline.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")
"""The names of what weights are computed in."""

LONGEST = 80
"""Letters of a value that a message names."""

WIDE_MODES = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})
"""Pillow's names of 16-bit grey; the upper 8 bits of a level are what is read of it."""

Text = str | Sequence[str]
"""One text, or one for each picture."""


def shown(value: object) -> str:
    """`value` as a message names it: on one line, and not all of what is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def check_levels(name: str, levels: Any) -> None:
    """Raise `UserError` unless these are finite numbers, one at least; tensors are told so too."""
    try:
        numbers = [math.nan if isinstance(level, str) else float(level) for level in levels]
    except (TypeError, ValueError):
        numbers = [math.nan]
    if not numbers:
        raise UserError(f"{name} is empty; pass at least one noise level")
    if not all(map(math.isfinite, numbers)):
        raise UserError(
            f"{name}={shown(levels)} must be a list of numbers, descending noise levels"
        )


def listed(texts: Text | None) -> list[str]:
    """One text, several or none as a list."""
    return [texts] if isinstance(texts, str) else list(texts or [])


def negatives(texts: Text | None, count: int) -> list[str]:
    """One negative prompt for each of `count` prompts; none is the empty text. `UserError` for
    another number of them."""
    each = [texts or ""] * count if texts is None or isinstance(texts, str) else list(texts)
    if len(each) != count:
        raise UserError(f"negative_prompt has {len(each)} texts for {count} prompts")
    return each


def as_texts(name: str, text: Text | None) -> list[str]:
    """A text or a sequence of texts as a list."""
    if text is None:
        return []
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, Sequence) or not all(isinstance(entry, str) for entry in texts):
        raise UserError(f"{name}={shown(text)} must be a text or a list of texts")
    if not texts:
        raise UserError(f"{name} is an empty list; pass at least one text")
    for entry in texts:
        try:
            entry.encode()
        except UnicodeEncodeError as error:
            told = f"{name}={shown(entry)} holds half a letter (a surrogate); take it out"
            raise UserError(told) from error
    return list(texts)


def check_flag(name: str, value: Any) -> None:
    """Raise `UserError` unless this is True or False."""
    if not isinstance(value, bool):
        raise UserError(f"{name}={shown(value)} must be True or False")


def check_path(name: str, value: Any) -> None:
    """Raise `UserError` unless this can be a name or a path; "" is none."""
    if not isinstance(value, str | os.PathLike) or value == "":
        raise UserError(f"{name}={shown(value)} must be a name or a path")


def as_shape(name: str, tensor: Any) -> tuple[int, ...]:
    """The shape of a tensor; a `UserError` for anything that has none."""
    if not hasattr(tensor, "shape"):
        raise UserError(f"{name} must be a tensor, not {type(tensor).__name__}")
    return tuple(tensor.shape)


def as_whole(name: str, value: Any, low: int) -> int:
    """`value` as an int of at least `low`."""
    try:
        whole = operator.index(value)
    except TypeError:
        whole = None
    if whole is None or isinstance(value, bool) or whole < low:
        raise UserError(f"{name}={shown(value)} must be a whole number of at least {low}")
    return whole


def as_number(name: str, value: Any, low: float, high: float) -> float:
    """`value` as a finite float within [low, high]."""
    number = float(value) if isinstance(value, Real) else math.nan
    if isinstance(value, bool) or not math.isfinite(number) or not low <= number <= high:
        allowed = f"at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
        raise UserError(f"{name}={shown(value)} must be a finite number, {allowed}")
    return number
