"""How a run hears that it should stop: the first signal asks, a second one ends it at once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_on_signals() -> Iterator[list[int]]:
    """A list that SIGINT or SIGTERM fills; a second signal ends the process at once."""
    received: list[int] = []
    with on_signals(received.append):
        yield received


@contextmanager
def on_signals(act: Callable[[int], None]) -> Iterator[None]:
    """Within the block the first SIGINT or SIGTERM calls `act`; a second one does what it did."""
    kept: dict[signal.Signals, Any] = {}

    def once(number: int, frame: FrameType | None) -> None:
        for known, handler in kept.items():
            signal.signal(known, handler)
        act(number)

    for number in STOPPING:
        kept[number] = signal.signal(number, once)
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def leave_signals_to_the_run(worker: int) -> None:
    """A signal to the whole group must not end the workers: the step under way still needs them."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
