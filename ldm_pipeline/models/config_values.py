"""Numbers in a model's configs that no model can have, refused before anything is built of them.

Libraries take them as they are, and break much later: a picture's last step is to divide by the
autoencoder's scale. What a config leaves out is the library's own affair, and is let be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ldm_pipeline.errors import UserError
from ldm_pipeline.request import MAX_SIDE

MOST_LEVELS = 100_000
"""Noise levels of a schedule; known ones have 1,000, and each takes memory."""

MOST_CHANNELS = 10_000
"""Of pictures or latents; known models have 3 to 32."""

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "score")
"""What a network may answer: `diffusion.prediction`'s, without torch."""

SPACINGS = ("trailing", "leading", "linspace")
"""How Diffusers' schedulers space their timesteps."""

Check = Callable[[Any, Mapping[str, Any]], str | None]
"""Of a value and the config that it is in: what it has to be, or None where it is that."""


def check_values(place: object, component: str, config: Mapping[str, Any]) -> None:
    """Raise `UserError`, which names the config's `place`, for a value that none can have."""
    for name, check in CHECKS.get(component, {}).items():
        value = config.get(name)
        wanted = None if value is None else check(value, config)
        if wanted is not None:
            told = repr(value)
            shown = told if len(told) < 60 else f"{told[:60]}…"
            raise UserError(f"{place} says {name}={shown}, which must be {wanted}")


def _number(value: Any, _: Mapping[str, Any]) -> str | None:
    return None if _is_number(value) else "a finite number"


def _positive(value: Any, _: Mapping[str, Any]) -> str | None:
    return None if _is_number(value) and value > 0 else "a number above 0"


def _of_channels(value: Any, config: Mapping[str, Any]) -> str | None:
    channels = config.get("latent_channels", 4)
    whole = isinstance(value, list) and len(value) == channels and all(map(_is_number, value))
    return None if whole else f"a list of {channels} finite numbers"


def _spreads(value: Any, config: Mapping[str, Any]) -> str | None:
    wanted = _of_channels(value, config)
    return "a list of numbers above 0" if wanted is None and min(value) <= 0 else wanted


def _sides(value: Any, _: Mapping[str, Any]) -> str | None:
    sides = value if isinstance(value, list) and len(value) == 2 else [value]
    fine = all(_is_whole(side) and 1 <= side <= MAX_SIDE // 8 for side in sides)
    return None if fine else f"a whole number from 1 to {MAX_SIDE // 8}, or two of them"


def _channels(value: Any, _: Mapping[str, Any]) -> str | None:
    fine = _is_whole(value) and 1 <= value <= MOST_CHANNELS
    return None if fine else f"a whole number from 1 to {MOST_CHANNELS}"


def _levels(value: Any, _: Mapping[str, Any]) -> str | None:
    fine = _is_whole(value) and 1 <= value <= MOST_LEVELS
    return None if fine else f"a whole number from 1 to {MOST_LEVELS}"


def _betas(value: Any, _: Mapping[str, Any]) -> str | None:
    whole = isinstance(value, list) and len(value) > 0 and all(map(_is_number, value))
    return None if whole else "a list of finite numbers"


def _offset(value: Any, config: Mapping[str, Any]) -> str | None:
    levels = config.get("num_train_timesteps", 1000)
    fine = _is_whole(value) and 0 <= value < levels
    return None if fine else f"a whole number from 0 to {levels - 1}"


def _one_of(*known: str) -> Check:
    def check(value: Any, _: Mapping[str, Any]) -> str | None:
        return None if value in known else f"one of {', '.join(known)}"

    return check


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


CHECKS: dict[str, dict[str, Check]] = {
    "vae": {
        "in_channels": _channels,
        "latent_channels": _channels,
        "scaling_factor": _positive,
        "shift_factor": _number,
        "latents_mean": _of_channels,
        "latents_std": _spreads,
    },
    "unet": {
        "sample_size": _sides,
        "in_channels": _channels,
        "out_channels": _channels,
        "norm_eps": _positive,
    },
    "scheduler": {
        "num_train_timesteps": _levels,
        "trained_betas": _betas,
        "beta_start": _number,
        "beta_end": _number,
        "steps_offset": _offset,
        "prediction_type": _one_of(*PREDICTION_TYPES),
        "timestep_spacing": _one_of(*SPACINGS),
    },
}
"""What is looked at in the config of each component, in this order."""
