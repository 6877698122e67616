"""Laws of the time grids: where stock schedulers have the same grid, it is the same.

Legend: T = 1000 training timesteps; n = number of steps.
"""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import pytest
import torch

from ldm_pipeline.diffusion import CLEAN, SAMPLERS, Schedule
from ldm_pipeline.diffusion.grids import SPACINGS, consistency_grid, distilled_levels, grid
from ldm_pipeline.errors import UserError

SCHEDULE = Schedule.scaled_linear()
SCHEDULES = (SCHEDULE, SCHEDULE.zero_terminal_snr(), Schedule.geometric(), Schedule.linear(7))


def stock_timesteps(scheduler: Any, n: int) -> list[float]:
    scheduler.set_timesteps(n)
    return [float(t) for t in scheduler.timesteps]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_grids_descend_from_noise_to_clean(spacing: str, schedule: Schedule) -> None:
    last = schedule.num_train_timesteps - 1
    for n in (1, 2, 3, 5, 7):
        levels = grid(schedule, n, spacing)
        assert len(levels) == n + 1
        assert levels[-1] == CLEAN
        assert all(high > low for high, low in itertools.pairwise(levels))
        assert levels[0] <= last
        if spacing != "leading":
            assert levels[0] == last


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_integer_grids_are_those_of_stock(spacing: str) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(timestep_spacing=spacing, steps_offset=1)
    for n in (2, 3, 4, 7, 8, 20, 25, 30, 50, 77, 100):
        assert list(grid(SCHEDULE, n, spacing)[:-1]) == stock_timesteps(scheduler, n)


def test_linspace_is_that_of_euler() -> None:
    from diffusers import EulerDiscreteScheduler

    for n in (2, 10, 28):
        ours = torch.tensor(grid(SCHEDULE, n, "linspace")[:-1])
        # Stock keeps its timesteps in float32: 6e-5 is half its spacing near 999.
        wanted = torch.tensor(stock_timesteps(EulerDiscreteScheduler(), n))
        torch.testing.assert_close(ours, wanted, rtol=0, atol=6.2e-5)


def test_karras_takes_equal_steps_of_the_seventh_root() -> None:
    levels = grid(SCHEDULE, 12, "karras")[:-1]
    roots = [math.exp(-SCHEDULE.log_snr(t) / 14) for t in levels]
    steps = [high - low for high, low in itertools.pairwise(roots)]
    # Rounding of float64 through exp, ln and the inverse of the table.
    assert steps == pytest.approx([steps[0]] * 11, rel=1e-9)
    assert (levels[0], levels[-1]) == (999.0, 0.0)


def test_consistency_grid_is_that_of_lcm() -> None:
    from diffusers import LCMScheduler

    scheduler = LCMScheduler()
    for n in range(1, 51):
        assert list(consistency_grid(SCHEDULE, n)[:-1]) == stock_timesteps(scheduler, n)
    for n, original, strength in ((4, 50, 0.5), (3, 100, 0.7), (5, 25, 0.9)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler.set_timesteps(n, original_inference_steps=original, strength=strength)
        ours = consistency_grid(SCHEDULE, n, original, strength)
        assert list(ours[:-1]) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("schedule", [SCHEDULE, Schedule.linear(), Schedule.cosine()])
def test_levels_of_a_distillation_turn_by_equal_angles(schedule: Schedule) -> None:
    """By the definition: arctan of noise over picture falls in equal steps to none."""
    levels = (*distilled_levels(schedule, 25, spacing="angle"), CLEAN)
    angles = [math.atan2(schedule.sigma(t), schedule.alpha(t)) for t in levels]
    assert levels[0] == 999.0
    assert all(t == int(t) for t in levels)
    widest = max(  # how far the angle turns in half a timestep, by which levels are rounded
        abs(math.atan2(schedule.sigma(t), schedule.alpha(t)) - angle)
        for level, angle in zip(levels, angles, strict=True)
        for t in (level - 0.5, level + 0.5)
    )
    wanted = [angles[0] * i / 25 for i in range(25, -1, -1)]
    assert angles == pytest.approx(wanted, abs=widest)


def test_strength_leaves_the_levels_below_that_share() -> None:
    whole = distilled_levels(SCHEDULE, 50, spacing="angle")
    assert distilled_levels(SCHEDULE, 50, 0.5, "angle") == tuple(t for t in whole if t < 500)
    assert distilled_levels(SCHEDULE, 50, 1e-4, "angle") == whole[-1:]
    assert consistency_grid(SCHEDULE, 4, 50, spacing="angle")[:-1] == whole[:1] + tuple(
        whole[i] for i in (12, 25, 37)
    )


def test_strength_leaves_the_last_steps() -> None:
    sampler = SAMPLERS["ddim"]
    whole = sampler.course(SCHEDULE, 20).times
    assert sampler.course(SCHEDULE, 20, strength=0.5).times == whole[10:]
    # Too little strength for one step still runs one: a run of none would draw nothing.
    assert sampler.course(SCHEDULE, 20, strength=0.01).times == whole[-2:]


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="did you mean 'trailing'"):
        grid(SCHEDULE, 5, "trialing")
    for n in (0, -3, 1001):
        with pytest.raises(UserError, match=f"num_inference_steps={n}"):
            grid(SCHEDULE, n, "trailing")
    with pytest.raises(UserError, match="between 1 and 50"):
        consistency_grid(SCHEDULE, 51)
    with pytest.raises(UserError, match="between 1 and 5"):
        consistency_grid(SCHEDULE, 8, strength=0.1)
    with pytest.raises(UserError, match="did you mean 'angle'"):
        distilled_levels(SCHEDULE, spacing="angel")
    with pytest.raises(UserError, match="original_steps=1000 are too many"):
        distilled_levels(SCHEDULE, 1000, spacing="angle")
    # Apart from each other, but the last one would lie below the first timestep.
    assert distilled_levels(SCHEDULE, 50, spacing="angle")[-1] >= 0
    with pytest.raises(UserError, match="original_steps=110 are too many"):
        distilled_levels(SCHEDULE, 110, spacing="angle")
    for spacing in ("even", "angle"):
        for steps in (-1, 0, 1001):
            with pytest.raises(UserError, match="must lie between 1 and the model's 1000 levels"):
                distilled_levels(SCHEDULE, steps, spacing=spacing)
