"""From a caller's choice to a sampler: by name, or the pipeline's own scheduler.

Legend
    level    of noise, in timesteps of the training grid
    sigma    noise per signal, sig / alpha, the scale in which stock schedulers take custom levels
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ldm_pipeline.diffusion.course import Course, NativeSampler, Sampler, share
from ldm_pipeline.diffusion.samplers import SAMPLERS, Consistency, Renoise
from ldm_pipeline.diffusion.schedule import CLEAN, Schedule
from ldm_pipeline.errors import UserError
from ldm_pipeline.models.schedulers import StockSampler, stock_sampler

logger = logging.getLogger(__name__)


def choose_sampler(
    name: str | None,
    scheduler: Any,
    *,
    eta: float | None = None,
    timesteps: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
    consistency: Consistency | None = None,
) -> Sampler:
    """The sampler called `name`; None is `scheduler` itself, as a stock pipeline runs it.

    `eta` is for those that know it: DDIM, and stock schedulers that accept one. None is 0, and of
    those called by name their own default. Custom `timesteps` or `sigmas`, descending,
    replace the sampler's own grid. `consistency` is what "lcm" means and how many levels "tcd" has,
    which stock spaces evenly, unless these are the default.
    Raises `UserError` where a stock scheduler takes neither.
    """
    chosen_timesteps = tuple(timesteps) if timesteps is not None else None
    chosen_sigmas = tuple(sigmas) if sigmas is not None else None
    if name in SAMPLERS:
        told = {"ddim": Renoise.ddim(eta or 0.0), "lcm": consistency or SAMPLERS["lcm"]}
        native = told.get(name, SAMPLERS[name])
        if chosen_timesteps is None and chosen_sigmas is None:
            return native
        assert isinstance(native, NativeSampler)
        return AtLevels(native, chosen_timesteps, chosen_sigmas)
    if name is None:
        return StockSampler(scheduler, chosen_timesteps, chosen_sigmas, eta or 0.0)
    config = dict(scheduler.config)
    if name == "tcd" and consistency is not None:
        config["original_inference_steps"] = consistency.original_steps
    named = stock_sampler(name, config)
    return StockSampler(named.scheduler, chosen_timesteps, chosen_sigmas, eta)


@dataclass(frozen=True)
class AtLevels:
    """A native sampler on levels that the caller chose; the number of steps follows from them."""

    sampler: NativeSampler
    timesteps: tuple[int, ...] | None = None
    sigmas: tuple[float, ...] | None = None

    def course(
        self, schedule: Schedule, n: int, strength: float = 1.0, exact: bool = False
    ) -> Course:
        """A fresh course over the chosen levels; below strength 1, over their last part, unless
        all of them are to be visited (`exact`)."""
        levels = self.levels(schedule)
        _, first = share(len(levels), strength, len(levels), exact)
        return self.sampler.along(schedule, (*levels[first:], CLEAN))

    def levels(self, schedule: Schedule) -> tuple[float, ...]:
        """The chosen levels, checked: descending, on the schedule; a closing sigma 0 is CLEAN."""
        if self.timesteps is not None:
            name, levels = "timesteps", tuple(float(t) for t in self.timesteps)
        else:
            kept = [sigma for sigma in self.sigmas or () if sigma > 0]
            name, levels = "sigmas", tuple(schedule.level_of(-2 * math.log(s)) for s in kept)
        last = schedule.num_train_timesteps - 1
        falling = all(high > low for high, low in pairwise(levels))
        if not levels or not falling or levels[0] > last or levels[-1] < 0:
            raise UserError(f"{name} must fall, and lie between timesteps {last} and 0")
        return levels


def upgrade_config(scheduler: Any) -> None:
    """Bring an old scheduler's config up to date, in place, as stock pipelines do.

    A stock Stable Diffusion pipeline sets `steps_offset=1` and `clip_sample=False` when it is
    built, whatever the config says; doing the same lets a folder draw one picture in either.
    """
    if scheduler is None:
        return
    for key, right in (("steps_offset", 1), ("clip_sample", False)):
        found = scheduler.config.get(key, right)
        if found != right:
            logger.info(
                "%s has %s=%s; Stable Diffusion pipelines use %s, and so does this one",
                type(scheduler).__name__,
                key,
                found,
                right,
            )
            scheduler.register_to_config(**{key: right})
