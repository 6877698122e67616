"""How a training script runs: parse, build, fit; a person's mistake ends in one line and code 2."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from ldm_pipeline.errors import UserError
from ldm_pipeline.training.config import TrainingConfig, parse
from ldm_pipeline.training.engine import Interrupted, fit
from ldm_pipeline.training.ranks import launched

Config = TypeVar("Config", bound=TrainingConfig)


def launch(config: type[Config], objective: Callable[[Config], nn.Module]) -> None:
    """Train `objective` with the configuration on the command line and say where the model is."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        settings = parse(config)
        final = fit(objective(settings), settings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(130)
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    if launched().is_main_process:
        print(f"the trained model is in {final}")
