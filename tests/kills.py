"""A process that is killed: at any moment of what is watched, before or after each call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest


class Killed(BaseException):
    """Stands for a kill: nothing of ours catches it, or runs after it."""


@contextmanager
def killed_at(
    moment: int, watched: Sequence[tuple[Any, str]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[bool]]:
    """Within the block the watched functions, (owner, name) each, raise `Killed` at this moment.

    Moments are counted from 1: two for every call, one before it and one after. The list holds
    whether the block came to its end.
    """
    passed = 0
    ended = [False]

    def one_more() -> None:
        nonlocal passed
        passed += 1
        if passed == moment:
            raise Killed

    def counted(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            one_more()
            result = original(*args, **kwargs)
            one_more()
            return result

        return call

    with monkeypatch.context() as patch:
        for owner, name in watched:
            patch.setattr(owner, name, counted(getattr(owner, name)))
        try:
            yield ended
            ended[0] = True
        except Killed:
            pass
