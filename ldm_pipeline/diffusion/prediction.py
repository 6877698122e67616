"""What a network's answer means: four ways to say the same thing, turned once into (x0, eps).

Legend
    z, x     clean latent, noisy latent x = a z + sig eps, both [B, C, h, w]
    a, sig   signal and noise at the level of x: floats, or tensors [B, 1, 1, 1]
    v        velocity, a eps - sig z (2202.00512, appendix D)
    score    the gradient of the log-density of x, -eps / sig (2011.13456)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_pipeline.diffusion.schedule import Level

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "score")


@dataclass(frozen=True)
class Prediction:
    """What the denoiser believes about x: its clean part and its noise, each [B, C, h, w].

    `output` is the network's own answer (after guidance), bit for bit, for stock schedulers.
    """

    x0: Tensor
    eps: Tensor
    output: Tensor


def interpret(
    kind: str, output: Tensor, x: Tensor, a: float | Tensor, sig: float | Tensor
) -> Prediction:
    """Turn the network's answer about x into x0 and eps with x = a x0 + sig eps.

    Where the answer cannot say (eps at a level without signal, x0 at one without noise), the
    missing half is zero rather than infinite. `kind` is one of PREDICTION_TYPES.
    """
    if kind == "epsilon":
        return Prediction(_ratio(x - sig * output, a), output, output)
    if kind == "v_prediction":
        length = a**2 + sig**2  # 1 unless the schedule is variance-exploding
        x0 = (a * x - sig * output) / length
        eps = (sig * x + a * output) / length
        return Prediction(x0, eps, output)
    if kind == "sample":
        return Prediction(output, _ratio(x - a * output, sig), output)
    assert kind == "score", f"{kind!r} is not one of {PREDICTION_TYPES}"
    eps = -sig * output
    return Prediction(_ratio(x - sig * eps, a), eps, output)


def target(kind: str, z: Tensor, eps: Tensor, a: float | Tensor, sig: float | Tensor) -> Tensor:
    """What a perfect network answers about x = a z + sig eps: [B, C, h, w], same dtype as z."""
    if kind == "epsilon":
        return eps
    if kind == "v_prediction":
        return a * eps - sig * z
    if kind == "sample":
        return z
    assert kind == "score", f"{kind!r} is not one of {PREDICTION_TYPES}"
    return _ratio(-eps, sig)


def _ratio(top: Tensor, bottom: float | Tensor) -> Tensor:
    """top / bottom, and 0 where bottom is 0, without waiting for the device."""
    if isinstance(bottom, Tensor):
        nothing = bottom == 0
        return torch.where(nothing, torch.zeros_like(top), top / bottom.masked_fill(nothing, 1.0))
    return top / bottom if bottom != 0 else torch.zeros_like(top)


def boundary_scalings(
    t: Level, timestep_scaling: float = 10.0, sigma_data: float = 0.5
) -> tuple[Level, Level]:
    """(c_skip, c_out) of a consistency model f(x, t) = c_skip x + c_out x0 (2310.04378, eq. 9).

    They are (1, 0) at timestep 0, so that f(x, 0) = x, and near (0, 1) from timestep 1 on. A
    tensor t gives tensors of its shape; CLEAN counts as timestep 0.
    """
    u = timestep_scaling * (t.clamp(min=0) if isinstance(t, Tensor) else max(t, 0.0))
    length = (u**2 + sigma_data**2) ** 0.5
    return (sigma_data / length) ** 2, u / length
