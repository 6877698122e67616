"""Laws of a noise schedule: signal and noise, the SDE behind them, and the two ends.

Legend: lam = ln(alpha²/sigma²); f, g = drift and diffusion; T = number of timesteps.
"""

from __future__ import annotations

import math
import pickle
from itertools import pairwise

import pytest
import torch

from ldm_pipeline.diffusion import CLEAN, Schedule
from ldm_pipeline.errors import UserError

SCHEDULES = {
    "linear": Schedule.linear(),
    "scaled_linear": Schedule.scaled_linear(),
    "cosine": Schedule.cosine(),
    "zero_snr": Schedule.scaled_linear().zero_terminal_snr(),
    "geometric": Schedule.geometric(),
    "short": Schedule.linear(10),
}
LEVELS = (-1.0, -0.9, -0.25, 0.0, 0.5, 1.0, 3.7, 8.0, 8.5, 9.0)

every = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def spread_out(schedule: Schedule) -> list[float]:
    """Levels of every kind: below 0, on and between timesteps, up to T-1."""
    last = schedule.num_train_timesteps - 1
    return [*LEVELS, *(last * u / 17 for u in range(1, 18)), last - 0.3]


@every
def test_signal_and_noise_share_unit_variance(schedule: Schedule) -> None:
    for t in spread_out(schedule):
        a, sig = schedule.alpha(t), schedule.sigma(t)
        if schedule.exploding:
            assert a == 1
        else:
            # A few roundings of float64.
            assert a**2 + sig**2 == pytest.approx(1, abs=1e-15)


@every
def test_noise_only_grows_with_the_level(schedule: Schedule) -> None:
    sigmas = [schedule.sigma(t) for t in sorted(set(spread_out(schedule)))]
    assert all(low < high for low, high in pairwise(sigmas))


@every
def test_clean_is_exactly_clean(schedule: Schedule) -> None:
    assert (schedule.alpha(CLEAN), schedule.sigma(CLEAN)) == (1.0, 0.0)
    t = torch.tensor([CLEAN])
    assert (schedule.alpha(t).item(), schedule.sigma(t).item()) == (1.0, 0.0)


def test_zero_terminal_snr_ends_in_pure_noise() -> None:
    schedule = SCHEDULES["zero_snr"]
    last = schedule.num_train_timesteps - 1
    assert (schedule.alpha(last), schedule.sigma(last)) == (0.0, 1.0)
    assert schedule.alpha(torch.tensor([last])).item() == 0.0
    # Algorithm 1 of 2305.08891 leaves the first level where it was, up to float64 rounding.
    assert schedule.alpha(0) == pytest.approx(Schedule.scaled_linear().alpha(0), abs=1e-14)


@every
def test_tensors_get_the_answers_that_floats_get(schedule: Schedule) -> None:
    levels = spread_out(schedule)
    t = torch.tensor(levels, dtype=torch.float64)
    for name in ("log_snr", "alpha", "sigma", "slope", "drift", "diffusion"):
        answer = getattr(schedule, name)
        one_by_one = torch.tensor([answer(u) for u in levels], dtype=torch.float64)
        # Different libms may differ in the last bits of float64.
        torch.testing.assert_close(answer(t), one_by_one, rtol=1e-12, atol=1e-14)


@every
def test_level_of_undoes_log_snr(schedule: Schedule) -> None:
    levels = spread_out(schedule)
    t = torch.tensor(levels, dtype=torch.float64)
    # lam is only known to 1e-15 of its size, and its smallest slope is near 0.005 a timestep.
    torch.testing.assert_close(schedule.level_of(schedule.log_snr(t)), t, rtol=0, atol=1e-10)
    for u in levels:
        assert schedule.level_of(schedule.log_snr(u)) == pytest.approx(u, abs=1e-10)


@every
def test_levels_outside_the_grid_are_held_at_its_ends(schedule: Schedule) -> None:
    last = schedule.num_train_timesteps - 1
    assert schedule.log_snr(-7.0) == math.inf
    assert schedule.log_snr(last + 5.0) == schedule.log_snr(float(last))
    assert schedule.level_of(-1e9) == last


@every
def test_drift_and_diffusion_are_derivatives(schedule: Schedule) -> None:
    """f = d ln(alpha)/dt and g² = d sigma²/dt - 2 f sigma², by central differences."""
    h = 1e-3
    last = schedule.num_train_timesteps - 1
    for t in (-0.5, 0.5, 3.5, last * 0.5 + 0.2, last - 1.5, last - 0.4):
        a, sig = schedule.alpha(t), schedule.sigma(t)
        f = (math.log(schedule.alpha(t + h)) - math.log(schedule.alpha(t - h))) / (2 * h)
        rise = (schedule.sigma(t + h) ** 2 - schedule.sigma(t - h) ** 2) / (2 * h)
        # The difference quotient's own error: h² times third derivatives, and rounding / h.
        assert schedule.drift(t) == pytest.approx(f, rel=1e-4, abs=1e-10), (t, a)
        assert schedule.diffusion(t) ** 2 == pytest.approx(rise - 2 * f * sig**2, rel=1e-4)


@every
def test_the_sde_is_finite_at_both_ends(schedule: Schedule) -> None:
    for t in (CLEAN, float(schedule.num_train_timesteps - 1)):
        assert math.isfinite(schedule.drift(t))
        assert math.isfinite(schedule.diffusion(t))


def test_the_sde_carries_the_marginals() -> None:
    """Mean and variance of dx = f x dt + g dw, integrated by hand, are those of x_t."""
    schedule = SCHEDULES["scaled_linear"]
    mean, variance, h = schedule.alpha(0.0), schedule.sigma(0.0) ** 2, 0.05
    for i in range(int(900 / h)):
        t = (i + 0.5) * h
        f, g = schedule.drift(t), schedule.diffusion(t)
        mean += h * f * mean
        variance += h * (2 * f * variance + g**2)
    # Euler's method errs by about h/2 times the squared rate summed over the way: below 1e-3.
    assert mean == pytest.approx(schedule.alpha(900.0), rel=1e-3)
    assert variance == pytest.approx(schedule.sigma(900.0) ** 2, rel=1e-3)


def test_coefficients_fit_what_they_multiply() -> None:
    schedule = SCHEDULES["scaled_linear"]
    x = torch.zeros(3, 4, 2, 2, dtype=torch.float64)
    a, sig = schedule.coefficients(torch.tensor([0, 500, 999]), like=x)
    assert isinstance(a, torch.Tensor)
    assert isinstance(sig, torch.Tensor)
    assert a.shape == sig.shape == (3, 1, 1, 1)
    assert a.dtype == sig.dtype == x.dtype
    assert a[1].item() == pytest.approx(schedule.alpha(500.0), abs=1e-15)
    assert schedule.coefficients(500.0, like=x) == (schedule.alpha(500.0), schedule.sigma(500.0))


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_the_table_is_that_of_stock_schedulers(kind: str) -> None:
    from diffusers import DDIMScheduler

    stock = DDIMScheduler(beta_schedule=kind, beta_start=0.0009, beta_end=0.011)
    alpha_bar = stock.alphas_cumprod.double()
    schedule = Schedule.from_config(stock.config)
    ours = schedule.alpha(torch.arange(1000, dtype=torch.float64)) ** 2
    # The same float32 table; the way through ln and back costs a few float64 roundings of lam.
    torch.testing.assert_close(ours, alpha_bar, rtol=1e-13, atol=0)


def test_configs_with_trained_betas_and_zero_snr() -> None:
    from diffusers import DDIMScheduler

    betas = torch.linspace(0.001, 0.3, 20).tolist()
    stock = DDIMScheduler(num_train_timesteps=20, trained_betas=betas, rescale_betas_zero_snr=True)
    schedule = Schedule.from_config(stock.config)
    ours = schedule.alpha(torch.arange(20, dtype=torch.float64)) ** 2
    # Stock rescales in float32 and goes through betas and back; ours stays in float64.
    torch.testing.assert_close(ours, stock.alphas_cumprod.double(), rtol=1e-4, atol=1e-7)


def test_schedules_are_values() -> None:
    schedule = Schedule.linear()
    assert schedule == Schedule.linear()
    assert hash(schedule) == hash(Schedule.linear())
    assert schedule != Schedule.linear(beta_end=0.03)
    assert pickle.loads(pickle.dumps(schedule)) == schedule


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="did you mean 'scaled_linear'"):
        Schedule.from_config({"beta_schedule": "scaled_linaer"})
    with pytest.raises(UserError, match="at least 2"):
        Schedule.from_betas([0.1])
    for betas in ([0.1, 0.0, 0.1], [0.1, 1.0, 0.1], [0.1, -0.2, 0.1], [0.1, math.nan, 0.1]):
        with pytest.raises(UserError):
            Schedule.from_betas(betas)
