"""Checkpoints: whole or not there, whatever happens while one is written or afterwards."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from ldm_pipeline.training import checkpoint
from tests.kills import killed_at


def parts_of(step: int) -> dict[str, dict[str, Tensor]]:
    """Two parts whose tensors tell the step."""
    return {
        "weights": {"a": torch.full((3, 2), float(step)), "b": torch.arange(4) + step},
        "average": {"a": torch.full((3, 2), step / 7)},
    }


def save(folder: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return checkpoint.save(folder, step, parts_of(step), {"seed": 5})


def assert_whole(path: Path | None, step: int) -> None:
    """`path` is the checkpoint of `step`, bit for bit."""
    assert path is not None
    parts, state = checkpoint.load(path)
    assert state == {"seed": 5, "step": step}
    assert parts.keys() == parts_of(step).keys()
    for part, tensors in parts_of(step).items():
        assert parts[part].keys() == tensors.keys()
        for name, value in tensors.items():
            assert parts[part][name].dtype == value.dtype
            assert torch.equal(parts[part][name], value)


def test_there_and_back(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "never") is None
    for step in (8, 9, 10, 100):  # the order of numbers, not of letters
        save(tmp_path / "some", step)
        assert_whole(checkpoint.newest(tmp_path / "some"), step)


def test_what_lies_on_the_disk_runs_no_code(tmp_path: Path) -> None:
    """Tensors in safetensors, the rest in JSON, nothing else."""
    for file in save(tmp_path, 1).iterdir():
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                assert list(opened.keys())
        else:
            assert file.suffix == ".json"
            json.loads(file.read_text())


@pytest.mark.parametrize("over", ["nothing", "a damaged one", "a whole one"])
def test_a_kill_at_any_moment_of_a_save_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, over: str
) -> None:
    """Before and after every write, flush, removal and renaming of a save, the newest whole
    checkpoint is the old one or, at the very end, the new one; the next save leaves no rubbish.
    A whole one of the same step is never lost."""
    places = [
        (checkpoint, "save_file"),
        (checkpoint, "_fingerprint"),
        (checkpoint, "flush"),
        (shutil, "rmtree"),
        (Path, "mkdir"),
        (Path, "write_text"),
        (Path, "rename"),
    ]
    stop_at = 0
    finished = False
    while not finished:
        folder = tmp_path / str(stop_at)
        save(folder, 1)
        if over != "nothing":
            before = save(folder, 2)
        if over == "a damaged one":
            (before / checkpoint.STATE).write_text("{}")
        stop_at += 1
        with killed_at(stop_at, places, monkeypatch) as ended:
            save(folder, 2)
        finished = ended[0]
        newest = checkpoint.newest(folder)
        assert_whole(newest, 2 if newest == folder / "step-00000002" else 1)
        assert over != "a whole one" or newest == folder / "step-00000002"
        save(folder, 3)
        assert_whole(checkpoint.newest(folder), 3)
        assert not list(folder.glob(".*"))
    assert stop_at > 20


def test_everything_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files and their folder are flushed, then the folder is renamed, then that is flushed."""
    done: list[str] = []
    rename = Path.rename

    def renamed(path: Path, target: Path) -> Path:
        done.append("renamed")
        return rename(path, target)

    def flushed(path: Path) -> None:
        done.append("unfinished" if path.name.startswith(".") else path.name)

    monkeypatch.setattr(checkpoint, "flush", flushed)
    monkeypatch.setattr(Path, "rename", renamed)
    files = {path.name for path in save(tmp_path, 1).iterdir()}
    assert set(done[:4]) == files
    assert done[4:] == ["unfinished", "renamed", tmp_path.name]


def test_a_half_written_folder_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    half = tmp_path / f"{checkpoint.UNFINISHED}step-00000002-999"
    shutil.copytree(save(tmp_path, 2), half)
    shutil.rmtree(tmp_path / "step-00000002")
    assert_whole(checkpoint.newest(tmp_path), 1)


def damages(content: bytes) -> list[tuple[str, bytes | None]]:
    """Ways to spoil a file: removed, cut at 20 lengths, zeroed, one bit flipped at 50 places."""
    n = len(content)
    ways: list[tuple[str, bytes | None]] = [("removed", None), ("zeroed", bytes(n))]
    ways += [(f"cut to {n * i // 20}", content[: n * i // 20]) for i in range(20)]
    for i in range(50):
        place = n * i // 50
        flipped = bytearray(content)
        flipped[place] ^= 1 << i % 8
        ways.append((f"bit {i % 8} of byte {place}", bytes(flipped)))
    return ways


@pytest.mark.parametrize(
    "name", ["weights.safetensors", "average.safetensors", checkpoint.STATE, checkpoint.MANIFEST]
)
def test_every_damage_is_noticed_named_and_the_older_one_used(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    older = save(tmp_path, 1)
    newer = save(tmp_path, 2)
    whole = (newer / name).read_bytes()
    for way, content in damages(whole):
        caplog.clear()
        (newer / name).unlink(missing_ok=True)
        if content is not None:
            (newer / name).write_bytes(content)
        assert checkpoint.newest(tmp_path) == older, way
        assert str(newer) in caplog.text, way
        # A bit in the manifest can turn the name of a file; that file is then named as missing.
        assert name == checkpoint.MANIFEST or name in caplog.text, way
    (newer / name).write_bytes(whole)
    assert checkpoint.newest(tmp_path) == newer


def test_a_manifest_that_lists_nothing_vouches_for_nothing(tmp_path: Path) -> None:
    (save(tmp_path, 1) / checkpoint.MANIFEST).write_text("{}")
    assert checkpoint.newest(tmp_path) is None


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_prune_keeps_the_newest(tmp_path: Path, keep: int) -> None:
    for step in range(1, 5):
        saved = save(tmp_path, step)
        checkpoint.prune(tmp_path, keep, saved)
        kept = sorted(path.name for path in tmp_path.iterdir())
        assert kept == [f"step-{i:08d}" for i in range(max(1, step - keep + 1), step + 1)]


def test_prune_never_prefers_a_damaged_one(tmp_path: Path) -> None:
    """A run that passed over step 6 and saved step 5 keeps step 5."""
    save(tmp_path, 4)
    save(tmp_path, 6)
    saved = save(tmp_path, 5)
    checkpoint.prune(tmp_path, 1, saved)
    assert list(tmp_path.iterdir()) == [saved]
