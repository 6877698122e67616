"""The training scripts' manners: a mistake costs one line and exit code 2."""

from __future__ import annotations

import errno
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from ldm_pipeline.data.cache import Cache, Entry, fill
from ldm_pipeline.training import checkpoint, engine
from ldm_pipeline.training.config import TrainingConfig
from ldm_pipeline.training.launch import launch
from ldm_pipeline.training.world_data import CachedWorldSettings
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


@pytest.mark.parametrize(
    "script,key",
    [
        ("train_clip", "run.out"),
        ("train_lora", "data.cache"),
        ("train_lcm", "world.cache"),
        ("train_unet", "data.cache"),
    ],
)
def test_a_run_whose_folder_is_a_file_is_refused_at_once(
    script: str,
    key: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before any model is opened: that of train_unet is not even there."""
    (tmp_path / "taken").write_text("mine")
    needed = {
        "train_lora": ["--data.source", str(tmp_path)],
        "train_unet": ["--autoencoder", "absent", "--text", "absent"],
    }
    for place in ("taken", "taken/below"):
        told = ["--run.out", str(tmp_path / "out"), f"--{key}", str(tmp_path / place)]
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *needed.get(script, []), *told])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TRAIN / f"{script}.py"), run_name="__main__")
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {key}={tmp_path / place}: ")
        assert line.endswith("is a file; choose another folder")
    assert (tmp_path / "taken").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


class Cached(TrainingConfig):
    """What a run with a cache is told."""

    data: CachedWorldSettings = CachedWorldSettings()


def test_a_cache_that_is_full_need_not_be_writable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be another's, or on a disk that is only read."""
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(os, "access", lambda place, how: Path(place).name != "cache")
    told = [f"--data.cache={tmp_path / 'cache'}", f"--run.out={tmp_path / 'out'}"]
    steps = ["--run.steps=3", "--run.batch_size=4", "--run.workers=0"]
    monkeypatch.setattr(sys, "argv", ["toy", *steps, *told])
    launch(Cached, Toy)
    assert (tmp_path / "out" / "final").is_dir()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a system without /proc")
def test_a_run_whose_folder_cannot_be_made_is_refused_before_anything_is_built(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the permissions say that it can, as they say to the root of Linux's /proc."""
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, Unreachable, "--run.out=/proc/x")
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: run.out=/proc/x")
    assert "cannot be written to" in line


def test_the_end_says_where_the_model_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, Toy, f"--run.out={tmp_path}")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"the trained model is in {tmp_path / 'final'}"
    assert (tmp_path / "final" / "toy.safetensors").is_file()
    assert (tmp_path / "config.yaml").is_file()


class Unreachable(Toy):
    """A toy that must not be built."""

    def __init__(self, config: TrainingConfig) -> None:
        raise AssertionError("the objective was built, and would have encoded its data")


@pytest.mark.parametrize(
    "told,said",
    [
        ("--run.accumulation=3", "run.batch_size=4 must be a multiple of"),
        ("--run.mixed_precision=fp16", "needs a GPU"),
        ("--optimiser.kind=adamw8bit", "needs pip install"),
        ("--begin_from=nowhere", "begin_from=nowhere is not there"),
        ("ACCELERATE_USE_FSDP", "FSDP of version 1"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed is not supported"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_anything_is_encoded(
    told: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    if told.startswith("ACCELERATE"):
        monkeypatch.setenv(told, "true")
    arguments = [told] if told.startswith("--") else []
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, Unreachable, f"--run.out={tmp_path / 'out'}", *arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert list(tmp_path.iterdir()) == []


class Encoding(Toy):
    """A toy that first encodes ten things, one by one, into `cache` beside its folder."""

    ends_in: int | None = None
    """The thing at which a signal comes."""
    number = signal.SIGTERM
    told_now: list[int]
    """What was encoded in the run under way."""

    def __init__(self, config: TrainingConfig) -> None:
        type(self).told_now = []
        keys = [str(i) for i in range(10)]
        fill(Cache(config.run.out.parent / "cache"), keys, self.encode, batch_size=1)
        super().__init__(config)

    def encode(self, indices: Sequence[int]) -> list[Entry]:
        """A number for each thing."""
        if indices[0] == self.ends_in:
            os.kill(os.getpid(), self.number)
        self.told_now += indices
        return [{"value": torch.tensor(i)} for i in indices]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_while_encoding_keeps_what_is_encoded(
    number: signal.Signals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = [signal.getsignal(known) for known in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(Encoding, "number", number)
    with monkeypatch.context() as patch:
        patch.setattr(Encoding, "ends_in", 4)
        with pytest.raises(SystemExit) as ended:
            run(monkeypatch, Encoding, f"--run.out={tmp_path / 'out'}")
    assert ended.value.code == 130
    told = capsys.readouterr().err.splitlines()
    assert told[-1] == "stopped while encoding; the same command goes on from there"
    assert [signal.getsignal(known) for known in (signal.SIGINT, signal.SIGTERM)] == before
    assert not (tmp_path / "out").exists()
    run(monkeypatch, Encoding, f"--run.out={tmp_path / 'out'}")
    assert Encoding.told_now == [4, 5, 6, 7, 8, 9]


NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("at", ["config.yaml", "checkpoints/step-00000002", "best", "final"])
def test_a_full_disk_ends_in_one_line_and_costs_nothing_that_was_written(
    at: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Wherever it happens: what an earlier run wrote is as it was, and nothing half-written."""

    def half(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    def half_exported(self: Toy, folder: Path, updates: int) -> None:
        Toy.export(self, folder, updates)
        if at in folder.name:
            (folder / "toy.safetensors").write_bytes(b"half")
            raise NO_SPACE

    def half_told(config: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise NO_SPACE

    told = [f"--run.out={tmp_path}", "--run.save_every=1"]
    run(monkeypatch, Best, *told, "--run.steps=1")
    before = contents(tmp_path)
    assert {"best/toy.safetensors", "final/toy.safetensors"} <= before.keys()
    capsys.readouterr()
    patches: dict[str, tuple[Any, str, Any]] = {
        "config.yaml": (engine, "write_yaml", half_told),
        "checkpoints/step-00000002": (checkpoint, "save_file", half),
        "best": (Best, "export", half_exported),
        "final": (Best, "export", half_exported),
    }
    monkeypatch.setattr(*patches[at])
    validating = "--run.validate_every=2" if at == "best" else "--run.validate_every=100"
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, Best, *told, validating)
    assert ended.value.code == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    assert str(tmp_path / at) in last
    assert "No space left on device" in last
    after = contents(tmp_path)
    assert [name for name in after if "unfinished" in name] == []
    assert {n: v for n, v in after.items() if n.startswith(at)} == {
        n: v for n, v in before.items() if n.startswith(at)
    }
    # What a validation writes comes after the checkpoint of its step.
    last_whole = {"config.yaml": 1, "checkpoints/step-00000002": 1, "best": 2, "final": 3}[at]
    newest = checkpoint.newest(tmp_path / "checkpoints")
    assert newest == tmp_path / "checkpoints" / f"step-{last_whole:08d}"


class Best(Toy):
    """A toy whose every validation is better than the one before."""

    def validate(self) -> dict[str, float]:
        """A loss that falls."""
        type(self).least -= 1
        return {"loss": self.least}

    least = 0.0


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


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


class Full(Toy):
    """A toy that runs out of memory at one place."""

    place = ""

    def __init__(self, config: TrainingConfig) -> None:
        self._enter("init")
        super().__init__(config)

    def _enter(self, name: str) -> None:
        if name == type(self).place:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n2 GiB")

    def validate(self) -> dict[str, float]:
        """The toy's."""
        self._enter("validate")
        return super().validate()

    def picture(self) -> None:
        """None is drawn."""
        self._enter("picture")

    def export(self, folder: Path, updates: int) -> None:
        """The toy's."""
        self._enter("export")
        super().export(folder, updates)


@pytest.mark.parametrize(
    "place,said",
    [
        ("init", "while the model was opened and the data were encoded"),
        ("validate", "in a validation"),
        ("picture", "while pictures were drawn"),
        ("export", "or a model was written"),
        ("update", "in an update: optimiser.kind=adafactor"),
        ("start", "outside the gradients of a step"),
    ],
)
def test_out_of_memory_anywhere_ends_in_one_line_that_says_what_to_do(
    place: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*args: object, **told: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Full, "place", place)
    if place == "update":
        monkeypatch.setattr(torch.optim.AdamW, "step", full)
    if place == "start":
        monkeypatch.setattr(engine, "moving_average", full)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, Full, f"--run.out={tmp_path}")
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("error: out of memory ")
    assert said in last
