"""The training loss against closed forms.

Legend: snr = a²/sig²; gamma caps it (min-SNR, 2303.09556).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipeline.diffusion import (
    PREDICTION_TYPES,
    WEIGHTINGS,
    Gaussian,
    Loss,
    Schedule,
    denoising_errors,
    denoising_loss,
    interpret,
    loss_weights,
)
from ldm_pipeline.errors import UserError

SCHEDULE = Schedule.scaled_linear()
MIN_SNR = Loss("min_snr", gamma=5.0)
T = torch.tensor([5, 120, 300, 700, 999])
kinds = pytest.mark.parametrize("kind", PREDICTION_TYPES)


def batch(n: int = len(T)) -> tuple[Tensor, Tensor]:
    z, eps = torch.randn(
        (2, n, 4, 8, 8), generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    return z, eps


def test_min_snr_weights_are_those_of_the_paper() -> None:
    snr = torch.exp(SCHEDULE.log_snr(T.double()))
    assert snr.min() < 5 < snr.max()
    capped = snr.clamp(max=5)
    wanted = {"epsilon": capped / snr, "v_prediction": capped / (snr + 1), "sample": capped}
    for kind, weights in wanted.items():
        # float64 rounding.
        torch.testing.assert_close(
            loss_weights(kind, SCHEDULE, T, MIN_SNR), weights, rtol=1e-12, atol=0
        )


def test_debiased_weights_are_those_of_the_paper() -> None:
    """1 / sqrt(snr) for an error of eps; the same errors told of x0 and of v weigh as much."""
    snr = torch.exp(SCHEDULE.log_snr(T.double()))
    wanted = {"epsilon": snr**-0.5, "v_prediction": snr**0.5 / (snr + 1), "sample": snr**0.5}
    for kind, weights in wanted.items():
        # float64 rounding.
        torch.testing.assert_close(
            loss_weights(kind, SCHEDULE, T, Loss("debiased")), weights, rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("error", [1e-4, 0.3, 50.0])
def test_huber_is_the_square_for_small_errors_and_the_amount_for_large_ones(error: float) -> None:
    z, eps = batch()
    a, sig = SCHEDULE.coefficients(T, like=z)
    c = 0.1

    def off(x: Tensor, t: Tensor) -> Tensor:
        return (x - a * z) / sig + error

    got = denoising_errors(off, SCHEDULE, "epsilon", z, eps, T, huber=c)
    wanted = 2 * c * ((error**2 + c**2) ** 0.5 - c)
    # float64 rounding of a difference of numbers near c = 0.1, over 1e-8.
    assert got.tolist() == pytest.approx([wanted] * 5, rel=1e-5)
    if error < c / 10:
        assert wanted == pytest.approx(error**2, rel=0.01)
    if error > 100 * c:
        assert wanted == pytest.approx(2 * c * error, rel=0.01)


def test_a_mask_counts_what_it_covers_and_nothing_else() -> None:
    """The error is 1 in the left half and 3 in the right: any mask gives the mean under it,
    whatever its area; an empty one gives 0."""
    z, eps = batch()
    a, sig = SCHEDULE.coefficients(T, like=z)
    field = torch.ones(8, 8, dtype=torch.float64)
    field[:, 4:] = 3.0

    def off(x: Tensor, t: Tensor) -> Tensor:
        return (x - a * z) / sig + field.sqrt()

    mask = torch.zeros(5, 1, 8, 8, dtype=torch.float64)
    mask[0], mask[1, :, :, :4], mask[2, :, 0, 7] = 1, 1, 1
    mask[3, :, 0, 0], mask[3, :, 0, 7] = 0.5, 1.5
    got = denoising_errors(off, SCHEDULE, "epsilon", z, eps, T, mask=mask)
    # float64 rounding of (x - a z) / sig.
    assert got.tolist() == pytest.approx([2.0, 1.0, 3.0, 2.5, 0.0], rel=1e-9, abs=1e-12)
    everywhere = denoising_errors(off, SCHEDULE, "epsilon", z, eps, T, mask=torch.ones_like(mask))
    plain = denoising_errors(off, SCHEDULE, "epsilon", z, eps, T)
    torch.testing.assert_close(everywhere, plain, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "wrong,named",
    [
        ({"weighting": "min_snrr"}, "did you mean 'min_snr'"),
        ({"gamma": 0.0}, "gamma=0.0 must be more than 0"),
        ({"huber": -1.0}, "huber=-1.0 must be more than 0"),
        ({"huber": float("nan")}, "huber=nan must be more than 0"),
    ],
    ids=str,
)
def test_a_loss_that_cannot_be_meant_is_refused(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        Loss(**wrong)


@kinds
def test_without_gamma_every_sample_counts_alike(kind: str) -> None:
    assert torch.equal(loss_weights(kind, SCHEDULE, T), torch.ones(5))


@kinds
def test_weighted_loss_does_not_depend_on_the_form_of_the_answer(kind: str) -> None:
    """Min-SNR weighs the error of x0 by min(snr, gamma), whatever the network predicts."""
    z, eps = batch()
    a, sig = SCHEDULE.coefficients(T, like=z)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return 0.3 * x.sin() + 0.1

    x0 = interpret(kind, network(a * z + sig * eps, T), a * z + sig * eps, a, sig).x0
    capped = torch.exp(SCHEDULE.log_snr(T.double())).clamp(max=5)
    wanted = (capped * (x0 - z).square().mean(dim=(1, 2, 3))).mean()
    loss = denoising_loss(network, SCHEDULE, kind, z, eps, T, MIN_SNR)
    # float64 rounding, over alpha² = 0.005 at the last level.
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=0)


@kinds
def test_the_ideal_network_errs_by_the_posterior_variance(kind: str) -> None:
    """Over z ~ N(mu, s²) the least error of x0 is s² sig² / (a² s² + sig²)."""
    oracle = Gaussian(SCHEDULE)
    n = 400
    t = torch.full((n,), 300)
    z, eps = batch(n)
    z = oracle.mu + oracle.s * z
    a, sig = SCHEDULE.alpha(300.0), SCHEDULE.sigma(300.0)
    least = oracle.s**2 * sig**2 / (a**2 * oracle.s**2 + sig**2)
    per_x0 = {
        "sample": 1.0,
        "epsilon": (a / sig) ** 2,
        "v_prediction": 1 / sig**2,
        "score": a**2 / sig**4,
    }
    loss = denoising_loss(oracle.network(kind), SCHEDULE, kind, z, eps, t)
    # 4 standard errors of a mean of 102,400 squared Gaussians: 4 sqrt(2/102400) = 1.8 %.
    assert loss.item() == pytest.approx(least * per_x0[kind], rel=0.018)


def test_errors_are_per_sample_and_carry_gradients() -> None:
    z, eps = batch()
    gain = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    errors = denoising_errors(lambda x, t: gain * x, SCHEDULE, "epsilon", z, eps, T)
    assert errors.shape == (5,)
    first = denoising_errors(lambda x, t: gain * x, SCHEDULE, "epsilon", z[:1], eps[:1], T[:1])
    # The same arithmetic on one row; the reduction may be ordered differently.
    torch.testing.assert_close(errors[:1], first, rtol=1e-12, atol=0)
    errors.mean().backward()
    assert gain.grad is not None
    assert gain.grad != 0


def test_half_precision_answers_are_compared_in_full() -> None:
    z, eps = (part.float() for part in batch())
    errors = denoising_errors(lambda x, t: x.bfloat16(), SCHEDULE, "epsilon", z, eps, T)
    assert errors.dtype == torch.float32


@kinds
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_zero_terminal_snr_weighs_finitely(kind: str, weighting: str) -> None:
    weights = loss_weights(
        kind, SCHEDULE.zero_terminal_snr(), torch.tensor([0, 999]), Loss(weighting)
    )
    assert weights.isfinite().all()


@kinds
@pytest.mark.parametrize("schedule", [SCHEDULE, SCHEDULE.zero_terminal_snr()])
def test_the_loss_does_not_wait_for_the_device(kind: str, schedule: Schedule) -> None:
    """On torch's meta device there are no values: to read one back is an error."""
    z, eps = (part.to("meta") for part in batch())
    loss = denoising_loss(lambda x, t: x, schedule, kind, z, eps, T.to("meta"), MIN_SNR)
    assert loss.device.type == "meta"
