"""The one kind of data whose denoiser is known in closed form: z ~ N(mu, s²), each value alone.

With it every sampler, task, inversion and likelihood has a known answer and needs no weights. Tests
stand on it, and notebooks show with it what a sampler does.

Legend
    z, x     clean value, noisy value x = a z + sig eps
    a, sig   signal and noise at level t
    d        the spread of x at level t, sqrt(a² s² + sig²)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ldm_pipeline.diffusion.denoiser import Network
from ldm_pipeline.diffusion.prediction import Prediction, target
from ldm_pipeline.diffusion.schedule import Schedule


@dataclass(frozen=True)
class Gaussian:
    """Latents of mean `mu` and standard deviation `s` > 0 under a noise schedule."""

    schedule: Schedule
    mu: float = 0.7
    s: float = 0.4

    def marginal(self, t: float) -> tuple[float, float]:
        """(mean, spread) of x at level t."""
        a, sig = self.schedule.alpha(t), self.schedule.sigma(t)
        return a * self.mu, (a**2 * self.s**2 + sig**2) ** 0.5

    def denoiser(self, x: Tensor, t: float | Tensor) -> Prediction:
        """The ideal denoiser, E[z | x] = mu + a s²/d² (x - a mu); `output` is x0."""
        a, sig = self.schedule.coefficients(t, like=x)
        d_squared = a**2 * self.s**2 + sig**2
        x0 = self.mu + a * self.s**2 / d_squared * (x - a * self.mu)
        eps = sig / d_squared * (x - a * self.mu)
        return Prediction(x0, eps, x0)

    def consistency(self, x: Tensor, t: float | Tensor) -> Prediction:
        """The ideal consistency model: x0 is where the probability-flow ODE from (x, t) ends."""
        a, sig = self.schedule.coefficients(t, like=x)
        d = (a**2 * self.s**2 + sig**2) ** 0.5
        x0 = self.mu + self.s / d * (x - a * self.mu)
        return Prediction(x0, self.denoiser(x, t).eps, x0)

    def network(self, kind: str) -> Network:
        """The ideal network, which answers in the form `kind` (one of PREDICTION_TYPES)."""

        def answer(x: Tensor, t: Tensor) -> Tensor:
            a, sig = self.schedule.coefficients(t, like=x)
            ideal = self.denoiser(x, t)
            return target(kind, ideal.x0, ideal.eps, a, sig)

        return answer

    def flow(self, x: Tensor, t: float, s: float) -> Tensor:
        """Where the probability-flow ODE (2011.13456, eq. 13) takes x from level t to level s.

        For a Gaussian it keeps the number of standard deviations from the mean.
        """
        (m_t, d_t), (m_s, d_s) = self.marginal(t), self.marginal(s)
        return m_s + d_s / d_t * (x - m_t)
