"""The one function that everything is a use of: denoiser(x, t) -> Prediction(x0, eps).

Legend
    x        noisy latents [B, C, h, w]
    t        level: one float for the whole batch, or a tensor [B]
    network  answers about x at t with its conditioning already bound (a UNet, or a closed form)
    guided   the network of classifier-free guidance (2207.12598): one call on [x; x], answers
             without and with the prompt, stacked, extrapolated into one
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_pipeline.diffusion.prediction import Prediction, interpret
from ldm_pipeline.diffusion.schedule import CLEAN, Schedule
from ldm_pipeline.errors import UserError

Network = Callable[[Tensor, Tensor], Tensor]
"""network(x [B, C, h, w], t [B]) -> the raw answer [B, C, h, w]."""

Denoiser = Callable[[Tensor, float | Tensor], Prediction]
"""denoiser(x [B, C, h, w], t float or [B]) -> Prediction."""


def make_denoiser(network: Network, schedule: Schedule, kind: str) -> Denoiser:
    """The denoiser of a network that answers in the form `kind` (one of PREDICTION_TYPES).

    A float level is handed to the network as a float32 tensor [B] on x's device, and enters the
    arithmetic as Python numbers: no step waits for the device.
    """

    def denoiser(x: Tensor, t: float | Tensor) -> Prediction:
        a, sig = schedule.coefficients(t, like=x)
        return interpret(kind, network(x, levels(t, like=x)), x, a, sig)

    return denoiser


def levels(t: float | Tensor, like: Tensor) -> Tensor:
    """Level t as a tensor [B] on the device of `like` [B, …]; CLEAN becomes timestep 0.

    No network was trained at CLEAN; only an inversion asks for it, at its first step.
    """
    if isinstance(t, Tensor):
        return t.to(like.device).masked_fill(t == CLEAN, 0).expand(like.shape[0])
    t = 0.0 if t == CLEAN else t
    return torch.full((like.shape[0],), t, dtype=torch.float32, device=like.device)


@dataclass(frozen=True)
class Guidance:
    """How strongly the prompt pulls.

    scale    1 is no guidance; 7.5 is usual. The answer is uncond + scale (cond - uncond).
    rescale  0 … 1: how much of the answer's contrast is set back to that of the prompted answer
             (2305.08891, section 3.4)
    """

    scale: float = 1.0
    rescale: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise UserError(f"guidance_scale must be a finite number, not {self.scale}")
        if not 0 <= self.rescale <= 1:
            raise UserError(f"guidance_rescale must lie between 0 and 1, not {self.rescale}")

    def combine(self, uncond: Tensor, cond: Tensor) -> Tensor:
        """The guided answer [B, C, h, w] from the two halves; scale 1 gives `cond` itself.

        The order of operations is that of stock pipelines, so that both agree bit for bit.
        """
        if self.scale == 1:
            return cond
        answer = uncond + self.scale * (cond - uncond)
        if self.rescale == 0:
            return answer
        axes = list(range(1, cond.ndim))
        contrast = cond.std(dim=axes, keepdim=True) / answer.std(dim=axes, keepdim=True)
        return self.rescale * (answer * contrast) + (1 - self.rescale) * answer


def guided(
    pair: Network, guidance: Guidance | Callable[[], Guidance], alone: Network | None = None
) -> Network:
    """The network of classifier-free guidance over one call on both halves.

    `pair` answers for [x; x] with the conditioning [unconditional; prompted], both 2B. `guidance`
    may be a callable, read once in every call, so that a caller can change it during a run.
    `alone` answers for x with the prompt only: where it is given it saves half the work whenever
    the scale is 1.
    """
    read = guidance if callable(guidance) else lambda: guidance

    def network(x: Tensor, t: Tensor) -> Tensor:
        now = read()
        if alone is not None and now.scale == 1:
            return alone(x, t)
        uncond, cond = pair(torch.cat([x, x]), torch.cat([t, t])).chunk(2)
        return now.combine(uncond, cond)

    return network
