"""What of a run its checkpoints keep, and how the run goes on from the newest one.

Legend
    pieces   of a process's share of a batch, which it computes one after the other
    asked    the settings that decide how large a piece is
    owed     of a validation: due after the last update, and left out as the run was stopped
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm_pipeline.errors import UserError
from ldm_pipeline.processes.ranks import Ranks
from ldm_pipeline.training import checkpoint
from ldm_pipeline.training.config import TrainingConfig
from ldm_pipeline.training.resuming import refuse_other_meaning
from ldm_pipeline.training.updates import MovingAverage, optimiser_state, restore_optimiser

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Where a run is: updates made, pieces, the least loss of a validation, and whether one is
    owed. Who goes on from a checkpoint that owes one makes it first, as often as that happens."""

    done: int = 0
    pieces: int = 1
    best: float = math.inf
    owed: bool = False


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run, and the parts of it that they are made of.

    `average` is the moving average of what is trained, `scaler` fp16's; None where there is none.
    """

    config: TrainingConfig
    ranks: Ranks
    trained: Mapping[str, nn.Parameter]
    optimiser: Any
    average: MovingAverage | None
    scaler: Any

    @property
    def folder(self) -> Path:
        """Where they are."""
        return self.config.run.out / checkpoint.FOLDER

    def finite(self) -> bool:
        """Whether all that is trained is finite; this waits for the device."""
        each = [torch.isfinite(p).all() for p in self.trained.values()]
        return bool(torch.stack(each).all())

    def save(self, at: Progress) -> None:
        """Write a checkpoint, and remove those that are older than the newest to be kept."""
        tensors, others = optimiser_state(self.optimiser, self.trained)
        parts: dict[str, Mapping[str, Tensor]] = {"weights": self.trained, "optimiser": tensors}
        if self.average is not None:
            parts["average"] = self.average.average
        state = {
            "optimiser": others,
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "seed": self.config.run.seed,
            "kind": self.config.optimiser.kind,
            "processes": self.ranks.count,
            "asked": self._asked(),
            "pieces": at.pieces,
            "best": at.best if math.isfinite(at.best) else None,
            "owed": at.owed,
        }
        saved = checkpoint.save(self.folder, at.done, parts, state)
        checkpoint.prune(self.folder, self.config.run.keep_checkpoints, saved)

    def resume(self) -> Progress:
        """Put the newest whole checkpoint in place; the run begins where there is none.

        Raises UserError where it is another model's, or its numbers mean something else now.
        """
        run = self.config.run
        newest = checkpoint.newest(self.folder)
        if newest is None:
            return Progress(pieces=run.accumulation)
        parts, state = checkpoint.load(newest)
        self._refuse_another(newest, parts["weights"], state)
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(parts["weights"][name])
        if self.average is not None:
            self.average.go_on(parts.get("average"))
        others = state.get("optimiser", {})
        restore_optimiser(self.optimiser, self.trained, parts["optimiser"], others)
        if self.scaler is not None and state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        best = state.get("best")
        at = Progress(
            int(state["step"]),
            self._pieces(state),
            math.inf if best is None else float(best),
            bool(state.get("owed")),
        )
        if self.ranks.index == 0:
            self._tell(newest, at)
        return at

    def _pieces(self, state: Mapping[str, Any]) -> int:
        """What did not fit into the memory is not tried again where the same is asked again."""
        same = (state.get("asked"), state.get("processes")) == (self._asked(), self.ranks.count)
        return int(state["pieces"]) if same else self.config.run.accumulation

    def _asked(self) -> dict[str, int]:
        run = self.config.run
        return {"accumulation": run.accumulation, "batch_size": run.batch_size}

    def _refuse_another(
        self, newest: Path, weights: Mapping[str, Tensor], state: Mapping[str, Any]
    ) -> None:
        """Raise UserError where a checkpoint is not one of this run."""
        if weights.keys() != self.trained.keys():
            raise UserError(f"{newest} holds another model; choose another run.out or remove it")
        for name, parameter in self.trained.items():
            if weights[name].shape != parameter.shape:
                raise UserError(f"{newest} holds another model ({name} has another shape)")
        seed, kind = self.config.run.seed, self.config.optimiser.kind
        told = {
            "run": {"seed": state.get("seed", seed)},
            "optimiser": {"kind": state.get("kind", kind)},
        }
        refuse_other_meaning(self.config, told, newest)  # also where config.yaml is gone

    def _tell(self, newest: Path, at: Progress) -> None:
        """Say where the run goes on, and what is other than asked."""
        run = self.config.run
        log.info("going on from %s", newest)
        if at.pieces != run.accumulation:
            log.info(
                "larger pieces were out of memory: going on with %d a process, not "
                "run.accumulation=%d; ask for another number to try anew",
                at.pieces,
                run.accumulation,
            )
        if at.done > run.steps:
            log.warning(
                "run.steps=%d lies below the %d updates of %s: the model after those is exported",
                run.steps,
                at.done,
                newest,
            )
