"""The consistency loss against data whose probability-flow ODE is known: who wins it, who loses it.

The data are z ~ N(mu, s²). The oracle's consistency map is where its ODE ends; its denoiser is the
posterior mean, which a few-step sampler must not draw.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ldm_pipeline.diffusion import (
    CLEAN,
    PREDICTION_TYPES,
    SOLVERS,
    Denoiser,
    Gaussian,
    Guidance,
    Heun,
    Noise,
    Renoise,
    Schedule,
    consistency_errors,
    consistency_function,
    descents,
    guided,
    guided_each,
    make_denoiser,
)
from ldm_pipeline.diffusion.grids import distilled_levels

SCHEDULE = Schedule.scaled_linear()
ORACLE = Gaussian(SCHEDULE)
PAIRS = descents(SCHEDULE)
N = 4096

Pairs = tuple[tuple[float, ...], ...]
Step = Callable[[Tensor, Tensor, Tensor], Tensor]


def drawn(t: float, seed: int = 0) -> Tensor:
    """Noisy data [N, 1, 1, 1] at level t, in float64."""
    generator = torch.Generator().manual_seed(seed)
    z, eps = torch.randn(2, N, 1, 1, 1, generator=generator, dtype=torch.float64)
    return SCHEDULE.alpha(t) * (ORACLE.mu + ORACLE.s * z) + SCHEDULE.sigma(t) * eps


def exactly(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The ODE itself as the teacher's step."""
    return ORACLE.flow(x, float(t[0]), float(s[0]))


def by(solver: str) -> Step:
    """A solver's step of the oracle as the teacher."""
    return lambda x, t, s: SOLVERS[solver](ORACLE.denoiser, SCHEDULE, x, t, s)


def loss(student: Denoiser, step: Step, huber: float | None = None, pairs: Pairs = PAIRS) -> float:
    """The mean consistency loss over pairs of the grid."""
    f = consistency_function(student)
    errors = []
    for i, (high, low) in enumerate(pairs):
        x = drawn(high, i)
        t, s = torch.full((N,), high), torch.full((N,), low)
        errors.append(consistency_errors(f(x, t), f(step(x, t, s), s), huber=huber).mean())
    return float(torch.stack(errors).mean())


@pytest.mark.parametrize("huber", [None, 0.001, 0.1])
def test_the_true_map_has_no_loss_and_a_posterior_mean_has(huber: float | None) -> None:
    # What is left of x in f at timestep 19 is c_skip = 7e-6.
    assert loss(ORACLE.consistency, exactly, huber) < 1e-10 / (2 * huber if huber else 1)
    assert loss(ORACLE.denoiser, exactly, huber) > 1e-5


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solvers_step_is_good_enough_to_tell_them_apart(solver: str) -> None:
    """The solver's own error, nearly all of it in the step to CLEAN, is an eighth of the loss of
    the posterior mean."""
    assert loss(ORACLE.consistency, by(solver)) < 0.25 * loss(ORACLE.denoiser, by(solver))


def test_a_solver_of_higher_order_teaches_more_exactly() -> None:
    """But for the last step, where both are of first order."""
    one, two = (loss(ORACLE.consistency, by(s), pairs=PAIRS[:-1]) for s in ("ddim", "heun"))
    assert two < 0.1 * one


@pytest.mark.parametrize("solver", SOLVERS)
def test_who_learns_it_level_by_level_keeps_the_spread(solver: str) -> None:
    """The best straight line through the targets at each level, the least level first. What the
    last one draws in one step from pure noise is spread as the data; posterior means collapse."""
    line: tuple[Tensor, Tensor] | None = None
    for i, (high, low) in enumerate(reversed(PAIRS)):
        x = drawn(high, i).flatten()
        t, s = torch.full((N,), high), torch.full((N,), low)
        target = by(solver)(x.view(-1, 1, 1, 1), t, s).flatten()
        if line is not None:
            target = line[0] * target + line[1]
        inputs = torch.stack([x, torch.ones_like(x)], dim=1)
        slope, offset = torch.linalg.lstsq(inputs, target[:, None]).solution.flatten()
        line = slope, offset
    assert line is not None
    x = drawn(999.0, 99)
    # 50 steps of the solvers themselves narrow it, DDIM's by 7 %.
    assert float((line[0] * x + line[1]).std()) == pytest.approx(ORACLE.s, rel=0.1)
    assert float(ORACLE.denoiser(x, 999.0).x0.std()) < 0.1 * ORACLE.s


@pytest.mark.parametrize(
    ("solver", "sampler"), [("ddim", Renoise.ddim()), ("heun", Heun())], ids=SOLVERS
)
@pytest.mark.parametrize("schedule", [SCHEDULE, SCHEDULE.zero_terminal_snr()])
def test_solvers_take_the_samplers_steps(
    solver: str, sampler: Renoise | Heun, schedule: Schedule
) -> None:
    """Each sample at its own levels, the ends without noise and without signal among them."""
    denoiser = make_denoiser(Gaussian(schedule).network("v_prediction"), schedule, "v_prediction")
    pairs = [(999.0, 979.0), (519.0, 499.0), (19.0, CLEAN)]
    x = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, s = torch.tensor(pairs).T
    together = SOLVERS[solver](denoiser, schedule, x, t, s)
    step = sampler.stepper(schedule)
    for i, (high, low) in enumerate(pairs):
        alone = step(denoiser, x[i : i + 1], high, low, Noise.of([0]))
        # Levels as tensors and as floats round otherwise; the network hears them in float32.
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-6, atol=1e-6)


def test_the_grid_is_that_of_the_sampler_and_ends_in_clean() -> None:
    assert PAIRS[0] == (999.0, 979.0)
    assert PAIRS[-1] == (19.0, CLEAN)
    assert len(PAIRS) == 50
    assert len(descents(SCHEDULE, 10)) == 10
    far = descents(SCHEDULE, stride=3)
    assert [t for t, _ in far] == [t for t, _ in PAIRS]
    assert [s for _, s in far] == [*(t for t, _ in PAIRS[3:]), CLEAN, CLEAN, CLEAN]
    assert {s for _, s in descents(SCHEDULE, stride=10**12)} == {CLEAN}
    turned = distilled_levels(SCHEDULE, 50, spacing="angle")
    assert descents(SCHEDULE, 50, "angle") == tuple(pairwise((*turned, CLEAN)))


def test_the_teacher_may_go_down_in_several_steps() -> None:
    """Of one length while levels are left; then shorter ones, the last of them to CLEAN."""
    ways = descents(SCHEDULE, stride=3, steps=2)
    assert ways[0] == (999.0, 939.0, 879.0)
    assert ways[-6:-3] == ((119.0, 59.0, CLEAN), (99.0, 59.0, CLEAN), (79.0, 39.0, CLEAN))
    assert ways[-1] == (19.0, 19.0, CLEAN)
    for stride, steps in ((1, 1), (1, 7), (6, 4), (10**12, 3)):
        for at, way in enumerate(descents(SCHEDULE, stride=stride, steps=steps)):
            assert len(way) == steps + 1
            assert way[0] == PAIRS[at][0]
            assert all(t > s or t == s != CLEAN for t, s in pairwise(way))
            assert way[-1] == (*(t for t, _ in PAIRS), CLEAN)[min(at + stride * steps, 50)]


def test_nothing_is_left_to_say_where_nothing_is_noisy() -> None:
    """f(x, CLEAN) = x, whatever the network answers; a greater scaling holds to x less."""
    x = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0))

    def f(scaling: float, t: float) -> Tensor:
        return consistency_function(ORACLE.denoiser, scaling)(x, torch.full((2,), t))

    assert torch.equal(f(10.0, CLEAN), x)
    x0 = ORACLE.denoiser(x, torch.full((2,), 19.0)).x0
    far, near = ((f(scaling, 19.0) - x0).abs().max() for scaling in (0.01, 10.0))
    assert far > 1000 * near


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_each_sample_is_guided_by_its_own_strength(kind: str) -> None:
    """As a run with guidance_scale 1 + w for each of them; x0 and eps follow, whatever is said."""
    other = Gaussian(SCHEDULE, mu=-1.0, s=0.8)
    calls = []

    def pair(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        halves = zip((other, ORACLE), x.chunk(2), t.chunk(2), strict=True)
        return torch.cat([oracle.network(kind)(half, at) for oracle, half, at in halves])

    x = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, w = torch.tensor([19.0, 519.0, 999.0]), torch.tensor([0.0, 3.0, 14.0])
    said = make_denoiser(guided_each(pair, w), SCHEDULE, kind)(x, t)
    assert calls == [6]
    one, two = ORACLE.denoiser(x, t), other.denoiser(x, t)
    strength = w.double().view(-1, 1, 1, 1)
    torch.testing.assert_close(said.x0, one.x0 + strength * (one.x0 - two.x0))
    torch.testing.assert_close(said.eps, one.eps + strength * (one.eps - two.eps))
    for i, strong in enumerate(w.tolist()):
        network = guided(pair, Guidance(1 + strong))
        torch.testing.assert_close(network(x, t)[i], said.output[i])


def test_errors_are_means_of_squares_or_of_the_reference_s_huber() -> None:
    d = torch.tensor([[3.0, 4.0], [0.0, 12.0]]).view(2, 1, 1, 2)
    zero = torch.zeros_like(d)
    assert consistency_errors(d, zero).tolist() == [12.5, 72.0]
    huber = consistency_errors(d, zero, huber=5.0)
    expected = [(34**0.5 + 41**0.5) / 2 - 5, (5 + 13) / 2 - 5]
    assert huber.tolist() == pytest.approx(expected)
    half = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2).expand(2, 1, 1, 2)
    assert consistency_errors(d, zero, mask=half).tolist() == pytest.approx([9.0, 0.0])


def test_half_precision_answers_are_compared_in_float32() -> None:
    one = torch.full((1, 1, 1, 2), 1.0, dtype=torch.bfloat16)
    errors = consistency_errors(one, torch.full((1, 1, 1, 2), 1.001))
    assert errors.dtype == torch.float32
    assert float(errors) == pytest.approx(1e-6, rel=1e-3)
