"""What a run says of itself: its bar, its summary, TensorBoard, wandb or nothing."""

from __future__ import annotations

import logging
import re
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import PIL.Image
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldm_pipeline.errors import UserError
from ldm_pipeline.training import clock, tracking
from ldm_pipeline.training.config import TrainingConfig
from ldm_pipeline.training.engine import fit
from ldm_pipeline.training.launch import launch
from tests.training.toy import Toy, settings


class Drawing(Toy):
    """A toy that draws a red picture."""

    def picture(self) -> PIL.Image.Image:
        """32 x 16 pixels."""
        return PIL.Image.new("RGB", (32, 16), "red")


def with_run(config: TrainingConfig, **told: Any) -> TrainingConfig:
    """The same with other settings of the run."""
    return config.model_copy(update={"run": config.run.model_copy(update=told)})


# -- the bar ---------------------------------------------------------------------------------


class Timed(Toy):
    """Whose every batch takes half a second, and every validation three, by a clock of its own."""

    now = 100.0

    def batch(self, positions: range) -> dict[str, Any]:
        """The toy's batch."""
        self.now += 0.5
        return super().batch(positions)

    def validate(self) -> dict[str, float]:
        """The toy's measure."""
        self.now += 3.0
        return super().validate()


def test_the_bar_tells_loss_speed_and_what_is_left_and_the_end_what_validation_took(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """4 samples in half a second are 8 img/s, validations left out; 3 of them took 9 of 12 s."""
    logged: list[float] = []
    monkeypatch.setattr("accelerate.Accelerator.log", lambda self, values, step: logged.append(
        values.get("samples_per_second", 0.0)))  # fmt: skip
    config = with_run(settings(tmp_path), log_every=3)
    toy = Timed(config)
    monkeypatch.setattr(clock, "monotonic", lambda: toy.now)
    with caplog.at_level(logging.INFO):
        fit(toy, config)
    bar = capsys.readouterr().err
    assert re.search(r"6/6 \[\d+:\d+<\d+:\d+, .*loss=\d\S*, .*img/s=8\b", bar), bar
    assert [speed for speed in logged if speed] == [8.0, 8.0]
    assert "6 steps in 12 s; validation and pictures took 75.0 % of that" in caplog.text


def test_a_run_that_goes_on_counts_its_own_steps_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = settings(tmp_path, steps=4)
    fit(Toy(config), config)
    caplog.clear()
    more = settings(tmp_path, steps=6)
    with caplog.at_level(logging.INFO):
        fit(Toy(more), more)
        assert "2 steps in " in caplog.text
        caplog.clear()
        fit(Toy(more), more)
        assert "steps in" not in caplog.text, "nothing was left to do"


# -- where it is logged ----------------------------------------------------------------------


def test_tensorboard_has_the_numbers_and_the_pictures(tmp_path: Path) -> None:
    config = settings(tmp_path)
    fit(Drawing(config), config)
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert {"loss", "lr", "samples_per_second", "validation/error"} <= {*events.Tags()["scalars"]}
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    pictures = events.Images("picture")
    assert [(p.step, p.width, p.height) for p in pictures] == [(n, 32, 16) for n in (2, 4, 6)]


def test_none_logs_nowhere(tmp_path: Path) -> None:
    config = with_run(settings(tmp_path), log_with="none")
    fit(Drawing(config), config)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoints", "config.yaml", "final", "pictures"}


class FakeRun:
    """What `wandb.init` answers; keeps what it is told."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.told = told
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = False

    def log(self, values: dict[str, Any], step: int) -> None:
        """Note the values."""
        self.logged.append((step, values))

    def finish(self) -> None:
        """Note it."""
        self.finished = True


class FakeWandb(ModuleType):
    """The part of wandb that accelerate calls, with no network where `online` is false."""

    class Error(Exception):
        """What wandb raises."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.runs: list[FakeRun] = []
        self.online = True
        self.settings: dict[str, Any] = {}
        self.config = self

    def init(self, **told: Any) -> FakeRun:
        """A run, unless it would need the network."""
        if not self.online and told.get("mode") != "offline":
            raise self.Error("no API key\nconfigured")
        self.runs.append(FakeRun(told))
        return self.runs[-1]

    def update(self, values: dict[str, Any], allow_val_change: bool) -> None:
        """Note the configuration."""
        assert allow_val_change
        self.settings = values

    def Image(self, array: Any) -> Any:
        """The array's shape."""
        return array.shape


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    """A wandb that is installed."""
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_has_the_numbers_the_pictures_and_the_configuration(
    tmp_path: Path, wandb: FakeWandb
) -> None:
    """And a run that goes on is the same run there."""
    for steps in (2, 6):
        config = with_run(settings(tmp_path / "mine", steps=steps), log_with="wandb")
        fit(Drawing(config), config)
    first, second = wandb.runs
    assert first.finished
    assert second.finished
    assert (first.told["project"], first.told["name"]) == (tracking.PROJECT, "mine")
    assert first.told["dir"] == str(tmp_path / "mine")
    assert first.told["id"] == second.told["id"]
    assert first.told["resume"] == "allow"
    losses = [(step, values["loss"]) for step, values in second.logged if "loss" in values]
    assert [step for step, _ in losses] == [3, 4, 5, 6]
    assert (4, {"picture": [(16, 32, 3)]}) in second.logged
    assert any("validation/error" in values for _, values in second.logged)
    assert wandb.settings == config.model_dump(mode="json")
    assert not (tmp_path / "mine" / "logs").exists()


def test_without_a_way_to_wandb_the_log_stays_here_and_says_so(
    tmp_path: Path, wandb: FakeWandb, caplog: pytest.LogCaptureFixture
) -> None:
    wandb.online = False
    config = with_run(settings(tmp_path), log_with="wandb")
    fit(Toy(config), config)
    (run,) = wandb.runs
    assert run.told["mode"] == "offline"
    assert len(run.logged) == 6 + 3
    assert "wandb does not answer (no API key configured)" in caplog.text
    assert "wandb sync" in caplog.text


@pytest.mark.parametrize("kind,extra", tracking.EXTRAS.items())
def test_a_library_that_is_missing_is_named_before_anything_is_loaded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    extra: str,
) -> None:
    def unasked(config: TrainingConfig) -> Toy:
        raise AssertionError("the objective was built")

    def found(name: str) -> Any:
        return None if name == kind else find_spec(name)

    monkeypatch.setattr(tracking, "find_spec", found)
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["train", f"--run.out={out}", f"--run.log_with={kind}"])
    with pytest.raises(SystemExit) as stop:
        launch(TrainingConfig, unasked)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert f"pip install 'ldm-pipeline[{extra}]'" in error
    assert error.count("\n") == 1
    config = with_run(settings(out), log_with=kind)
    with pytest.raises(UserError, match=r"run\.log_with"):
        fit(Toy(config), config)
    assert not out.exists()
