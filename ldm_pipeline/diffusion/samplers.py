"""One equation, five samplers: believe x0 and eps, then noise again to the level wanted.

    x_s = a_s x0 + sqrt(sig_s² - tau²) eps + tau n          (DDIM, 2010.02502, eq. 12)

Legend
    t, s     the level a step starts from and the level it ends on
    a, sig   signal and noise at a level;  x0, eps  what the denoiser believes about x at t
    n        fresh noise;  tau  how much of the noise at s is fresh

With tau = 0 this is DDIM, and Euler's method on the probability-flow ODE. With
tau² = (sig_s/sig_t)² (sig_t² - (a_t/a_s)² sig_s²) it is DDPM, and ancestral Euler. With tau = sig_s
and a consistency model's x0 it is LCM. What else sets these five apart is the time grid.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ldm_pipeline.diffusion.course import GridSampler, NativeSampler, Sampler
from ldm_pipeline.diffusion.denoiser import Denoiser
from ldm_pipeline.diffusion.grids import consistency_grid, distilled_levels
from ldm_pipeline.diffusion.loop import Step
from ldm_pipeline.diffusion.noise import Noise
from ldm_pipeline.diffusion.prediction import boundary_scalings
from ldm_pipeline.diffusion.schedule import CLEAN, Schedule
from ldm_pipeline.diffusion.solvers import DPMSolverPP2M, Heun


def renoised(x0: Tensor, eps: Tensor, a_s: float, sig_s: float, tau: float, noise: Noise) -> Tensor:
    """x_s of the equation above; fresh noise is drawn only where tau asks for it."""
    x = a_s * x0 + max(sig_s**2 - tau**2, 0.0) ** 0.5 * eps
    return x + tau * noise.like(x) if tau > 0 else x


@dataclass(frozen=True)
class Renoise(GridSampler):
    """DDIM to DDPM, and Euler to ancestral Euler: `eta` in [0, 1] scales tau from 0."""

    eta: float = 0.0

    @classmethod
    def ddim(cls, eta: float = 0.0) -> Renoise:
        """DDIM (2010.02502); trailing timesteps, as few steps need them (2305.08891)."""
        return cls("trailing", eta)

    @classmethod
    def ddpm(cls) -> Renoise:
        """DDPM's ancestral sampling with the posterior's variance (2006.11239, alg. 2)."""
        return cls("trailing", eta=1.0)

    @classmethod
    def euler(cls) -> Renoise:
        """Euler's method on the probability-flow ODE (2206.00364, alg. 1 without correction)."""
        return cls("linspace")

    @classmethod
    def euler_a(cls) -> Renoise:
        """Ancestral Euler of k-diffusion: DDPM's step on Euler's grid."""
        return cls("linspace", eta=1.0)

    def stepper(self, schedule: Schedule) -> Step:
        def step(denoiser: Denoiser, x: Tensor, t: float, s: float, noise: Noise) -> Tensor:
            a_t, sig_t = schedule.alpha(t), schedule.sigma(t)
            a_s, sig_s = schedule.alpha(s), schedule.sigma(s)
            tau = 0.0
            if self.eta > 0 and sig_s > 0:
                kept = a_t / a_s * sig_s
                tau = self.eta * sig_s / sig_t * max(sig_t**2 - kept**2, 0.0) ** 0.5
            believed = denoiser(x, t)
            return renoised(believed.x0, believed.eps, a_s, sig_s, tau, noise)

        return step


@dataclass(frozen=True)
class Consistency(NativeSampler):
    """LCM's multistep consistency sampling (2310.04378, alg. 3): all noise is fresh.

    `original_steps` and `spacing` are the grid of the distillation (`grids.distilled_levels`),
    `timestep_scaling` that of its boundary condition; all must be those of the training.
    """

    original_steps: int = 50
    timestep_scaling: float = 10.0
    spacing: str = "even"

    def times(
        self, schedule: Schedule, n: int, strength: float = 1.0, exact: bool = False
    ) -> tuple[float, ...]:
        """n + 1 levels of the distillation's grid; `strength` shortens the grid, not n.

        Where fewer than n levels are left, they are all visited; with `exact` it is the last n of
        the whole grid, which begin at more noise.
        """
        left = distilled_levels(schedule, self.original_steps, strength, self.spacing)
        if n <= len(left) or n > self.original_steps:
            return consistency_grid(schedule, n, self.original_steps, strength, self.spacing)
        whole = distilled_levels(schedule, self.original_steps, 1.0, self.spacing)
        return *(whole[-n:] if exact else left), CLEAN

    def stepper(self, schedule: Schedule) -> Step:
        def step(denoiser: Denoiser, x: Tensor, t: float, s: float, noise: Noise) -> Tensor:
            believed = denoiser(x, t)
            c_skip, c_out = boundary_scalings(t, self.timestep_scaling)
            f = c_skip * x + c_out * believed.x0
            a_s, sig_s = schedule.alpha(s), schedule.sigma(s)
            return renoised(f, believed.eps, a_s, sig_s, tau=sig_s, noise=noise)

        return step


SAMPLERS: dict[str, Sampler] = {
    "ddim": Renoise.ddim(),
    "ddpm": Renoise.ddpm(),
    "euler": Renoise.euler(),
    "euler_a": Renoise.euler_a(),
    "heun": Heun(),
    "dpmpp_2m": DPMSolverPP2M(),
    "lcm": Consistency(),
}
"""The samplers written here, by the names that the command and the pipeline take."""

NATIVE_SAMPLERS = tuple(SAMPLERS)
