"""The one sampling loop: walk down (or up) a list of levels, one step at a time.

Legend
    x          latents [B, C, h, w], at level times[i] when step i begins
    t, s       the level a step starts from and the level it ends on
    constrain  re-imposes what is known at level s (the kept part of an inpainting)
    watch      sees x after every step: progress, callbacks, an interrupt
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ldm_pipeline.diffusion.denoiser import Denoiser
from ldm_pipeline.diffusion.noise import Noise

Step = Callable[[Denoiser, Tensor, float, float, Noise], Tensor]
"""step(denoiser, x at level t, t, s, noise) -> x at level s."""

Constrain = Callable[[Tensor, float], Tensor]
"""constrain(x, s) -> x with everything that is known at level s put back."""


@dataclass(frozen=True)
class Stop:
    """What `watch` returns to end the run; `x` is then its result."""

    x: Tensor


Watch = Callable[[int, float, float, Tensor], Tensor | Stop]
"""watch(i, t, s, x at level s) -> the x to go on with, or Stop."""


@dataclass(frozen=True)
class Plan:
    """What a task comes down to: where to start, which levels to visit, what must stay.

    start  latents [B, C, h, w] at level times[0]
    times  two or more levels; a drawing run descends to CLEAN, an inversion ascends
    """

    start: Tensor
    times: tuple[float, ...]
    constrain: Constrain | None = None


def run(
    plan: Plan, denoiser: Denoiser, step: Step, noise: Noise, watch: Watch | None = None
) -> Tensor:
    """Latents [B, C, h, w] at the plan's last level. Gradients flow as the caller has them set."""
    x = plan.start
    for i, (t, s) in enumerate(pairwise(plan.times)):
        x = step(denoiser, x, t, s, noise)
        if plan.constrain is not None:
            x = plan.constrain(x, s)
        if watch is not None:
            seen = watch(i, t, s, x)
            if isinstance(seen, Stop):
                return seen.x
            x = seen
    return x
