"""Four ways to answer, one meaning: what the network was trained to say is read back exactly.

Legend: z, eps = clean latents and noise; x = a z + sig eps.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm_pipeline.diffusion import (
    PREDICTION_TYPES,
    Gaussian,
    Schedule,
    boundary_scalings,
    interpret,
    make_denoiser,
    target,
)

Part = float | Tensor
SCHEDULES = (Schedule.scaled_linear(), Schedule.geometric(sigma_max=10.0))
kinds = pytest.mark.parametrize("kind", PREDICTION_TYPES)


def noised(t: float | Tensor, schedule: Schedule) -> tuple[Tensor, Tensor, Tensor, Part, Part]:
    """(z, eps, x, a, sig) for three samples at level t."""
    generator = torch.Generator().manual_seed(5)
    z, eps = torch.randn((2, 3, 4, 2, 2), generator=generator, dtype=torch.float64)
    a, sig = schedule.coefficients(t, like=z)
    return z, eps, a * z + sig * eps, a, sig


@kinds
@pytest.mark.parametrize("schedule", SCHEDULES, ids=["preserving", "exploding"])
@pytest.mark.parametrize("t", [0.0, 400.0, 999.0, torch.tensor([10.0, 500.0, 990.0])])
def test_the_answer_is_read_as_it_was_meant(
    kind: str, schedule: Schedule, t: float | Tensor
) -> None:
    z, eps, x, a, sig = noised(t, schedule)
    output = target(kind, z, eps, a, sig)
    read = interpret(kind, output, x, a, sig)
    # Rounding of float64 (1e-16), divided at worst by the smallest sigma, 0.01, or alpha, 0.07.
    torch.testing.assert_close(read.x0, z, rtol=0, atol=1e-12)
    torch.testing.assert_close(read.eps, eps, rtol=0, atol=1e-12)
    assert read.output is output


@kinds
def test_both_halves_explain_the_noisy_latents(kind: str) -> None:
    """x = a x0 + sig eps holds for any answer, not only for a right one."""
    _, _, x, a, sig = noised(300.0, SCHEDULES[0])
    read = interpret(kind, torch.randn_like(x), x, a, sig)
    # Rounding of float64.
    torch.testing.assert_close(a * read.x0 + sig * read.eps, x, rtol=0, atol=1e-13)


@kinds
@pytest.mark.parametrize("a,sig", [(0.0, 1.0), (1.0, 0.0)], ids=["no signal", "no noise"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_two_ends_are_finite(kind: str, a: float, sig: float, as_tensor: bool) -> None:
    x, output = torch.ones(2, 1, 1, 1), torch.full((2, 1, 1, 1), 0.5)
    column = torch.ones(2, 1, 1, 1)
    ends = (a * column, sig * column) if as_tensor else (a, sig)
    read = interpret(kind, output, x, *ends)
    assert read.x0.isfinite().all()
    assert read.eps.isfinite().all()
    assert target(kind, x, output, *ends).isfinite().all()


def test_velocity_still_knows_the_picture_where_no_signal_is_left() -> None:
    x, v = torch.tensor([0.3]), torch.tensor([-0.8])
    read = interpret("v_prediction", v, x, 0.0, 1.0)
    assert torch.equal(read.x0, -v)
    assert torch.equal(read.eps, x)


@kinds
def test_one_denoiser_whatever_the_network_says(kind: str) -> None:
    oracle = Gaussian(Schedule.scaled_linear())
    x = torch.linspace(-2, 2, 32, dtype=torch.float64).view(2, 4, 2, 2)
    for t in (0.0, 20.0, 999.0):
        read = make_denoiser(oracle.network(kind), oracle.schedule, kind)(x, t)
        ideal = oracle.denoiser(x, t)
        # Rounding of float64, over the smallest sigma (0.03) or alpha (0.07).
        torch.testing.assert_close(read.x0, ideal.x0, rtol=0, atol=1e-12)
        torch.testing.assert_close(read.eps, ideal.eps, rtol=0, atol=1e-12)


def test_boundary_scalings() -> None:
    assert boundary_scalings(0.0) == (1.0, 0.0)
    assert boundary_scalings(-1.0) == (1.0, 0.0)
    c_skip, c_out = boundary_scalings(torch.tensor([0.0, 19.0]))
    # Figures of the definition with scale 10 and sigma_data 0.5, to the digits given.
    torch.testing.assert_close(c_skip, torch.tensor([1.0, 6.925e-6]), rtol=1e-3, atol=0)
    torch.testing.assert_close(c_out, torch.tensor([0.0, 0.9999965]), rtol=0, atol=2e-7)
