"""The noise schedule: how much picture and how much noise there is at each level.

Legend
    t        level, in timesteps of the training grid: 0 … T-1, fractions allowed; CLEAN = -1
    z, eps   clean latent, unit Gaussian noise;  x_t = alpha(t) z + sigma(t) eps
    lam      log-SNR, ln(alpha² / sigma²), strictly decreasing in t
    f, g     drift and diffusion of the forward SDE  dx = f(t) x dt + g(t) dw

A schedule is a table of log-SNR and nothing else. Between two entries lam is interpolated linearly.
Below the first entry sigma falls in proportion to t + 1, so that CLEAN is exactly free of noise;
above a last-but-one entry whose successor holds no signal, alpha falls in the same way to zero.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from ldm_pipeline.errors import UserError, choose

CLEAN = -1.0
"""The level without noise: alpha = 1 and sigma = 0, exactly."""

HAIR = 1e-9
"""How far inside an end with infinite log-SNR its slope is read, in timesteps."""

Level = TypeVar("Level", float, Tensor)
"""A level, or what is known about it: a float in gives a float, a tensor [B] a tensor [B]."""

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


@dataclass(frozen=True)
class Schedule:
    """How signal and noise trade places over the levels; a plain value that compares and pickles.

    `log_snrs` holds ln(alpha²/sigma²) at t = 0 … T-1, strictly decreasing; only the last may be
    -inf (zero terminal SNR). `exploding` is False where alpha² + sigma² = 1 (DDPM, Stable
    Diffusion), True where alpha = 1 and sigma grows (NCSN).
    """

    log_snrs: tuple[float, ...] = field(repr=False)
    exploding: bool = False

    def __post_init__(self) -> None:
        lams = self.log_snrs
        if len(lams) < 2:
            raise UserError(f"a noise schedule needs at least 2 timesteps, not {len(lams)}")
        if not all(high > low for high, low in pairwise(lams)):
            raise UserError("the betas of a noise schedule must lie strictly between 0 and 1")
        if not all(math.isfinite(lam) for lam in lams[:-1]):
            raise UserError("only the last timestep of a noise schedule may be without signal")

    # -- where schedules come from -------------------------------------------------------------

    @classmethod
    def linear(
        cls, num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> Schedule:
        """Betas in equal steps (DDPM, 2006.11239, section 4)."""
        return cls.from_betas(torch.linspace(beta_start, beta_end, num_train_timesteps))

    @classmethod
    def scaled_linear(
        cls, num_train_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> Schedule:
        """Square roots of the betas in equal steps (Latent Diffusion, Stable Diffusion)."""
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps)
        return cls.from_betas(roots**2)

    @classmethod
    def cosine(cls, num_train_timesteps: int = 1000, max_beta: float = 0.999) -> Schedule:
        """alpha² follows a squared cosine (Improved DDPM, 2102.09672, eq. 17), betas capped."""

        def alpha_bar(u: float) -> float:
            return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

        steps = num_train_timesteps
        betas = [
            min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), max_beta)
            for i in range(steps)
        ]
        return cls.from_betas(torch.tensor(betas))

    @classmethod
    def geometric(
        cls, num_train_timesteps: int = 1000, sigma_min: float = 0.01, sigma_max: float = 50.0
    ) -> Schedule:
        """The variance-exploding schedule of NCSN (1907.05600): alpha = 1, sigma geometric."""
        low, high = math.log(sigma_min), math.log(sigma_max)
        span = [i / (num_train_timesteps - 1) for i in range(num_train_timesteps)]
        return cls(tuple(-2 * (low + (high - low) * u) for u in span), exploding=True)

    @classmethod
    def from_betas(cls, betas: Tensor | Sequence[float]) -> Schedule:
        """The schedule with alpha²(t) = prod over u <= t of (1 - beta_u).

        The product is taken in the dtype of `betas` (float32 for plain numbers), as stock
        schedulers take it, so that both stand on one table.
        """
        if not isinstance(betas, Tensor):
            betas = torch.tensor(betas, dtype=torch.float32)
        return cls._from_alpha_bar(torch.cumprod(1.0 - betas, dim=0))

    @classmethod
    def _from_alpha_bar(cls, alpha_bar: Tensor) -> Schedule:
        signal = alpha_bar.double()
        return cls(tuple((signal.log() - torch.log1p(-signal)).tolist()))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Schedule:
        """The schedule that a stock scheduler's config describes; keys it does not need are left.

        Read are `num_train_timesteps`, `beta_start`, `beta_end`, `beta_schedule`, `trained_betas`
        and `rescale_betas_zero_snr`, with the defaults that stock schedulers share. Raises
        UserError for a beta schedule outside `BETA_SCHEDULES`.
        """
        steps = int(config.get("num_train_timesteps", 1000))
        start = float(config.get("beta_start", 1e-4))
        end = float(config.get("beta_end", 0.02))
        trained = config.get("trained_betas")
        kind = choose("beta_schedule", config.get("beta_schedule", "linear"), BETA_SCHEDULES)
        if trained is not None:
            made = cls.from_betas([float(beta) for beta in trained])
        elif kind == "linear":
            made = cls.linear(steps, start, end)
        elif kind == "scaled_linear":
            made = cls.scaled_linear(steps, start, end)
        else:
            made = cls.cosine(steps)
        return made.zero_terminal_snr() if config.get("rescale_betas_zero_snr") else made

    def zero_terminal_snr(self) -> Schedule:
        """This schedule with alpha shifted and scaled to end at zero (2305.08891, algorithm 1)."""
        assert not self.exploding, "a variance-exploding schedule keeps all of its signal"
        a = torch.tensor(self.log_snrs, dtype=torch.float64).sigmoid().sqrt()
        a = (a - a[-1]) * (a[0] / (a[0] - a[-1]))
        return self._from_alpha_bar(a**2)

    # -- what a schedule answers ---------------------------------------------------------------

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of levels that training draws from."""
        return len(self.log_snrs)

    def log_snr(self, t: Level) -> Level:
        """ln(alpha²/sigma²) at level t (float, or tensor [B]); t is held within CLEAN … T-1."""
        if isinstance(t, Tensor):
            return _log_snr_of_tensor(self.log_snrs, t)
        last = self.num_train_timesteps - 1
        t = min(max(float(t), CLEAN), float(last))
        if t < 0:
            return math.inf if t == CLEAN else self.log_snrs[0] - 2 * math.log1p(t)
        i = min(int(t), last - 1)
        low, high = self.log_snrs[i], self.log_snrs[i + 1]
        if high == -math.inf:
            return low + 2 * math.log(1 - (t - i)) if t < last else high
        return low + (t - i) * (high - low)

    def level_of(self, log_snr: Level) -> Level:
        """The level with this log-SNR: the inverse of `log_snr`, held within CLEAN … T-1."""
        if isinstance(log_snr, Tensor):
            return _level_of_tensor(self.log_snrs, log_snr)
        lams = self.log_snrs
        lam = max(float(log_snr), lams[-1])
        if lam > lams[0]:
            return math.exp((lams[0] - lam) / 2) - 1
        i = min(bisect_right(lams, -lam, key=lambda entry: -entry) - 1, len(lams) - 2)
        low, high = lams[i], lams[i + 1]
        if high == -math.inf:
            return i + 1 - math.exp((lam - low) / 2)
        return i + (lam - low) / (high - low)

    def alpha(self, t: Level) -> Level:
        """The share of signal at level t, in [0, 1]."""
        if isinstance(t, Tensor):
            lam = self.log_snr(t)
            return torch.ones_like(lam) if self.exploding else torch.sigmoid(lam).sqrt()
        return 1.0 if self.exploding else math.sqrt(_sigmoid(self.log_snr(t)))

    def sigma(self, t: Level) -> Level:
        """The standard deviation of the noise at level t, >= 0."""
        if isinstance(t, Tensor):
            lam = self.log_snr(t)
            return torch.exp(-lam / 2) if self.exploding else torch.sigmoid(-lam).sqrt()
        lam = self.log_snr(t)
        return math.exp(-lam / 2) if self.exploding else math.sqrt(_sigmoid(-lam))

    def spread(self, t: float) -> float:
        """sqrt(alpha² + sigma²), the width of x_t where z has unit variance; 1 unless exploding."""
        return math.hypot(1.0, self.sigma(t)) if self.exploding else 1.0

    def coefficients(
        self, t: float | Tensor, like: Tensor
    ) -> tuple[float, float] | tuple[Tensor, Tensor]:
        """(alpha, sigma) at level t, ready to be multiplied with `like` [B, …].

        A float t gives two floats. A tensor t [B] gives two tensors [B, 1, …] on the device and in
        the dtype of `like`; nothing waits for the device.
        """
        if not isinstance(t, Tensor):
            return self.alpha(t), self.sigma(t)
        shape = (-1,) + (1,) * (like.ndim - 1)
        t = t.to(like.device)
        a, sig = self.alpha(t), self.sigma(t)
        return a.to(like.dtype).view(shape), sig.to(like.dtype).view(shape)

    def slope(self, t: Level) -> Level:
        """d lam / dt at level t: negative, constant between two timesteps, always finite.

        At the two ends where lam is infinite it is taken a hair's breadth inside.
        """
        if isinstance(t, Tensor):
            return _slope_of_tensor(self.log_snrs, t)
        last = self.num_train_timesteps - 1
        t = min(max(float(t), CLEAN + HAIR), float(last))
        if t < 0:
            return -2 / (1 + t)
        i = min(int(t), last - 1)
        low, high = self.log_snrs[i], self.log_snrs[i + 1]
        if high == -math.inf:
            return -2 / max(last - t, HAIR)
        return high - low

    def drift(self, t: Level) -> Level:
        """f(t) = d ln(alpha)/dt of the forward SDE, <= 0 (2011.13456, eq. 5; 2107.00630, eq. 28).

        With alpha² = sigmoid(lam) this is ½ sigma² d lam/dt; it is 0 for an exploding schedule.
        """
        if self.exploding:
            return t * 0.0
        return 0.5 * self.sigma(t) ** 2 * self.slope(t)

    def diffusion(self, t: Level) -> Level:
        """g(t) of the forward SDE, >= 0: g² = d sigma²/dt - 2 f sigma² = -sigma² d lam/dt."""
        return self.sigma(t) * (-self.slope(t)) ** 0.5


def _sigmoid(lam: float) -> float:
    """1 / (1 + exp(-lam)) without overflow; exact at both infinities."""
    if lam >= 0:
        return 1 / (1 + math.exp(-lam))
    return math.exp(lam) / (1 + math.exp(lam))


@lru_cache(maxsize=32)
def _table(log_snrs: tuple[float, ...], device: torch.device) -> Tensor:
    """The table as a tensor on `device`: float64, or float32 where the device has no float64."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.tensor(log_snrs, dtype=dtype, device=device)


def _log_snr_of_tensor(log_snrs: tuple[float, ...], t: Tensor) -> Tensor:
    """`Schedule.log_snr` for a tensor of levels [B], without a branch that reads the device."""
    lams = _table(log_snrs, t.device)
    last = len(log_snrs) - 1
    t = t.to(lams.dtype).clamp(CLEAN, last)
    i = t.clamp(0, last - 1).long()
    low, high = lams[i], lams[i + 1]
    part = t - i
    towards_clean = lams[0] - 2 * torch.log1p(t.clamp(max=0.0))
    towards_noise = low + 2 * torch.log1p(-part.clamp(0, 1))
    between = low + part * torch.where(high.isinf(), torch.zeros_like(high), high - low)
    inside = torch.where(high.isinf(), towards_noise, between)
    return torch.where(t < 0, towards_clean, inside)


def _level_of_tensor(log_snrs: tuple[float, ...], lam: Tensor) -> Tensor:
    """`Schedule.level_of` for a tensor of log-SNRs [B]."""
    lams = _table(log_snrs, lam.device)
    last = len(log_snrs) - 1
    lam = lam.to(lams.dtype).clamp(min=lams[-1])
    i = (torch.searchsorted(-lams, -lam, right=True) - 1).clamp(0, last - 1)
    low, high = lams[i], lams[i + 1]
    towards_clean = torch.exp((lams[0] - lam) / 2) - 1
    towards_noise = i + 1 - torch.exp((lam - low) / 2)
    between = i + (lam - low) / torch.where(high.isinf(), low - 1, high).sub(low)
    inside = torch.where(high.isinf(), towards_noise, between)
    return torch.where(lam > lams[0], towards_clean, inside)


def _slope_of_tensor(log_snrs: tuple[float, ...], t: Tensor) -> Tensor:
    """`Schedule.slope` for a tensor of levels [B]."""
    lams = _table(log_snrs, t.device)
    last = len(log_snrs) - 1
    t = t.to(lams.dtype).clamp(CLEAN + HAIR, last)
    i = t.clamp(0, last - 1).long()
    high = lams[i + 1]
    inside = torch.where(high.isinf(), -2 / (last - t).clamp(min=HAIR), high - lams[i])
    return torch.where(t < 0, -2 / (1 + t), inside)
