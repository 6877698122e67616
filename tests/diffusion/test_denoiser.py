"""Laws of the denoiser and of classifier-free guidance.

Legend: x = noisy latents; the pair network answers for [uncond; cond] in one batch.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ldm_pipeline.diffusion import CLEAN, Guidance, Schedule, guided, make_denoiser
from ldm_pipeline.errors import UserError

SCHEDULE = Schedule.scaled_linear()


def halves() -> tuple[Tensor, Tensor]:
    uncond, cond = torch.randn((2, 3, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    return uncond, 2 * cond


def pair(x: Tensor, t: Tensor) -> Tensor:
    """A network whose unconditional half answers x and whose prompted half answers 3 x + t."""
    assert x.shape[0] == t.shape[0]
    uncond, cond = x.chunk(2)
    return torch.cat([uncond, 3 * cond + t.chunk(2)[1].view(-1, 1, 1, 1)])


def alone(x: Tensor, t: Tensor) -> Tensor:
    return 3 * x + t.view(-1, 1, 1, 1)


def test_the_network_gets_one_level_per_image() -> None:
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return x

    denoiser = make_denoiser(network, SCHEDULE, "epsilon")
    x = torch.zeros(3, 4, 2, 2)
    denoiser(x, 12.5)
    denoiser(x, torch.tensor([1, 2, 3]))
    denoiser(x, CLEAN)  # no network was trained there: it is asked at timestep 0
    denoiser(x, torch.tensor([CLEAN, 5.0, 0.0]))
    denoiser(x, -0.4)  # a scheduler's own time may be negative, and is passed on
    wanted = [[12.5] * 3, [1, 2, 3], [0.0] * 3, [0.0, 5.0, 0.0], [-0.4] * 3]
    for t, levels in zip(seen, wanted, strict=True):
        torch.testing.assert_close(t.double(), torch.tensor(levels).double(), rtol=0, atol=1e-7)


def test_gradients_flow_through_the_denoiser() -> None:
    x = torch.ones(1, 4, 2, 2, requires_grad=True)
    make_denoiser(lambda x, t: x**2, SCHEDULE, "epsilon")(x, 500.0).x0.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().min() > 0


def test_guidance_of_one_is_the_prompted_answer() -> None:
    uncond, cond = halves()
    assert torch.equal(Guidance(1.0, rescale=0.7).combine(uncond, cond), cond)


def test_guidance_extrapolates() -> None:
    uncond, cond = halves()
    assert torch.equal(Guidance(0.0).combine(uncond, cond), uncond)
    assert torch.equal(Guidance(7.5).combine(uncond, cond), uncond + 7.5 * (cond - uncond))


def test_rescale_is_that_of_stock_bit_for_bit() -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    uncond, cond = halves()
    answer = uncond + 7.5 * (cond - uncond)
    wanted = rescale_noise_cfg(answer, cond, guidance_rescale=0.7)
    assert torch.equal(Guidance(7.5, rescale=0.7).combine(uncond, cond), wanted)


def test_full_rescale_gives_the_contrast_of_the_prompted_answer() -> None:
    uncond, cond = halves()
    answer = Guidance(7.5, rescale=1.0).combine(uncond, cond)
    # float32 rounding of a standard deviation over 256 values.
    torch.testing.assert_close(
        answer.std(dim=(1, 2, 3)), cond.std(dim=(1, 2, 3)), rtol=1e-5, atol=0
    )


def test_half_the_work_where_guidance_does_nothing() -> None:
    def refuse(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("both halves were asked")

    x, t = torch.ones(2, 1, 1, 1), torch.full((2,), 50.0)
    assert torch.equal(guided(refuse, Guidance(1.0), alone)(x, t), alone(x, t))
    with pytest.raises(AssertionError, match="both halves"):
        guided(refuse, Guidance(5.0), alone)(x, t)


def test_guidance_may_change_during_a_run() -> None:
    now = [Guidance(2.0)]
    network = guided(pair, lambda: now[0])
    x, t = torch.ones(1, 1, 1, 1), torch.zeros(1)
    before = network(x, t)
    now[0] = Guidance(4.0)
    assert (before.item(), network(x, t).item()) == (5.0, 9.0)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="guidance_scale"):
        Guidance(math.nan)
    with pytest.raises(UserError, match="guidance_rescale"):
        Guidance(7.5, rescale=1.5)
