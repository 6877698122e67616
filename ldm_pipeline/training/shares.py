"""What the processes of a run divide among them before it begins: see `data.cache.Share`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ldm_pipeline.data.cache import Share
from ldm_pipeline.processes.ranks import Ranks, launched

T = TypeVar("T")


def share_of(ranks: Ranks) -> Share:
    """This process's share of what is encoded."""
    return Share(ranks.index, ranks.count, ranks.told)


def one_on_each_machine_first(work: Callable[[], T]) -> T:
    """What `work` says, done by one process of each machine before the others, which may wait for
    a month; where one fails with a `UserError` or `OSError`, all raise it."""
    state = launched()
    said: list[T] = []
    with share_of(Ranks(state)).alike():
        if state.is_local_main_process:
            said.append(work())
    return said[0] if said else work()
