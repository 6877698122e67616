"""Every sampler against data whose denoiser is known, and against its stock counterpart.

The data are z ~ N(mu, s²). Runs start from the true marginal at their first level: from N(0, 1) the
mean would be off by the signal that the schedule leaves at T, which is no fault of a sampler.

Legend
    x        latents; x_t = a z + sig eps
    order    p, where halving the steps' length divides the error by 2^p
    x_hat    x / a, the scale in which stock Euler and Heun keep their latents
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipeline.diffusion import (
    CLEAN,
    SAMPLERS,
    Consistency,
    Denoiser,
    DPMSolverPP2M,
    Gaussian,
    GridSampler,
    Heun,
    NativeSampler,
    Noise,
    Plan,
    Renoise,
    Sampler,
    Schedule,
    Stop,
    make_denoiser,
    run,
)

SCHEDULE = Schedule.scaled_linear()
ORACLE = Gaussian(SCHEDULE)
COUNT = 4 * 64 * 64
"""Samples behind every statistic: a mean is known to s/128, a spread to s/181."""

samplers = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())


def draw(sampler: Sampler, denoiser: Denoiser, oracle: Gaussian, n: int, seed: int = 0) -> Tensor:
    """COUNT values drawn in n steps from the true marginal, in float64."""
    noise = Noise.of([seed])
    course = sampler.course(oracle.schedule, n)
    mean, spread = oracle.marginal(course.times[0])
    start = mean + spread * noise.draw((4, 64, 64), torch.float64)
    return run(Plan(start, course.times), denoiser, course.step, noise)


def ideal(sampler: Sampler, oracle: Gaussian) -> Denoiser:
    """The model that the sampler is made for."""
    return oracle.consistency if isinstance(sampler, Consistency) else oracle.denoiser


# -- the distribution -----------------------------------------------------------------------------


@samplers
@pytest.mark.parametrize(
    "oracle",
    [ORACLE, Gaussian(Schedule.geometric(), mu=-3.0, s=1.5)],
    ids=["preserving", "exploding"],
)
def test_draws_have_the_mean_and_spread_of_the_data(sampler: Sampler, oracle: Gaussian) -> None:
    n = 50 if isinstance(sampler, Consistency) else 500
    x = draw(sampler, ideal(sampler, oracle), oracle, n)
    # Four standard errors. On top, first-order samplers keep an error of the order of 1 / n, and
    # the last step, which ends in E[z | x], narrows the spread: 2 % covers both at n = 500.
    assert x.mean().item() == pytest.approx(oracle.mu, abs=4 * oracle.s / COUNT**0.5)
    relative = 4 / (2 * COUNT) ** 0.5 + 0.02
    assert x.std().item() == pytest.approx(oracle.s, rel=relative)


def test_only_a_consistency_model_keeps_the_spread_in_few_steps() -> None:
    """LCM noises f(x) again: f must be a draw, not the mean of all draws that x allows."""
    kept = draw(SAMPLERS["lcm"], ORACLE.consistency, ORACLE, 4)
    collapsed = draw(SAMPLERS["lcm"], ORACLE.denoiser, ORACLE, 4)
    # Four standard errors; the true map is exact at every number of steps.
    assert kept.std().item() == pytest.approx(ORACLE.s, rel=4 / (2 * COUNT) ** 0.5)
    # The posterior at the last level, 259, has most of its spread averaged away.
    assert collapsed.std().item() < 0.5 * ORACLE.s


# -- the deterministic map ------------------------------------------------------------------------


def error(sampler: NativeSampler, n: int, top: float = 900.0, bottom: float = 50.0) -> float:
    """How far n steps from `top` to `bottom` end from the exact flow, at two spreads."""
    mean, spread = ORACLE.marginal(top)
    x = mean + spread * torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 1, 9)
    times = tuple(top + (bottom - top) * i / n for i in range(n + 1))
    end = run(Plan(x, times), ORACLE.denoiser, sampler.stepper(SCHEDULE), Noise.of([0]))
    return (end - ORACLE.flow(x, top, bottom)).abs().max().item()


@pytest.mark.parametrize(
    "sampler,order",
    [(Renoise.ddim(), 1), (Renoise.euler(), 1), (Heun(), 2), (DPMSolverPP2M(), 2)],
    ids=["ddim", "euler", "heun", "dpmpp_2m"],
)
def test_solvers_converge_to_the_flow_at_their_order(sampler: NativeSampler, order: int) -> None:
    errors = [error(sampler, n) for n in (40, 80, 160, 320)]
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    # The next term of the expansion still shows at 320 steps; orders 1 and 2 are well apart.
    assert orders[-1] == pytest.approx(order, abs=0.15), orders
    assert errors[-1] < 0.01


def test_inversion_climbs_back_where_it_came_from() -> None:
    """The same step over ascending levels inverts a drawing, to its own order."""
    mean, spread = ORACLE.marginal(600.0)
    x = mean + spread * torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 1, 9)
    levels = tuple(600.0 * (1 - i / 200) for i in range(201))
    step = Heun().stepper(SCHEDULE)
    down = run(Plan(x, levels), ORACLE.denoiser, step, Noise.of([0]))
    up = run(Plan(down, levels[::-1]), ORACLE.denoiser, step, Noise.of([0]))
    # Second order at 200 steps: a few 1e-5 of the spread.
    torch.testing.assert_close(up, x, rtol=0, atol=1e-3)
    assert (
        run(
            Plan(x, (CLEAN, 300.0)),
            ORACLE.denoiser,
            Renoise.ddim().stepper(SCHEDULE),
            Noise.of([0]),
        )
        .isfinite()
        .all()
    )


# -- parity ---------------------------------------------------------------------------------------

CONFIG: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


def exact_table(scheduler: Any) -> Any:
    """The stock scheduler with its float32 table in float64: the values that ours computes with."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


def network(x: Tensor, t: Tensor) -> Tensor:
    """A stand-in for a UNet: bounded, nonlinear, aware of the level and of its neighbours."""
    level = (t.to(x.dtype) / 1000).view(-1, 1, 1, 1)
    return torch.tanh(x + 0.5 * x.roll(1, dims=-1)) * (0.6 + 0.3 * level)


def both(
    sampler: NativeSampler, scheduler: Any, n: int, dtype: torch.dtype, shared_scale: bool = True
) -> tuple[Tensor, Tensor]:
    """The latents of ours and of stock, from the same start and the same generators.

    Without `shared_scale` the stock latents are x_hat at every level.
    """
    scheduler.set_timesteps(n)
    course = sampler.course(SCHEDULE, n)
    seeds = range(2)
    noise = Noise.of(seeds)
    x = noise.draw((4, 8, 8), dtype)
    denoiser = make_denoiser(network, SCHEDULE, "epsilon")
    ours = run(Plan(x, course.times), denoiser, course.step, noise)

    generators = list(Noise.of(seeds).generators)
    theirs = torch.cat([torch.randn(1, 4, 8, 8, generator=g, dtype=dtype) for g in generators])
    if not shared_scale:
        theirs = theirs / SCHEDULE.alpha(course.times[0])
    takes_noise = not isinstance(sampler, Heun | DPMSolverPP2M)
    extra: dict[str, Any] = {"generator": generators} if takes_noise else {}
    if type(scheduler).__name__ == "DDIMScheduler":
        assert isinstance(sampler, Renoise)
        extra["eta"] = sampler.eta
    for t in scheduler.timesteps:
        answer = network(scheduler.scale_model_input(theirs, t), t.expand(2))
        theirs = scheduler.step(answer, t, theirs, **extra).prev_sample
    return ours, theirs


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_ddim_is_stock_ddim(eta: float, spacing: str) -> None:
    from diffusers import DDIMScheduler

    stock = DDIMScheduler(**CONFIG, clip_sample=False, timestep_spacing=spacing, steps_offset=1)
    sampler = replace(Renoise.ddim(eta), spacing=spacing)
    # Trailing steps must divide 1000, or stock steps to a level that its loop does not visit.
    ours, theirs = both(sampler, exact_table(stock), 20, torch.float64)
    # Rounding of float64 (1e-16), at values up to 42.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("n", [20, 30])
def test_ddpm_is_stock_ddpm(n: int) -> None:
    from diffusers import DDPMScheduler

    stock = DDPMScheduler(**CONFIG, clip_sample=False, timestep_spacing="trailing")
    ours, theirs = both(Renoise.ddpm(), exact_table(stock), n, torch.float64)
    # Stock holds its variance above 1e-20, so its last step still adds noise of size 1e-10.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_lcm_is_stock_lcm() -> None:
    from diffusers import LCMScheduler

    for n in (1, 4, 8):
        stock = exact_table(LCMScheduler(**CONFIG))
        ours, theirs = both(Consistency(), stock, n, torch.float64)
        # Stock takes c_skip and c_out of a timestep tensor, in float32: 6e-8 of 41,
        # in each of 8 steps.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["euler", "euler_a", "heun", "dpmpp_2m"])
def test_solvers_in_sigma_are_stock_ones_where_the_grids_meet(name: str) -> None:
    """28 linspace steps fall on timesteps: 27 * 37 = 999; between them stock interpolates sigma,
    ours its logarithm."""
    import diffusers

    classes = {
        "euler": diffusers.EulerDiscreteScheduler,
        "euler_a": diffusers.EulerAncestralDiscreteScheduler,
        "heun": diffusers.HeunDiscreteScheduler,
        "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    }
    # Stock DPM-Solver counts one timestep further with linspace than it uses; trailing agrees.
    spacing, n = ("trailing", 20) if name == "dpmpp_2m" else ("linspace", 28)
    settings = {**CONFIG, "timestep_spacing": spacing}
    if name == "dpmpp_2m":
        settings["final_sigmas_type"] = "zero"
    sampler = SAMPLERS[name]
    assert isinstance(sampler, GridSampler)
    ours, theirs = both(
        replace(sampler, spacing=spacing),
        classes[name](**settings),
        n,
        torch.float32,
        shared_scale=name == "dpmpp_2m",
    )
    # float32 on both sides: 1e-7 of values up to 38, in each of 28 steps.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


# -- laws of every sampler ------------------------------------------------------------------------


def pictures(sampler: Sampler, seeds: list[int], n: int = 6) -> Tensor:
    """Latents [B, 4, 8, 8] in float32, one per seed."""
    noise = Noise.of(seeds)
    course = sampler.course(SCHEDULE, n)
    start = course.first(noise.draw((4, 8, 8)))
    denoiser = make_denoiser(network, SCHEDULE, "epsilon")
    return run(Plan(start, course.times), denoiser, course.step, noise)


@samplers
def test_an_image_is_the_same_in_any_company(sampler: Sampler) -> None:
    seeds = [11, 5, 7, 2, 3, 13, 17, 19]
    together = pictures(sampler, seeds)
    for size in (1, 2, 4, 8):
        for at in range(0, 8, size):
            apart = pictures(sampler, seeds[at : at + size])
            # Vectorised float32 arithmetic may round a lane's remainder differently.
            torch.testing.assert_close(apart, together[at : at + size], rtol=0, atol=1e-5)
    assert torch.equal(together, pictures(sampler, seeds))


@samplers
def test_threads_and_interleaved_runs_do_not_meet(sampler: Sampler) -> None:
    seeds = [[i] for i in range(8)]
    serial = [pictures(sampler, each) for each in seeds]
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(lambda each: pictures(sampler, each), seeds))
    assert all(torch.equal(a, b) for a, b in zip(serial, threaded, strict=True))


@samplers
@pytest.mark.parametrize("spacing", [None, "trailing", "linspace", "karras"])
def test_zero_terminal_snr_draws_finite_pictures(sampler: Sampler, spacing: str | None) -> None:
    oracle = Gaussian(SCHEDULE.zero_terminal_snr())
    denoiser = make_denoiser(oracle.network("v_prediction"), oracle.schedule, "v_prediction")
    if isinstance(sampler, Consistency):
        denoiser = oracle.consistency
    chosen = sampler
    if spacing is not None and isinstance(sampler, GridSampler):
        chosen = replace(sampler, spacing=spacing)
    x = draw(chosen, denoiser, oracle, 50)
    assert x.isfinite().all()
    # The data are found again, as nearly as 50 steps on a grid made for another schedule can.
    assert x.mean().item() == pytest.approx(oracle.mu, abs=4 * oracle.s / COUNT**0.5)
    assert x.std().item() == pytest.approx(oracle.s, rel=0.2)


@samplers
def test_no_step_waits_for_the_device(sampler: Sampler) -> None:
    """On torch's meta device there are no values: to read one back is an error."""
    noise = Noise.of([1, 2])
    course = sampler.course(SCHEDULE, 4)
    start = course.first(noise.draw((4, 8, 8), device="meta"))
    denoiser = make_denoiser(network, SCHEDULE, "v_prediction")
    x = run(Plan(start, course.times), denoiser, course.step, noise)
    assert (x.shape, x.device.type) == ((2, 4, 8, 8), "meta")


def test_gradients_flow_through_a_whole_run() -> None:
    x = torch.ones(1, 4, 2, 2, requires_grad=True)
    course = SAMPLERS["dpmpp_2m"].course(SCHEDULE, 4)
    run(Plan(x, course.times), ORACLE.denoiser, course.step, Noise.of([0])).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().min() > 0


# -- the course and the loop ----------------------------------------------------------------------


def test_a_course_starts_where_its_schedule_says() -> None:
    z, n = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 3.0)
    for schedule, width in ((SCHEDULE, 1.0), (Schedule.geometric(sigma_max=9.0), 82**0.5)):
        course = SAMPLERS["ddim"].course(schedule, 4)
        # float32 rounding.
        assert course.first(n).item() == pytest.approx(3 * width, rel=1e-6)
        wanted = 2 * schedule.alpha(400.0) + 3 * schedule.sigma(400.0)
        assert course.noisy(z, n, 400.0).item() == pytest.approx(wanted, rel=1e-6)
        assert torch.equal(course.noisy(z, n, CLEAN), z)


def test_the_loop_constrains_watches_and_stops() -> None:
    seen: list[tuple[int, float, float, float]] = []

    def step(denoiser: Denoiser, x: Tensor, t: float, s: float, noise: Noise) -> Tensor:
        return x + 1

    def watch(i: int, t: float, s: float, x: Tensor) -> Tensor | Stop:
        seen.append((i, t, s, x.item()))
        return Stop(x) if i == 2 else x + 100

    plan = Plan(torch.zeros(1), (9.0, 6.0, 3.0, 1.0, CLEAN), constrain=lambda x, s: x * 10 + s)
    end = run(plan, ORACLE.denoiser, step, Noise.of([0]), watch)
    assert seen == [(0, 9.0, 6.0, 16.0), (1, 6.0, 3.0, 1173.0), (2, 3.0, 1.0, 12741.0)]
    assert end.item() == 12741.0
