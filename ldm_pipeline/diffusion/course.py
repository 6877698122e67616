"""What every sampler offers: given a schedule and a number of steps, a fresh course to run.

Legend
    t, s     the level a step starts from and the level it ends on
    n        number of steps;  strength in (0, 1]: the share of them that image-to-image runs
    exact    run n steps all the same, from the level that this share of a finer grid begins at
    z        clean latents [B, C, h, w]
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from ldm_pipeline.diffusion.grids import grid
from ldm_pipeline.diffusion.loop import Step
from ldm_pipeline.diffusion.schedule import Schedule


def _goes_anywhere(k: int) -> None:
    """For steps that are told both of their ends and need no more."""


@dataclass(frozen=True)
class Course:
    """One run of a sampler. It belongs to that run alone: its step may keep a history.

    times  the levels to visit, len(times) - 1 steps, ending in CLEAN
    step   the step, for `loop.run`
    first  first(noise) -> where a run without a picture starts, from unit noise [B, C, h, w]
    noisy  noisy(z, noise, t) -> z at level t, in the scale in which this sampler keeps x
    skip   skip(k) tells the step, before it is first asked, that the run begins at times[k]
    order  how many of the levels make one step (2 for stock's Heun)
    own    the stock scheduler that takes the steps, where there is one
    """

    times: tuple[float, ...]
    step: Step
    first: Callable[[Tensor], Tensor]
    noisy: Callable[[Tensor, Tensor, float], Tensor]
    skip: Callable[[int], None] = _goes_anywhere
    order: int = 1
    own: Any = None

    def between(self, high: float, low: float) -> Course:
        """The part of this course that starts below level `high` and takes no step from one below
        `low`: parts that share a level, run one after the other, are the whole.

        Where two levels make a step, it starts one earlier rather than within a step, as stock
        SDXL does.
        """
        count = len(self.times) - 1
        first = next((i for i, t in enumerate(self.times[:-1]) if t < high), count)
        last = next((i for i, t in enumerate(self.times[:-1]) if t < low), count)
        if self.order == 2 and first > 0 and (count - first) % 2 == 0:
            first -= 1
        self.skip(first)
        return replace(self, times=self.times[first : last + 1])


class Sampler(Protocol):
    """A way to draw: a value without state, shared by any number of runs."""

    def course(
        self, schedule: Schedule, n: int, strength: float = 1.0, exact: bool = False
    ) -> Course:
        """A fresh course of n steps; below strength 1, of its last part."""


class NativeSampler(ABC):
    """A sampler of ours: its x is alpha z + sigma eps at every level."""

    @abstractmethod
    def times(
        self, schedule: Schedule, n: int, strength: float = 1.0, exact: bool = False
    ) -> tuple[float, ...]:
        """The levels of n steps, descending to CLEAN; below strength 1, of image-to-image."""

    @abstractmethod
    def stepper(self, schedule: Schedule) -> Step:
        """A fresh step for one run."""

    def course(
        self, schedule: Schedule, n: int, strength: float = 1.0, exact: bool = False
    ) -> Course:
        """A fresh course of n steps; below strength 1, of its last part."""
        return self.along(schedule, self.times(schedule, n, strength, exact))

    def along(self, schedule: Schedule, times: tuple[float, ...]) -> Course:
        """A fresh course over any two or more levels: a caller's own, or the way back up."""

        def first(noise: Tensor) -> Tensor:
            # As wide as x is at that level when the latents have unit variance.
            return noise * schedule.spread(times[0])

        def noisy(z: Tensor, noise: Tensor, t: float) -> Tensor:
            return schedule.alpha(t) * z + schedule.sigma(t) * noise

        return Course(times, self.stepper(schedule), first, noisy)


@dataclass(frozen=True)
class GridSampler(NativeSampler):
    """A sampler at home on any time grid; `spacing` is one of grids.SPACINGS."""

    spacing: str = "trailing"

    def times(
        self, schedule: Schedule, n: int, strength: float = 1.0, exact: bool = False
    ) -> tuple[float, ...]:
        """n + 1 levels of the grid, less the leading ones that `strength` skips."""
        total, first = share(n, strength, schedule.num_train_timesteps, exact)
        return grid(schedule, total, self.spacing)[first:]


def share(n: int, strength: float, most: int, exact: bool = False) -> tuple[int, int]:
    """(steps of the whole grid, how many of them image-to-image leaves out at the start).

    It runs the last int(n strength) of n steps, and one at least, since a run of none would draw
    nothing. With `exact` it runs the last n of n / strength steps; where that is more than the
    `most` that the sampler knows, it begins at the least noise that leaves it n of those.
    """
    if not exact:
        return n, n - min(max(int(n * strength), 1), n)
    total = max(n, min(math.ceil(n / strength), most))
    return total, total - n
