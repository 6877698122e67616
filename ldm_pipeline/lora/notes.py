"""What an LCM adapter has to be drawn with, written into its file's header.

Few-step adapters draw well only on the time grid and with the boundary scalings that they were
distilled with. Published files do not say, and were made with the defaults.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.files import inspect

KEY = "lcm"

SPACINGS = ("even", "angle")
"""How the levels of a distillation may be spaced; the same as `diffusion.grids.DISTILLED`, without
torch."""

NO_ADAPTER = (
    "there is no few-step adapter for this model here; name the file of one after lcm"
    " (train/train_lcm.py makes them)"
)
"""Why True will not do."""


@dataclass(frozen=True)
class LcmNote:
    """How an adapter was distilled.

    `base` is the model as the training named it, None where a file does not say. The others are
    the fields of `diffusion.samplers.Consistency`.
    """

    base: str | None = None
    original_steps: int = 50
    timestep_scaling: float = 10.0
    spacing: str = "even"

    def texts(self) -> Mapping[str, str]:
        """As a header holds it, the same text for the same note."""
        return {KEY: json.dumps(asdict(self), sort_keys=True)}


def note_of(scheduler: Mapping[str, Any]) -> LcmNote:
    """The note of a full LCM, whose scheduler's config says how it was distilled; the defaults for
    a scheduler of another kind. `UserError` for what are no numbers."""
    told = {
        "original_inference_steps": LcmNote.original_steps,
        "timestep_scaling": LcmNote.timestep_scaling,
    }
    told |= {name: scheduler[name] for name in told if name in scheduler}
    try:
        steps, scaling = told.values()
        return LcmNote(original_steps=int(steps), timestep_scaling=float(scaling))
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"the scheduler's config makes no sense: {told}") from error


def read_note(file: str | os.PathLike[str]) -> LcmNote:
    """The note of a LoRA file or of the folder that holds one, read without torch.

    Raises `UserError` for what is no LoRA file, and for a note that makes no sense.
    """
    text = inspect(file).texts.get(KEY)
    if text is None:
        return LcmNote()
    try:
        note = LcmNote(**json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: {KEY!r} in its header cannot be read ({error})") from error
    scaling, steps = note.timestep_scaling, note.original_steps
    sound = (
        (note.base is None or isinstance(note.base, str))
        and type(steps) is int
        and 1 <= steps <= 1000
        and isinstance(scaling, int | float)
        and math.isfinite(scaling)
        and scaling > 0
        and note.spacing in SPACINGS
    )
    if not sound:
        raise UserError(f"{file}: {KEY!r} in its header makes no sense: {text}")
    return note
