"""Where a run's numbers and pictures go besides its progress bar: TensorBoard, wandb, or nowhere.

Both are accelerate's trackers, so the engine logs to either in the same words. A run that cannot
reach wandb keeps its log in its own folder, and says how to send it later.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import PIL.Image
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from ldm_pipeline.errors import UserError
from ldm_pipeline.training.config import TrainingConfig

log = logging.getLogger(__name__)

EXTRAS = {"tensorboard": "train", "wandb": "wandb"}
"""Tracker -> the extra that installs its library."""

PROJECT = "ldm-pipeline"
"""What wandb files runs under."""


def check_tracker(kind: str) -> None:
    """Raise UserError where the library that `run.log_with` needs is not installed."""
    if kind in EXTRAS and find_spec(kind) is None:
        raise UserError(
            f"run.log_with={kind!r} needs pip install 'ldm-pipeline[{EXTRAS[kind]}]'; or set "
            "run.log_with=none"
        )


def start_tracker(config: TrainingConfig) -> list[GeneralTracker]:
    """The tracker that `run.log_with` names, ready to log into `run.out`; none for "none"."""
    run = config.run
    if run.log_with == "none":
        return []
    if run.log_with == "tensorboard":
        tracker = TensorBoardTracker("logs", run.out)
        tracker.start()
        return [tracker]
    return [_start_wandb(config)]


def keep_picture(
    picture: PIL.Image.Image, folder: Path, step: int, trackers: Sequence[GeneralTracker]
) -> None:
    """Show the state of things after `step` updates, as a file and where the run is logged."""
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / f"step-{step:08d}.png")
    for tracker in trackers:
        told: dict[str, Any] = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({"picture": np.asarray(picture)[None]}, step=step, **told)


def _start_wandb(config: TrainingConfig) -> WandBTracker:
    """wandb's run for this folder, the same one after a stop; offline where there is no way."""
    out = config.run.out
    told = {"dir": str(out), "name": out.name, "id": _identity(out), "resume": "allow"}
    tracker = WandBTracker(PROJECT, **told)
    try:
        tracker.start()
    except import_module("wandb").Error as error:
        reason = " ".join(str(error).split())
        log.warning("wandb does not answer (%s): logging to %s/wandb; wandb sync sends it later",
                    reason, out)  # fmt: skip
        tracker = WandBTracker(PROJECT, **told, mode="offline")
        tracker.start()
    tracker.store_init_configuration(config.model_dump(mode="json"))
    return tracker


def _identity(out: Path) -> str:
    """wandb's name for the run in `out`: drawn once, so that going on adds to the same curves."""
    path = out / "wandb-id"
    if not path.is_file():
        path.write_text(uuid4().hex[:12], "utf-8")
    return path.read_text("utf-8").strip()
