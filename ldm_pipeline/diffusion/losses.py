"""The denoising loss: how far a network's answer is from the right one, weighted by level.

Legend
    z, eps   clean latents and the noise put on them, [B, C, h, w];  x = a z + sig eps
    t        the level of each sample, [B]
    snr      a² / sig²
    mask     how much each place counts, [B, 1, h, w], 0 or more
    d        answer - right answer
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_pipeline.diffusion.denoiser import Network
from ldm_pipeline.diffusion.prediction import PREDICTION_TYPES, target
from ldm_pipeline.diffusion.schedule import Schedule
from ldm_pipeline.errors import UserError, choose

WEIGHTINGS = ("none", "min_snr", "debiased")
LEAST_SNR = 1e-4
"""Where debiased weights of eps stop to grow, at 100: without signal there is nothing to weigh."""


@dataclass(frozen=True)
class Loss:
    """Which loss: the weight of each level, and the penalty of an error.

    `weighting`: "none", every level's error as it is; "min_snr", an error of x0 weighs
    min(snr, gamma) (2303.09556, section 3.4); "debiased", an error of x0 weighs sqrt(snr), so one
    of eps 1 / sqrt(snr) (2310.08442, eq. 9). `huber` c makes the penalty 2 c (sqrt(d² + c²) - c),
    d² for small errors and 2 c |d| for large ones (2403.16728); None is d².
    """

    weighting: str = "none"
    gamma: float = 5.0
    huber: float | None = None

    def __post_init__(self) -> None:
        choose("weighting", self.weighting, WEIGHTINGS)
        if not self.gamma > 0:
            raise UserError(f"gamma={self.gamma} must be more than 0; 5 is usual")
        if self.huber is not None and not self.huber > 0:
            raise UserError(f"huber={self.huber} must be more than 0, or left out for d²")


PLAIN = Loss()


def loss_weights(kind: str, schedule: Schedule, t: Tensor, loss: Loss = PLAIN) -> Tensor:
    """The weight of each sample's mean squared error, [B], in float32 or better.

    Weights are told for errors of x0. An error of eps is one of x0 times snr, an error of v times
    snr + 1, an error of the score times snr / sig².
    """
    assert kind in PREDICTION_TYPES, f"{kind!r} is not one of {PREDICTION_TYPES}"
    if loss.weighting == "none":
        return torch.ones_like(t, dtype=torch.float32)
    snr = schedule.log_snr(t).exp()
    capped = loss.weighting == "min_snr"
    wanted = snr.clamp(max=loss.gamma) if capped else snr.sqrt()
    if kind == "sample":
        return wanted
    if kind == "v_prediction":
        return wanted / (snr + 1)
    if capped:
        per_eps = (loss.gamma / snr).clamp(max=1.0)  # min(snr, gamma) / snr, and 1 at snr = 0
    else:
        per_eps = snr.clamp(min=LEAST_SNR).rsqrt()
    return per_eps if kind == "epsilon" else per_eps * schedule.sigma(t) ** 2


def denoising_errors(
    network: Network,
    schedule: Schedule,
    kind: str,
    z: Tensor,
    eps: Tensor,
    t: Tensor,
    *,
    huber: float | None = None,
    mask: Tensor | None = None,
    wanted: Tensor | None = None,
) -> Tensor:
    """The mean penalty of the network's answer for each sample, [B], unweighted.

    z and eps are [B, C, h, w], t is [B]. `wanted` [B, C, h, w] is what a right answer is, if not
    the one that x was made of. A mask makes it the mean over what the mask covers, so that a small
    masked area counts as much as a large one. Gradients flow as the caller has them set.
    """
    a, sig = schedule.coefficients(t, like=z)
    output = network(a * z + sig * eps, t)
    if wanted is None:
        wanted = target(kind, z, eps, a, sig)
    dtype = torch.promote_types(torch.promote_types(output.dtype, wanted.dtype), torch.float32)
    penalty = (output.to(dtype) - wanted.to(dtype)).square()
    if huber is not None:
        penalty = 2 * huber * ((penalty + huber**2).sqrt() - huber)
    return mean_over(penalty, mask)


def mean_over(penalty: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean of a penalty [B, C, h, w] for each sample, [B], over what a mask covers."""
    if mask is None:
        return penalty.flatten(1).mean(dim=1)
    covered = (penalty.mean(dim=1, keepdim=True) * mask).flatten(1).sum(dim=1)
    return covered / mask.flatten(1).sum(dim=1).clamp(min=1e-6)


def denoising_loss(
    network: Network,
    schedule: Schedule,
    kind: str,
    z: Tensor,
    eps: Tensor,
    t: Tensor,
    loss: Loss = PLAIN,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """The training loss of a diffusion model, a scalar (2006.11239, eq. 14; weights above)."""
    errors = denoising_errors(network, schedule, kind, z, eps, t, huber=loss.huber, mask=mask)
    return (loss_weights(kind, schedule, t, loss).to(errors.dtype) * errors).mean()
