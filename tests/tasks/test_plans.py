"""Tasks as plans, over data whose denoiser is known: z ~ N(mu, s²), each value alone.

Legend
    z        clean latents;  n  the noise added to them;  x = a z + sig n
    flow     where the probability-flow ODE takes x
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ldm_pipeline.diffusion import (
    CLEAN,
    SAMPLERS,
    Consistency,
    Gaussian,
    Noise,
    Renoise,
    Sampler,
    Schedule,
    run,
)
from ldm_pipeline.diffusion.course import share
from ldm_pipeline.diffusion.grids import consistency_grid, distilled_levels
from ldm_pipeline.tasks.generate import generate
from ldm_pipeline.tasks.img2img import img2img
from ldm_pipeline.tasks.inpaint import inpaint

SCHEDULE = Schedule.scaled_linear()
ORACLE = Gaussian(SCHEDULE)
SHAPE = (4, 64, 64)
COUNT = 4 * 64 * 64
"""Values behind every statistic: a mean is known to s/128, a spread to s/181."""

samplers = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())


def data(seed: int) -> Tensor:
    """Latents [1, 4, 64, 64] of the oracle's data, in float64."""
    return ORACLE.mu + ORACLE.s * Noise.of([seed]).draw(SHAPE, torch.float64)


def drawn_anew(sampler: Sampler, z: Tensor, n: Tensor, strength: float, steps: int) -> Tensor:
    """Image to image with the model that the sampler is made for."""
    course = sampler.course(SCHEDULE, steps, strength)
    denoiser = ORACLE.consistency if isinstance(sampler, Consistency) else ORACLE.denoiser
    return run(img2img(z, n, course), denoiser, course.step, Noise.of([9]))


@samplers
@pytest.mark.parametrize("strength", [0.2, 0.6, 1.0])
def test_a_picture_of_the_data_becomes_another_of_the_data(
    sampler: Sampler, strength: float
) -> None:
    """Whatever the strength, mean and spread stay; what stays of the picture itself is known.

    Along the flow that is what the noise left of it, r = a s / d at the first level. Drawing from
    the posterior, as DDPM does, forgets as much again: r². LCM forgets anew at every level.
    """
    z, n = data(1), Noise.of([2]).draw(SHAPE, torch.float64)
    steps = 50 if isinstance(sampler, Consistency) else 300
    x = drawn_anew(sampler, z, n, strength, steps)
    # Four standard errors, and what few steps cost: the last one ends in E[z | x], which narrows.
    assert x.mean().item() == pytest.approx(ORACLE.mu, abs=4 * ORACLE.s / COUNT**0.5 + 0.005)
    assert x.std().item() == pytest.approx(ORACLE.s, rel=0.05)
    left = [
        SCHEDULE.alpha(t) * ORACLE.s / ORACLE.marginal(t)[1]
        for t in sampler.course(SCHEDULE, steps, strength).times[:-1]
    ]
    expected = left[0] ** (2 if isinstance(sampler, Renoise) and sampler.eta == 1 else 1)
    if isinstance(sampler, Consistency):
        expected = math.prod(left)
    kept = float(torch.corrcoef(torch.stack([x.flatten(), z.flatten()]))[0, 1])
    assert kept == pytest.approx(expected, abs=4 / COUNT**0.5 + 0.005)


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("strength", [0.3, 0.9])
def test_without_fresh_noise_it_follows_the_flow(name: str, strength: float) -> None:
    """Also from a picture that is none of the data: each value ends where the ODE takes it."""
    z = torch.linspace(-2, 3, COUNT, dtype=torch.float64).view(1, *SHAPE)
    n = Noise.of([2]).draw(SHAPE, torch.float64)
    sampler = SAMPLERS[name]
    t = sampler.course(SCHEDULE, 400, strength).times[0]
    x = SCHEDULE.alpha(t) * z + SCHEDULE.sigma(t) * n
    ended = drawn_anew(sampler, z, n, strength, 400)
    # First-order samplers err by about one step in 400 of the way, which is 5 here.
    assert (ended - ORACLE.flow(x, t, CLEAN)).abs().max() < 0.05


def test_a_consistency_model_leaps_where_the_flow_ends() -> None:
    z, n = data(1), Noise.of([2]).draw(SHAPE, torch.float64)
    course = SAMPLERS["lcm"].course(SCHEDULE, 1, 0.5)
    assert course.times == (499.0, CLEAN)
    x = SCHEDULE.alpha(499.0) * z + SCHEDULE.sigma(499.0) * n
    ended = drawn_anew(SAMPLERS["lcm"], z, n, 0.5, 1)
    # c_skip of the boundary condition is 1e-8 at this level.
    torch.testing.assert_close(ended, ORACLE.flow(x, 499.0, CLEAN), rtol=0, atol=1e-6)


@samplers
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_inpainting_keeps_what_is_known_and_draws_the_rest(
    sampler: Sampler, strength: float
) -> None:
    z = torch.full((1, *SHAPE), -3.0, dtype=torch.float64)  # far from all data
    z[..., 32:] = data(1)[..., 32:]
    mask = torch.zeros(1, 1, 64, 64, dtype=torch.float64)
    mask[..., 32:] = 1
    n = Noise.of([2]).draw(SHAPE, torch.float64)
    steps = 50 if isinstance(sampler, Consistency) else 300
    course = sampler.course(SCHEDULE, steps, strength)
    denoiser = ORACLE.consistency if isinstance(sampler, Consistency) else ORACLE.denoiser
    begun = generate(n, course) if strength == 1 else img2img(z, n, course)
    x = run(inpaint(begun, z, mask, n, course), denoiser, course.step, Noise.of([9]))
    assert torch.equal(x[..., :32], z[..., :32])
    painted = x[..., 32:]
    # From pure noise the schedule's last 0.07 of signal is missed: the mean is off by as much.
    slack = 0.05 if strength == 1 else 0.005
    assert painted.mean().item() == pytest.approx(ORACLE.mu, abs=4 * 0.4 / 90 + slack)
    assert painted.std().item() == pytest.approx(ORACLE.s, rel=0.05)


def test_at_every_level_the_known_part_has_that_level_s_noise() -> None:
    z, n = data(1), Noise.of([2]).draw(SHAPE, torch.float64)
    mask = torch.zeros(1, 1, 64, 64, dtype=torch.float64)
    course = SAMPLERS["ddim"].course(SCHEDULE, 5)
    plan = inpaint(generate(n, course), z, lambda: mask, n, course)
    assert plan.constrain is not None
    for s in course.times[1:]:
        expected = SCHEDULE.alpha(s) * z + SCHEDULE.sigma(s) * n
        assert torch.equal(plan.constrain(torch.zeros_like(z), s), expected)
    mask += 1  # read anew at every step
    assert torch.equal(plan.constrain(torch.zeros_like(z), 500.0), torch.zeros_like(z))


# Which steps are run --------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.001, 0.01, 0.1, 0.3, 0.7, 0.999, 1.0])
@pytest.mark.parametrize("n", [1, 2, 4, 25, 50])
def test_how_many_steps(n: int, strength: float) -> None:
    total, first = share(n, strength, 1000)
    assert (total, total - first) == (n, max(1, int(n * strength)))
    total, first = share(n, strength, 1000, exact=True)
    assert total - first == n
    assert n <= total <= 1000
    wanted = n / strength
    assert abs(total - wanted) <= 1 or total == 1000, "the share that is run is the strength"


@samplers
@pytest.mark.parametrize("strength", [0.001, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("n", [1, 4, 50])
def test_every_sampler_has_a_course(sampler: Sampler, strength: float, n: int) -> None:
    times = sampler.course(SCHEDULE, n, strength).times
    if isinstance(sampler, Consistency):  # strength shortens its grid, and not the steps
        assert len(times) == 1 + min(n, max(1, int(50 * strength)))
    else:
        assert len(times) == 1 + max(1, int(n * strength))
    exact = sampler.course(SCHEDULE, n, strength, exact=True).times
    assert len(exact) == 1 + n
    for levels in (times, exact):
        assert levels[-1] == CLEAN
        assert sorted(set(levels), reverse=True) == list(levels)
    if n == 4:  # it begins at that share of the noise levels, as nearly as the grid has one
        assert exact[0] <= max(1000 * strength + 60, 80)


def test_few_levels_are_the_last_of_the_distillation_s_grid() -> None:
    whole = consistency_grid(SCHEDULE, 50)
    lcm = SAMPLERS["lcm"]
    assert lcm.course(SCHEDULE, 8, 0.1).times == whole[-6:]
    assert lcm.course(SCHEDULE, 8, 0.1, exact=True).times == whole[-9:]
    assert lcm.course(SCHEDULE, 8, 0.001).times == whole[-2:]
    turned = distilled_levels(SCHEDULE, 50, spacing="angle")
    few = Consistency(spacing="angle")
    assert few.course(SCHEDULE, 4, 0.5).times[0] == max(t for t in turned if t < 500)
    assert few.course(SCHEDULE, 50, 0.01, exact=True).times == (*turned, CLEAN)
    left = tuple(t for t in turned if t < 10)
    assert few.course(SCHEDULE, 8, 0.01).times == (*left, CLEAN)
