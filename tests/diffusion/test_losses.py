"""The training loss against closed forms.

Legend: snr = a²/sig²; gamma caps it (min-SNR, 2303.09556).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm_pipeline.diffusion import (
    PREDICTION_TYPES,
    Gaussian,
    Schedule,
    denoising_errors,
    denoising_loss,
    interpret,
    loss_weights,
)

SCHEDULE = Schedule.scaled_linear()
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
            loss_weights(kind, SCHEDULE, T, 5.0), weights, rtol=1e-12, atol=0
        )


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
    loss = denoising_loss(network, SCHEDULE, kind, z, eps, T, min_snr_gamma=5.0)
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
def test_zero_terminal_snr_weighs_finitely(kind: str) -> None:
    weights = loss_weights(kind, SCHEDULE.zero_terminal_snr(), torch.tensor([0, 999]), 5.0)
    assert weights.isfinite().all()


@kinds
@pytest.mark.parametrize("schedule", [SCHEDULE, SCHEDULE.zero_terminal_snr()])
def test_the_loss_does_not_wait_for_the_device(kind: str, schedule: Schedule) -> None:
    """On torch's meta device there are no values: to read one back is an error."""
    z, eps = (part.to("meta") for part in batch())
    loss = denoising_loss(lambda x, t: x, schedule, kind, z, eps, T.to("meta"), 5.0)
    assert loss.device.type == "meta"
