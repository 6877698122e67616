"""From a caller's choice to a sampler."""

from __future__ import annotations

from typing import Any

import pytest

from ldm_pipeline.diffusion.samplers import SAMPLERS
from ldm_pipeline.diffusion.schedule import CLEAN, Schedule
from ldm_pipeline.errors import UserError
from ldm_pipeline.models.sampling import AtLevels, choose_sampler, upgrade_config
from ldm_pipeline.models.schedulers import STOCK_SCHEDULERS, StockSampler
from ldm_pipeline.request import SAMPLER_NAMES


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_every_name_gives_a_course(components: dict[str, Any], name: str) -> None:
    scheduler = components["scheduler"]
    before = dict(scheduler.config)
    schedule = Schedule.from_config(scheduler.config)
    course = choose_sampler(name, scheduler).course(schedule, 6)
    assert course.times[-1] == CLEAN
    assert len(course.times) > 6
    assert dict(scheduler.config) == before
    assert scheduler.num_inference_steps is None, "the component itself is not run"


def test_none_is_the_pipeline_s_own_scheduler(components: dict[str, Any]) -> None:
    sampler = choose_sampler(None, components["scheduler"], eta=0.25)
    assert isinstance(sampler, StockSampler)
    assert sampler.scheduler is components["scheduler"]
    assert sampler.eta == 0.25


def test_a_named_stock_sampler_keeps_its_own_eta(components: dict[str, Any]) -> None:
    for eta, expected in ((None, None), (0.0, 0.0), (0.4, 0.4)):
        sampler = choose_sampler("tcd", components["scheduler"], eta=eta)
        assert isinstance(sampler, StockSampler)
        assert sampler.eta == expected
        assert type(sampler.scheduler).__name__ == STOCK_SCHEDULERS["tcd"]


def test_custom_levels() -> None:
    schedule = Schedule.scaled_linear()
    euler = SAMPLERS["euler"]
    chosen = choose_sampler("euler", None, timesteps=[900, 500, 100])
    assert isinstance(chosen, AtLevels)
    assert chosen.sampler == euler
    assert chosen.course(schedule, 50).times == (900.0, 500.0, 100.0, CLEAN)
    assert chosen.course(schedule, 50, strength=0.4).times == (100.0, CLEAN)
    sigma = schedule.sigma(500.0) / schedule.alpha(500.0)
    (level,) = AtLevels(chosen.sampler, sigmas=(sigma, 0.0)).levels(schedule)
    # Level -> sigma -> level, through an exponential and a logarithm in float64.
    assert level == pytest.approx(500.0, abs=1e-8)


@pytest.mark.parametrize("timesteps", [(), (5, 5), (100, 200), (1000, 1), (5, -1)])
def test_levels_that_cannot_be_walked(timesteps: tuple[int, ...]) -> None:
    sampler = choose_sampler("ddim", None, timesteps=timesteps)
    with pytest.raises(UserError, match="timesteps must fall"):
        sampler.course(Schedule.scaled_linear(), 3)


def test_upgrade_config() -> None:
    """Two entries are corrected, once; nothing else is touched."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_start=0.001)
    before = dict(scheduler.config)
    assert (before["steps_offset"], before["clip_sample"]) == (0, True)
    upgrade_config(scheduler)
    assert dict(scheduler.config) == {**before, "steps_offset": 1, "clip_sample": False}
    settled = scheduler.config
    upgrade_config(scheduler)
    assert scheduler.config is settled
    upgrade_config(None)
