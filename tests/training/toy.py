"""A training run in milliseconds: two small layers that learn a wave, one frozen layer between.

Run as a module, it trains one toy the way that `train/` scripts train models:

    python -m tests.training.toy --run.out DIR --run.steps 5 ...

Legend: a position's sample is four unit Gaussian numbers x and y = sin(sum of x).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm_pipeline.training.config import OptimiserSettings, RunSettings, TrainingConfig
from ldm_pipeline.training.launch import launch
from ldm_pipeline.training.objective import Batch
from ldm_pipeline.training.world_data import noise_of

Hook = Callable[[range], None]


class Toy(nn.Module):
    """y = last(tanh(frozen(first(x)))); `asked`, if given, hears of every batch."""

    def __init__(self, config: TrainingConfig, asked: Hook | None = None, scale: float = 1) -> None:
        super().__init__()
        torch.manual_seed(config.run.seed)
        self.seed, self.asked, self.scale = config.run.seed, asked, scale
        self.first = nn.Linear(4, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.last = nn.Linear(8, 1)

    def batch(self, positions: range) -> Batch:
        """x [B, 4] and y [B] of these positions."""
        if self.asked is not None:
            self.asked(positions)
        x = noise_of(positions, (4,), self.seed)
        return {"x": x, "y": x.sum(dim=1).sin()}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The mean squared error, times `scale`."""
        answer = self.last(torch.tanh(self.frozen(self.first(batch["x"]))))[:, 0]
        error = (answer - batch["y"]).square().mean()
        return {"loss": self.scale * error, "error": error}

    def validate(self) -> dict[str, float]:
        """The error on positions that no run reaches."""
        with torch.no_grad():
            x = noise_of(range(10**6, 10**6 + 8), (4,), self.seed)
            return {"error": float(self({"x": x, "y": x.sum(dim=1).sin()})["error"])}

    def export(self, folder: Path, updates: int) -> None:
        """All weights in one file."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / "toy.safetensors")


def settings(
    out: Path,
    *,
    steps: int = 6,
    seed: int = 3,
    batch_size: int = 4,
    accumulation: int = 1,
    mixed_precision: str = "no",
    save_every: int = 100,
    keep_checkpoints: int = 2,
    validate_every: int = 2,
    lr: float = 1e-2,
    max_grad_norm: float = 1.0,
    ema_decay: float = 0.9,
) -> TrainingConfig:
    """A toy's configuration: a short warm-up and cool-down, batches made in this process."""
    run = RunSettings.model_validate(
        {
            "out": out,
            "seed": seed,
            "steps": steps,
            "batch_size": batch_size,
            "accumulation": accumulation,
            "mixed_precision": mixed_precision,
            "workers": 0,
            "log_every": 1,
            "validate_every": validate_every,
            "save_every": save_every,
            "keep_checkpoints": keep_checkpoints,
        }
    )
    optimiser = OptimiserSettings(
        lr=lr,
        warmup_steps=2,
        cooldown_steps=3,
        max_grad_norm=max_grad_norm,
        ema_decay=ema_decay,
    )
    return TrainingConfig(run=run, optimiser=optimiser)


if __name__ == "__main__":
    launch(TrainingConfig, Toy)
