"""What looking at a LoRA run costs: a fixed part of what was held out, batched; pictures once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm_pipeline.training.adapting import BANDS
from ldm_pipeline.training.engine import fit
from ldm_pipeline.training.lora import LoraConfig, LoraObjective
from tests.training.conftest import captioned
from tests.training.tiny_lora import open_model

SIZES = [(64, 64), (96, 32), (32, 128)] * 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve captioned pictures of three shapes."""
    return captioned(tmp_path / "pictures", SIZES, "red")


class Watched(LoraObjective):
    """Notes how many samples each question to the network has, and how often it is drawn with."""

    def __init__(self, config: LoraConfig) -> None:
        self.asked: list[int] = []
        self.draws = 0
        super().__init__(config, open_model)

    def _errors(self, group: dict[str, Tensor]) -> Tensor:
        self.asked.append(len(group["t"]))
        return super()._errors(group)

    def _draw(self, pipe: Any, steps: int | list[int], guidance: float) -> list[Image.Image]:
        self.draws += 1
        return super()._draw(pipe, steps, guidance)


def watched(folder: Path, *, batch_size: int = 4, accumulation: int = 1, **told: Any) -> Watched:
    """An objective that holds half of the pictures out; `told` are settings of its data."""
    data = {
        "source": str(folder), "resolution": 64, "bucket_step": 32,
        "cache": folder.parent / "cache", "held_out": 0.5, **told,
    }  # fmt: skip
    run = {"out": folder.parent / "run", "batch_size": batch_size, "mixed_precision": "no",
           "accumulation": accumulation}  # fmt: skip
    return Watched(LoraConfig.model_validate({"run": run, "data": data, "lora": {"rank": 2}}))


def test_validation_is_capped_and_batched(folder: Path) -> None:
    """Every sample that is looked at comes once in each band, in no more at once than training."""
    for measured, accumulation in ((16, 1), (4, 1), (4, 2)):
        objective = watched(folder, measured=measured, accumulation=accumulation)
        objective.validate()
        assert sum(objective.asked) == BANDS * min(measured, 6)
        assert max(objective.asked) == 4 // accumulation
        full = 4 // accumulation
        # Three shapes: at most one batch of each is not full.
        assert sum(n < full for n in objective.asked) <= 3


def test_a_stop_is_heeded_between_two_batches(folder: Path) -> None:
    """One that comes in the first: no other is asked for."""

    class Stopped(Watched):
        def _errors(self, group: dict[str, Tensor]) -> Tensor:
            stop.append(15)
            return super()._errors(group)

    stop: list[int] = []
    objective = Stopped(watched(folder).config)
    objective.heed(stop)
    objective.validate()
    assert len(objective.asked) == 1


def test_what_does_not_fit_is_measured_in_halves(folder: Path) -> None:
    """A run that had to cut its steps says the same; a single sample that does not fit ends it."""

    class Full(Watched):
        most = 1

        def _errors(self, group: dict[str, Tensor]) -> Tensor:
            if len(group["t"]) > self.most:
                raise torch.OutOfMemoryError("out of memory")
            return super()._errors(group)

    wanted = watched(folder).validate()
    full = Full(watched(folder).config)
    assert full.validate() == pytest.approx(wanted, rel=1e-5)  # float32 in other batches
    assert set(full.asked) == {1}
    full.most = 0
    with pytest.raises(torch.OutOfMemoryError):
        full.validate()


def test_what_is_looked_at_is_fixed_and_held_out(folder: Path) -> None:
    objective = watched(folder, measured=3)
    chosen = objective.data.measured
    assert chosen == objective.data.measured == watched(folder, measured=3).data.measured
    assert len({sample.key for sample in chosen}) == 3
    assert all(sample in objective.data.held_out for sample in chosen)
    assert chosen == watched(folder, measured=5).data.measured[:3], "more adds to what there was"


def test_batches_measure_what_single_samples_do(folder: Path) -> None:
    """And each band's is the mean over the samples of that band alone."""
    together, single = watched(folder).validate(), watched(folder, batch_size=1).validate()
    assert together == pytest.approx(single, rel=1e-5)  # float32 in batches of another size
    objective = watched(folder)
    levels: list[list[int]] = []
    for bands, group in objective._validation(objective.data.measured):
        levels += [[b, t] for b, t in zip(bands, group["t"].tolist(), strict=True)]
    most = objective.schedule.num_train_timesteps
    assert all(band * most / BANDS <= t < (band + 1) * most / BANDS for band, t in levels)
    assert together["loss"] == pytest.approx(
        sum(together[f"loss_band_{i}"] for i in range(BANDS)) / BANDS
    )


def test_pictures_of_the_same_weights_are_drawn_once(folder: Path) -> None:
    """Shown, exported as the best and exported in the end: once for each state, and the base once;
    after another update they are drawn anew."""
    objective = watched(folder)
    run = {"out": folder.parent / "run", "batch_size": 4, "mixed_precision": "no", "workers": 0,
           "steps": 4, "validate_every": 2, "log_with": "none"}  # fmt: skip
    told = {**objective.config.model_dump(), "run": run,
            "optimiser": {"lr": 1e-2, "warmup_steps": 0, "ema_decay": 0.5},
            "pictures": {"prompts": ["red"], "steps": 1}}  # fmt: skip
    config = LoraConfig.model_validate(told)
    objective = Watched(config)
    final = fit(objective, config)
    assert objective.draws == 1 + 2
    out = config.run.out
    first, last = (
        np.asarray(Image.open(out / "pictures" / f"step-0000000{n}.png")) for n in (2, 4)
    )
    assert not np.array_equal(first, last)
    assert np.array_equal(last, np.asarray(Image.open(final / "pictures.png")))
    with torch.no_grad():
        next(iter(objective.adapter.parameters.values())).add_(1)
    objective.picture()
    assert objective.draws == 1 + 3
