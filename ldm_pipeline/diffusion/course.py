"""What every sampler offers: given a schedule and a number of steps, a fresh course to run.

Legend
    t, s     the level a step starts from and the level it ends on
    n        number of steps;  strength in (0, 1]: the share of them that image-to-image runs
    z        clean latents [B, C, h, w]
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ldm_pipeline.diffusion.grids import grid
from ldm_pipeline.diffusion.loop import Step
from ldm_pipeline.diffusion.schedule import Schedule


@dataclass(frozen=True)
class Course:
    """One run of a sampler. It belongs to that run alone: its step may keep a history.

    times  the levels to visit, len(times) - 1 steps, ending in CLEAN
    step   the step, for `loop.run`
    first  first(noise) -> where a run without a picture starts, from unit noise [B, C, h, w]
    noisy  noisy(z, noise, t) -> z at level t, in the scale in which this sampler keeps x
    """

    times: tuple[float, ...]
    step: Step
    first: Callable[[Tensor], Tensor]
    noisy: Callable[[Tensor, Tensor, float], Tensor]


class Sampler(Protocol):
    """A way to draw: a value without state, shared by any number of runs."""

    def course(self, schedule: Schedule, n: int, strength: float = 1.0) -> Course:
        """A fresh course of n steps; below strength 1, of its last part."""


class NativeSampler(ABC):
    """A sampler of ours: its x is alpha z + sigma eps at every level."""

    @abstractmethod
    def times(self, schedule: Schedule, n: int, strength: float = 1.0) -> tuple[float, ...]:
        """The levels of n steps, descending to CLEAN; below strength 1, of image-to-image."""

    @abstractmethod
    def stepper(self, schedule: Schedule) -> Step:
        """A fresh step for one run."""

    def course(self, schedule: Schedule, n: int, strength: float = 1.0) -> Course:
        """A fresh course of n steps; below strength 1, of its last part."""
        return self.along(schedule, self.times(schedule, n, strength))

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

    def times(self, schedule: Schedule, n: int, strength: float = 1.0) -> tuple[float, ...]:
        """n + 1 levels of the grid, less the leading ones that `strength` skips."""
        return grid(schedule, n, self.spacing)[skipped(n, strength) :]


def skipped(n: int, strength: float) -> int:
    """How many of n steps an image-to-image run leaves out at the start; one is always run."""
    return n - min(max(int(n * strength), 1), n)
