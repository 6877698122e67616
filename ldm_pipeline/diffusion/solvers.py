"""Second-order solvers of the probability-flow ODE: Heun and DPM-Solver++(2M).

Legend
    t, s     the level a step starts from and the level it ends on
    a, sig   signal and noise at a level
    lam      ln(a / sig), half the log-SNR;  h = lam_s - lam_t, the length of a step
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ldm_pipeline.diffusion.course import GridSampler
from ldm_pipeline.diffusion.denoiser import Denoiser
from ldm_pipeline.diffusion.loop import Step
from ldm_pipeline.diffusion.noise import Noise
from ldm_pipeline.diffusion.schedule import Schedule


@dataclass(frozen=True)
class Heun(GridSampler):
    """Heun's method on d(x/a) / d(sig/a) = eps (2206.00364, alg. 1): two evaluations a step.

    Where the slope of an end is not defined (no signal at t, no noise at s) the step is Euler's.
    """

    spacing: str = "linspace"

    def stepper(self, schedule: Schedule) -> Step:
        def step(denoiser: Denoiser, x: Tensor, t: float, s: float, noise: Noise) -> Tensor:
            a_t, sig_t = schedule.alpha(t), schedule.sigma(t)
            a_s, sig_s = schedule.alpha(s), schedule.sigma(s)
            here = denoiser(x, t)
            x_s = a_s * here.x0 + sig_s * here.eps
            if a_t == 0 or sig_s == 0:
                return x_s
            there = denoiser(x_s, s)
            return x_s + (sig_s - a_s / a_t * sig_t) * (there.eps - here.eps) / 2

        return step


@dataclass(frozen=True)
class DPMSolverPP2M(GridSampler):
    """DPM-Solver++(2M) (2211.01095, alg. 2): x0 extrapolated from the last two steps.

    The first step has no history, the last one reaches lam = inf: both are of first order.
    """

    spacing: str = "karras"

    def stepper(self, schedule: Schedule) -> Step:
        x0_before: Tensor | None = None
        h_before = math.inf

        def step(denoiser: Denoiser, x: Tensor, t: float, s: float, noise: Noise) -> Tensor:
            nonlocal x0_before, h_before
            a_s, sig_s, sig_t = schedule.alpha(s), schedule.sigma(s), schedule.sigma(t)
            h = (schedule.log_snr(s) - schedule.log_snr(t)) / 2
            x0 = denoiser(x, t).x0
            D = x0
            if x0_before is not None and math.isfinite(h):
                r = h_before / h
                D = x0 + (x0 - x0_before) / (2 * r)
            x0_before, h_before = x0, h
            return sig_s / sig_t * x - a_s * math.expm1(-h) * D

        return step
