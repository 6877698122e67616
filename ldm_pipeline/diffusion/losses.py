"""The denoising loss: how far a network's answer is from the right one, weighted by level.

Legend
    z, eps   clean latents and the noise put on them, [B, C, h, w];  x = a z + sig eps
    t        the level of each sample, [B]
    snr      a² / sig²
    gamma    where min-SNR weighting stops to grow (2303.09556); 5 is usual
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm_pipeline.diffusion.denoiser import Network
from ldm_pipeline.diffusion.prediction import PREDICTION_TYPES, target
from ldm_pipeline.diffusion.schedule import Schedule


def loss_weights(
    kind: str, schedule: Schedule, t: Tensor, min_snr_gamma: float | None = None
) -> Tensor:
    """The weight of each sample's mean squared error, [B], in float32 or better.

    Without gamma every weight is 1. With it, the error of x0 weighs min(snr, gamma) whatever the
    network predicts (2303.09556, section 3.4): an error of eps is one of x0 times snr, an error of
    v times snr + 1, an error of the score times snr / sig².
    """
    if min_snr_gamma is None:
        return torch.ones_like(t, dtype=torch.float32)
    snr = schedule.log_snr(t).exp()
    wanted = snr.clamp(max=min_snr_gamma)
    if kind == "sample":
        return wanted
    if kind == "v_prediction":
        return wanted / (snr + 1)
    capped = (min_snr_gamma / snr).clamp(max=1.0)  # min(snr, gamma) / snr, and 1 at snr = 0
    if kind == "epsilon":
        return capped
    assert kind == "score", f"{kind!r} is not one of {PREDICTION_TYPES}"
    return capped * schedule.sigma(t) ** 2


def denoising_errors(
    network: Network, schedule: Schedule, kind: str, z: Tensor, eps: Tensor, t: Tensor
) -> Tensor:
    """The mean squared error of the network's answer for each sample, [B], unweighted.

    z and eps are [B, C, h, w], t is [B]. Gradients flow as the caller has them set.
    """
    a, sig = schedule.coefficients(t, like=z)
    output = network(a * z + sig * eps, t)
    wanted = target(kind, z, eps, a, sig)
    dtype = torch.promote_types(torch.promote_types(output.dtype, wanted.dtype), torch.float32)
    return (output.to(dtype) - wanted.to(dtype)).square().flatten(1).mean(dim=1)


def denoising_loss(
    network: Network,
    schedule: Schedule,
    kind: str,
    z: Tensor,
    eps: Tensor,
    t: Tensor,
    min_snr_gamma: float | None = None,
) -> Tensor:
    """The training loss of a diffusion model, a scalar (2006.11239, eq. 14; weights above)."""
    errors = denoising_errors(network, schedule, kind, z, eps, t)
    weights = loss_weights(kind, schedule, t, min_snr_gamma).to(errors.dtype)
    return (weights * errors).mean()
