"""The training scripts' manners: a mistake costs one line and exit code 2."""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path

import pytest
from torch import nn

from ldm_pipeline.training.config import TrainingConfig
from ldm_pipeline.training.launch import launch
from tests.training.toy import Toy

TRAIN = Path(__file__).parents[2] / "train"
SCRIPTS = sorted(path.stem for path in TRAIN.glob("train_*.py"))
OUT = ["--run.out", "unused"]

MISTAKES = {
    "unknown key": [*OUT, "--optimiser.learnig_rate", "1"],
    "unknown section": [*OUT, "--optimizer.lr", "1"],
    "negative": [*OUT, "--run.steps", "-3"],
    "no file": ["--config", "absent.yaml"],
    "no option": ["faster"],
    "no section for it": ["--run", "here"],
}

ONLY_IN = {
    "crop that latents do not tile": ("train_autoencoder", [*OUT, "--crop", "60"]),
    "crop beyond the picture": ("train_autoencoder", [*OUT, "--crop", "136"]),
    "three levels": ("train_autoencoder", [*OUT, "--model.channels", "[8, 8, 8]"]),
    "groups": ("train_autoencoder", [*OUT, "--model.norm_groups", "7"]),
    "heads": ("train_clip", [*OUT, "--model.heads", "7"]),
    "patch": ("train_clip", [*OUT, "--model.patch", "20"]),
    "no autoencoder": ("train_unet", [*OUT, "--autoencoder", "absent", "--text", "absent"]),
    "unet's groups": (
        "train_unet",
        [*OUT, "--autoencoder", "a", "--text", "b", "--model.norm_groups", "7"],
    ),
}

CASES = [(script, told) for script in SCRIPTS for told in MISTAKES.values()]
NAMES = [f"{script}: {name}" for script in SCRIPTS for name in MISTAKES]


@pytest.mark.parametrize(
    "script,told", [*CASES, *ONLY_IN.values()], ids=[*NAMES, *(f"only: {n}" for n in ONLY_IN)]
)
def test_a_mistake_costs_one_line_and_code_2(
    script: str,
    told: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing is written, either."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *told])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TRAIN / f"{script}.py"), run_name="__main__")
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def run(monkeypatch: pytest.MonkeyPatch, build: type[nn.Module], *told: str) -> None:
    """Launch a toy with this command line."""
    monkeypatch.setattr(
        sys, "argv", ["toy", "--run.steps=3", "--run.batch_size=4", "--run.workers=0", *told]
    )
    launch(TrainingConfig, build)


def test_a_run_whose_folder_is_a_file_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("mine")
    for out in ("taken", "taken/below"):
        monkeypatch.setattr(sys, "argv", ["train_clip.py", "--run.out", str(tmp_path / out)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TRAIN / "train_clip.py"), run_name="__main__")
        assert ended.value.code == 2
        assert "is a file; choose another folder" in capsys.readouterr().err
    assert (tmp_path / "taken").read_text() == "mine"


def test_the_end_says_where_the_model_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, Toy, f"--run.out={tmp_path}")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"the trained model is in {tmp_path / 'final'}"
    assert (tmp_path / "final" / "toy.safetensors").is_file()
    assert (tmp_path / "config.yaml").is_file()


def test_a_batch_without_equal_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, Toy, f"--run.out={tmp_path}", "--run.accumulation=3")
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


class Terminated(Toy):
    """A toy whose process is asked to end while it makes its second batch."""

    def __init__(self, config: TrainingConfig) -> None:
        def ask(positions: range) -> None:
            if positions.start == config.run.batch_size:
                os.kill(os.getpid(), signal.SIGTERM)

        super().__init__(config, ask)


class Diverging(Toy):
    """A toy whose loss has no number."""

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__(config, scale=float("nan"))


@pytest.mark.parametrize(
    "build,code,said", [(Terminated, 130, "stopped at step 2;"), (Diverging, 1, "step 0: ")]
)
def test_other_ends_have_their_codes(
    build: type[nn.Module],
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, build, f"--run.out={tmp_path}")
    assert ended.value.code == code
    assert said in capsys.readouterr().err
