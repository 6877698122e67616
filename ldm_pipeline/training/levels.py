"""Which noise levels a model knows, and which of them a training step looks at."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from pydantic import Field

from ldm_pipeline.diffusion.schedule import Schedule
from ldm_pipeline.errors import UserError
from ldm_pipeline.training.config import FiniteFloat, Fraction, PositiveFloat, Settings


class LevelSettings(Settings):
    """Which noise levels are trained on: logit-normal over the schedule, and some uniform.

    Where the words decide what is drawn lies between: at the first levels all is noise, at the last
    ones nothing is left to say (2403.03206, section 3.1). The uniform share keeps the ends known.
    """

    mean: FiniteFloat = Field(default=-0.6, description="of the logit of the share of levels")
    std: PositiveFloat = Field(default=1.0, description="of the same")
    uniform: Fraction = Field(default=0.2, description="share of draws that are uniform")

    def draw(self, rng: np.random.Generator, levels: int) -> int:
        """One of `levels`, from 0, the least noise."""
        share = rng.random()
        normal = self.mean + self.std * rng.standard_normal()
        if rng.random() >= self.uniform:
            share = 1 / (1 + math.exp(-normal))
        return min(int(share * levels), levels - 1)


def levels_of(pipe: Any, zero_terminal: bool) -> tuple[str, Schedule]:
    """What the network predicts, and the levels that it is trained on."""
    config = dict(pipe.scheduler.config)
    kind = str(config.get("prediction_type", "epsilon"))
    schedule = Schedule.from_config(config)
    if "sigma_data" in config:
        raise UserError(
            "the model's scheduler weighs its network's input and output by sigma_data (EDM,"
            " 2206.00364); only models of noise, v and x0 prediction can be trained"
        )
    if zero_terminal and kind == "epsilon":
        raise UserError(
            "loss.zero_terminal_snr=true needs a v-prediction model: at the last level all is "
            "noise, and a network that predicts the noise learns nothing there"
        )
    return kind, schedule.zero_terminal_snr() if zero_terminal else schedule
