"""The project's errors, and how they name the allowed choices.

A person's mistake ends in `UserError`: one clear line that says what was passed, what is allowed
and what to do. The command turns it into exit code 2; in Python it is an ordinary `ValueError`.
Our own invariants are asserted instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake in what the caller passed; the message is one line that a person can act on."""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The entry of `known` that looks most like `word`, or None where nothing comes close."""
    matches = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def suggestion(word: str, known: Iterable[str]) -> str:
    """A "; did you mean …?" to append to a message; empty where nothing comes close."""
    match = nearest(word, known)
    return f"; did you mean {match!r}?" if match else ""


def choose(name: str, value: object, allowed: Iterable[str]) -> str:
    """`value`, if it is one of `allowed`; else a `UserError` that lists them and the nearest."""
    allowed = list(allowed)
    if not isinstance(value, str):
        kind = "None" if value is None else f"a {type(value).__name__}"
        raise UserError(f"{name} must be a name, not {kind}; choose one of {', '.join(allowed)}")
    if value in allowed:
        return value
    raise UserError(
        f"{name}={value!r} is not known; choose one of {', '.join(allowed)}"
        f"{suggestion(value, allowed)}"
    )
