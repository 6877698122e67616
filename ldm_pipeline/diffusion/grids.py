"""Time grids: which levels a sampler visits on its way from T-1 down to CLEAN.

Legend
    T       number of training timesteps;  n  number of steps; a grid has n + 1 levels
    s_hat   sigma / alpha, the noise level of EDM (2206.00364)
"""

from __future__ import annotations

import math

from ldm_pipeline.diffusion.schedule import CLEAN, Schedule
from ldm_pipeline.errors import UserError, choose

SPACINGS = ("trailing", "leading", "linspace", "karras")
DISTILLED = ("even", "angle")
"""How the levels of a distillation may be spaced."""


def grid(schedule: Schedule, n: int, spacing: str) -> tuple[float, ...]:
    """n + 1 descending levels that end in CLEAN, spaced as 2305.08891, table 2, names it.

    trailing  every T/n-th timestep, counted from the last
    leading   every (T//n)-th timestep, counted from the first and moved up by one
    linspace  equal steps from T-1 to 0, in fractions of a timestep
    karras    equal steps of s_hat^(1/7) (2206.00364, eq. 5), at fractional levels

    Raises UserError unless 1 <= n <= T and `spacing` is one of SPACINGS.
    """
    choose("spacing", spacing, SPACINGS)
    total = schedule.num_train_timesteps
    if not 1 <= n <= total:
        raise UserError(f"num_inference_steps={n} must lie between 1 and {total}")
    last = float(total - 1)
    if n == 1:
        return last, CLEAN
    if spacing == "trailing":
        levels = [round(total - i * total / n) - 1.0 for i in range(n)]
    elif spacing == "leading":
        offset = min(1, total - 1 - (n - 1) * (total // n))
        levels = [float((n - 1 - i) * (total // n) + offset) for i in range(n)]
    elif spacing == "linspace":
        levels = [last * (n - 1 - i) / (n - 1) for i in range(n)]
    else:
        levels = _karras(schedule, n)
    return *levels, CLEAN


def _karras(schedule: Schedule, n: int, rho: float = 7.0) -> list[float]:
    """n levels whose s_hat^(1/rho) falls in equal steps from level T-1 to level 0."""
    last = float(schedule.num_train_timesteps - 1)
    noisiest = last if math.isfinite(schedule.log_snr(last)) else last - 1
    top, bottom = (math.exp(-schedule.log_snr(t) / (2 * rho)) for t in (noisiest, 0.0))
    roots = [top + (bottom - top) * i / (n - 1) for i in range(1, n - 1)]
    between = [schedule.level_of(-2 * rho * math.log(root)) for root in roots]
    return [last, *between, 0.0]


def distilled_levels(
    schedule: Schedule, original_steps: int = 50, strength: float = 1.0, spacing: str = "even"
) -> tuple[float, ...]:
    """The levels that an LCM was distilled on, descending, `original_steps` of them, spaced

    even   every (T // original_steps)-th timestep (2310.04378)
    angle  equal steps of the angle arctan(sigma / alpha) (2202.00512, section 4), to the nearest
           timestep: as much changes in each, whatever the schedule. Where noise comes early, as
           with DDPM's linear one, half of the even levels say next to nothing

    `strength` in (0, 1] leaves those below this share of all timesteps, one level at least.
    Raises UserError unless 1 <= original_steps <= T, and where several levels would meet in one
    timestep or lie below the first.
    """
    choose("spacing", spacing, DISTILLED)
    total = schedule.num_train_timesteps
    if not 1 <= original_steps <= total:
        raise UserError(
            f"original_steps={original_steps} must lie between 1 and the model's {total} levels"
        )
    if spacing == "even":
        stride = total // original_steps
        left = max(1, int(original_steps * strength))
        return tuple(float(i * stride - 1) for i in range(left, 0, -1))
    widest = math.atan(math.exp(-schedule.log_snr(total - 1.0) / 2))
    angles = (widest * i / original_steps for i in range(original_steps, 0, -1))
    levels = [float(round(schedule.level_of(-2 * math.log(math.tan(phi))))) for phi in angles]
    if len(set(levels)) < original_steps or levels[-1] < 0:
        raise UserError(
            f"original_steps={original_steps} are too many for spacing='angle': the last ones"
            " would meet in one timestep, or lie below the first"
        )
    return tuple(t for t in levels if t < total * strength) or tuple(levels[-1:])


def consistency_grid(
    schedule: Schedule,
    n: int,
    original_steps: int = 50,
    strength: float = 1.0,
    spacing: str = "even",
) -> tuple[float, ...]:
    """n + 1 levels ending in CLEAN, n of them of `distilled_levels`, evenly among those.

    Raises UserError where `strength` has left fewer than n.
    """
    known = distilled_levels(schedule, original_steps, strength, spacing)
    if not 1 <= n <= len(known):
        raise UserError(
            f"num_inference_steps={n} must lie between 1 and {len(known)}: this sampler knows "
            f"{original_steps} levels, of which strength={strength} leaves {len(known)}"
        )
    return *(known[i * len(known) // n] for i in range(n)), CLEAN
