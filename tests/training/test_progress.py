"""What a checkpoint keeps of a run besides its tensors, and what is not kept."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from ldm_pipeline.training import checkpoint, engine
from ldm_pipeline.training.config import TrainingConfig
from ldm_pipeline.training.engine import Interrupted, fit
from tests.training.test_engine import Full, assert_same, exported, saved, stop_in
from tests.training.toy import Toy, settings


def state_of(config: TrainingConfig) -> dict[str, Any]:
    """The state in a run's newest checkpoint."""
    newest = checkpoint.newest(config.run.out / "checkpoints")
    assert newest is not None
    return checkpoint.load(newest)[1]


# -- pieces ----------------------------------------------------------------------------------


def sizes_of(config: TrainingConfig, kind: type[Toy] = Toy) -> list[int]:
    """How many samples each piece has that a run asks for."""
    seen: list[int] = []
    fit(kind(config, lambda positions: seen.append(len(positions))), config)
    return seen


def test_a_run_that_goes_on_has_the_pieces_that_are_asked_for_now(tmp_path: Path) -> None:
    """Fewer ones too: only what did not fit into the memory is remembered."""
    assert sizes_of(settings(tmp_path, steps=1, accumulation=4)) == [1] * 4
    assert sizes_of(settings(tmp_path, steps=2, accumulation=1)) == [4]
    assert sizes_of(settings(tmp_path, steps=3, accumulation=2)) == [2] * 2


def test_what_was_found_holds_while_the_same_is_asked_and_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At most two samples fit: found once, kept, and forgotten where something else is asked."""
    caplog.set_level("INFO")
    assert sizes_of(settings(tmp_path, steps=1, batch_size=8), Full) == [8, 4, 4, 2, 2, 2, 2]
    caplog.clear()
    assert sizes_of(settings(tmp_path, steps=2, batch_size=8), Full) == [2] * 4
    (line,) = [m for m in caplog.messages if "larger pieces" in m]
    assert "going on with 4 a process, not run.accumulation=1" in line
    caplog.clear()
    assert sizes_of(settings(tmp_path, steps=3, batch_size=8, accumulation=2)) == [4] * 2
    assert sizes_of(settings(tmp_path, steps=4, batch_size=4, accumulation=1)) == [4]
    assert "larger pieces" not in caplog.text


# -- a validation that a stop left out -------------------------------------------------------


class Measured(Toy):
    """A toy whose best model is kept, and which draws."""

    def validate(self) -> dict[str, float]:
        """The toy's error, as a loss."""
        return {"loss": super().validate()["error"]}

    def picture(self) -> PIL.Image.Image:
        """Its first weight, as a red."""
        red = int(128 + 100 * float(self.first.weight[0, 0]))
        return PIL.Image.new("RGB", (2, 2), (red, 0, 0))


class StoppedWithin(Measured):
    """Whose process is asked to stop in the middle of its second validation."""

    calls = 0

    def validate(self) -> dict[str, float]:
        """The same."""
        self.calls += 1
        if self.calls == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().validate()


@pytest.fixture
def measures(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """The loss of each validation that is logged, by its step."""
    told: dict[int, float] = {}

    def note(self: Accelerator, values: dict[str, float], step: int) -> None:
        if "validation/loss" in values:
            assert step not in told
            told[step] = values["validation/loss"]

    monkeypatch.setattr(Accelerator, "log", note)
    return told


def left(config: TrainingConfig) -> dict[str, bytes]:
    """The pictures that a run left."""
    return {path.name: path.read_bytes() for path in (config.run.out / "pictures").iterdir()}


def test_a_stop_costs_no_validation(tmp_path: Path, measures: dict[int, float]) -> None:
    """Wherever a run is stopped, the last step and a validation included, it ends with the
    measures, the best model and the pictures of a run without stop."""
    whole = settings(tmp_path / "whole")
    fit(Measured(whole), whole)
    wanted = dict(measures)
    assert list(wanted) == [2, 4, 6]
    for last in range(whole.run.steps):
        measures.clear()
        config = settings(tmp_path / f"stopped in {last}")
        with pytest.raises(Interrupted, match=f"step {last + 1};"):
            fit(Measured(config, stop_in(last, 4, signal.SIGTERM)), config)
        assert last + 1 not in measures
        fit(Measured(config), config)
        assert measures == wanted
        best = [load_file(c.run.out / "best" / "toy.safetensors") for c in (whole, config)]
        assert_same(*best)
        assert left(config) == left(whole)
    measures.clear()
    config = settings(tmp_path / "stopped within")
    with pytest.raises(Interrupted, match="step 4;"):
        fit(StoppedWithin(config), config)
    assert list(measures) == [2], "what a stop may have cut short is not kept"
    fit(Measured(config), config)
    assert measures == wanted
    assert left(config) == left(whole)


def test_a_validation_is_owed_until_it_is_made(tmp_path: Path, measures: dict[int, float]) -> None:
    """A stop before it, and another one in it: the run begins with it once more."""
    config = settings(tmp_path)
    with pytest.raises(Interrupted):
        fit(Measured(config, stop_in(1, 4, signal.SIGTERM)), config)
    again = StoppedWithin(config)
    again.calls = 1
    with pytest.raises(Interrupted, match="step 2;"):
        fit(again, config)
    assert measures == {}
    fit(Measured(config), config)
    assert list(measures) == [2, 4, 6]
    assert state_of(config)["owed"] is False


class Counting(Measured):
    """Whose export tells how many updates made it, and whose first validation is the best."""

    calls = 0

    def validate(self) -> dict[str, float]:
        """0, 1, …"""
        self.calls += 1
        return {"loss": self.calls - 1.0}

    def export(self, folder: Path, updates: int) -> None:
        """The toy's, with the number."""
        super().export(folder, updates)
        (folder / "updates").write_text(str(updates))


def test_what_is_exported_says_how_many_updates_made_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The best after 2 of 6; the final one after 6, also where fewer are asked for later."""

    def told(name: str) -> str:
        return (tmp_path / name / "updates").read_text()

    config = settings(tmp_path)
    fit(Counting(config), config)
    assert (told("best"), told("final")) == ("2", "6")
    assert "lies below" not in caplog.text
    (tmp_path / "final" / "updates").unlink()
    fewer = settings(tmp_path, steps=3)
    fit(Counting(fewer), fewer)
    assert told("final") == "6"
    assert "run.steps=3 lies below the 6 updates of" in caplog.text


# -- numbers ---------------------------------------------------------------------------------


def test_the_scale_of_fp16_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It doubles after every two good steps; a stop between them changes neither when nor what."""

    class Scaling(Accelerator):
        def __init__(self, **told: Any) -> None:
            super().__init__(**told)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)

    monkeypatch.setattr(engine, "Accelerator", Scaling)
    whole, broken = settings(tmp_path / "whole", steps=5), settings(tmp_path / "broken", steps=5)
    fit(Toy(whole), whole)
    assert state_of(whole)["scaler"]["scale"] == 32.0
    with pytest.raises(Interrupted):
        fit(Toy(broken, stop_in(2, 4, signal.SIGTERM)), broken)
    fit(Toy(broken), broken)
    assert state_of(broken)["scaler"] == state_of(whole)["scaler"]
    assert_same(exported(broken), exported(whole))


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    """One line; the checkpoint before stays, and the run goes on from it."""
    good = settings(tmp_path, steps=2)
    fit(Toy(good), good)
    before = saved(good)
    bad = settings(tmp_path, steps=4, save_every=1, validate_every=100, lr=1e300)
    with pytest.raises(FloatingPointError, match="after 3 updates the weights are not finite"):
        fit(Toy(bad), bad)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    assert_same(before["weights"], saved(bad)["weights"])
    better = settings(tmp_path, steps=4)
    fit(Toy(better), better)
    assert state_of(better)["step"] == 4
