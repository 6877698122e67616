"""Several processes that share work, as threads of one: what `Share` is tested with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ldm_pipeline.data.cache import Share

T = TypeVar("T")


def together(processes: Sequence[Callable[[Share], T]]) -> list[T]:
    """What each of these says that run at once; an error of any is raised."""
    n = len(processes)
    said = [""] * n
    meet = threading.Barrier(n, timeout=60)

    def told(rank: int, text: str) -> list[str]:
        said[rank] = text
        meet.wait()
        heard = [text for text in said if text]
        meet.wait()  # nobody says the next thing before all have heard this one
        return heard

    def one(rank: int) -> T:
        return processes[rank](Share(rank, n, lambda text: told(rank, text)))

    with ThreadPoolExecutor(n) as threads:
        return list(threads.map(one, range(n)))
