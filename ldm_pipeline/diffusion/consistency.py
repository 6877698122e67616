"""Consistency distillation: a student that leaps to where the teacher's ODE ends.

From a noisy x the teacher's solver leads to x_s, on the same path. A consistency
function f says of both where the path ends, so f(x, t) = f(x_s, s); and f(x, CLEAN) = x keeps it
from saying the same of all (2303.01469, alg. 2; over latents, with guidance, 2310.04378, alg. 1).

Legend
    x        noisy latents [B, C, h, w] at level t
    t, s     two levels of the distillation's grid, t > s, each [B]; the last s is CLEAN
    x_s      where the teacher's solver takes x, in one step or several
    w        how far each sample's guidance goes beyond the prompted answer [B]: the usual
             guidance_scale is 1 + w
    f        f(x, t) = c_skip x + c_out x0
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ldm_pipeline.diffusion.denoiser import Denoiser, Network
from ldm_pipeline.diffusion.grids import distilled_levels
from ldm_pipeline.diffusion.losses import mean_over
from ldm_pipeline.diffusion.prediction import boundary_scalings
from ldm_pipeline.diffusion.schedule import CLEAN, Schedule

ConsistencyFunction = Callable[[Tensor, Tensor], Tensor]
"""f(x [B, C, h, w], t [B]) -> clean latents [B, C, h, w]."""

Solver = Callable[[Denoiser, Schedule, Tensor, Tensor, Tensor], Tensor]
"""solver(denoiser, schedule, x at levels t, t, s) -> x_s; each sample has levels of its own."""


def descents(
    schedule: Schedule,
    original_steps: int = 50,
    spacing: str = "even",
    stride: int = 1,
    steps: int = 1,
) -> tuple[tuple[float, ...], ...]:
    """The levels (t, …, s) that the teacher visits from each of `original_steps` levels t, these
    descending.

    They are those of the grid that LCM draws on. The teacher takes `steps` steps of `stride` levels
    each; where fewer are left it goes to CLEAN in shorter ones, and stays where it is in some if
    there are more steps than levels. (The reference scripts end in timestep 0, where some noise is
    left, and the student learns to leave it.)
    """
    known = *distilled_levels(schedule, original_steps, spacing=spacing), CLEAN
    lengths = [min(stride * steps, original_steps - i) for i in range(original_steps)]
    return tuple(
        tuple(known[i + length * step // steps] for step in range(steps + 1))
        for i, length in enumerate(lengths)
    )


def consistency_function(
    denoiser: Denoiser, timestep_scaling: float = 10.0, sigma_data: float = 0.5
) -> ConsistencyFunction:
    """f of a denoiser whose x0 is trained to be consistent; `timestep_scaling` as in drawing."""

    def f(x: Tensor, t: Tensor) -> Tensor:
        c_skip, c_out = boundary_scalings(t.to(x), timestep_scaling, sigma_data)
        return _each(c_skip) * x + _each(c_out) * denoiser(x, t).x0

    return f


def guided_each(pair: Network, w: Tensor) -> Network:
    """The network of classifier-free guidance with a strength of its own for each sample.

    `pair` answers for [x; x] with the conditioning [unconditional; prompted], in one call. The
    answer is cond + w (cond - uncond) in x's precision; w = 0 is no guidance.
    """

    def network(x: Tensor, t: Tensor) -> Tensor:
        uncond, cond = pair(torch.cat([x, x]), torch.cat([t, t])).to(x.dtype).chunk(2)
        return cond + _each(w).to(x) * (cond - uncond)

    return network


def ddim(denoiser: Denoiser, schedule: Schedule, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """One step of DDIM (2010.02502, eq. 12, without fresh noise): of first order, one call."""
    a_s, sig_s = schedule.coefficients(s, like=x)
    believed = denoiser(x, t)
    return a_s * believed.x0 + sig_s * believed.eps


def heun(denoiser: Denoiser, schedule: Schedule, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """One step of Heun (2206.00364, alg. 1): of second order, two calls.

    Where the slope of an end is not defined (no signal at t, no noise at s) it is DDIM's.
    """
    a_t, sig_t, a_s, sig_s = (
        _each(level).to(x)
        for level in (schedule.alpha(t), schedule.sigma(t), schedule.alpha(s), schedule.sigma(s))
    )
    here = denoiser(x, t)
    x_s = a_s * here.x0 + sig_s * here.eps
    there = denoiser(x_s, s)
    sloped = (a_t > 0) & (sig_s > 0)
    length = sig_s - a_s / torch.where(sloped, a_t, torch.ones_like(a_t)) * sig_t
    return x_s + torch.where(sloped, length, torch.zeros_like(length)) * (there.eps - here.eps) / 2


SOLVERS: dict[str, Solver] = {"ddim": ddim, "heun": heun}
"""How the teacher may go from t to s."""


def descend(
    solver: Solver, denoiser: Denoiser, schedule: Schedule, x: Tensor, levels: Sequence[Tensor]
) -> Tensor:
    """Where `solver` takes x, which is at the first of `levels`, through all of them, each [B].

    It is the teacher's way in training, on which each sample has levels of its own; pictures are
    drawn by `loop.run`.
    """
    for t, s in pairwise(levels):
        x = solver(denoiser, schedule, x, t, s)
    return x


def consistency_errors(
    answer: Tensor, target: Tensor, *, huber: float | None = None, mask: Tensor | None = None
) -> Tensor:
    """How far f(x, t) = `answer` is from f(x_s, s) = `target` for each sample, [B].

    The mean square of the difference d or, with `huber` c, the mean of sqrt(d² + c²) - c, which is
    |d| for large ones (2310.14189, section 3.3). The target is a constant: whoever makes it turns
    gradients off. A mask [B, 1, h, w] makes it the mean over what it covers.
    """
    dtype = torch.promote_types(answer.dtype, torch.float32)
    penalty = (answer.to(dtype) - target.to(dtype)).square()
    if huber is not None:
        penalty = (penalty + huber**2).sqrt() - huber
    return mean_over(penalty, mask)


def _each(value: Tensor) -> Tensor:
    """A number per sample [B] as it meets latents."""
    return value.view(-1, 1, 1, 1)
