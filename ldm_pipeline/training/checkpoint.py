"""Checkpoints that are either whole or not there.

A checkpoint is a folder `step-00001000` with one safetensors file per part (weights, moving
average, optimiser), `state.json`, and `manifest.json` with the size and SHA-256 of every other
file. It is written under a temporary name, flushed to the disk and renamed, so that a kill at any
moment leaves the older ones as they were. `newest` checks the manifest: a damaged checkpoint is
named and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm_pipeline.data.writing import writing
from ldm_pipeline.replacing import flush

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
"""Of a run's folder, where its checkpoints are."""

MANIFEST = "manifest.json"
STATE = "state.json"
UNFINISHED = ".unfinished-"
ASIDE = ".before-"
"""How names begin of what is half-written, and of a checkpoint whose step is saved once more."""


def save(
    folder: Path, step: int, parts: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> Path:
    """Write the checkpoint of `step` into `folder` and return its path.

    Raises `NotWritten`, with the older ones as they were, where the disk does not take it.
    """
    name = f"step-{step:08d}"
    final, unfinished = folder / name, folder / f"{UNFINISHED}{name}-{os.getpid()}"
    with writing(final, unfinished):
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        unfinished.mkdir()
        _fill(unfinished, parts, {**state, "step": step})
        aside = folder / f"{ASIDE}{name}"
        if final.exists():
            final.rename(aside)
        try:
            unfinished.rename(final)
        except OSError:
            _bring_back(folder)
            raise
        flush(folder)
        shutil.rmtree(aside, ignore_errors=True)
    return final


def _fill(
    unfinished: Path, parts: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> None:
    """Write a checkpoint's files into its folder, and wait until they are on the disk."""
    for part, tensors in parts.items():
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in tensors.items()},
            unfinished / f"{part}.safetensors",
        )
    (unfinished / STATE).write_text(json.dumps(dict(state), indent=2), "utf-8")
    entries = {file.name: _fingerprint(file) for file in sorted(unfinished.iterdir())}
    (unfinished / MANIFEST).write_text(json.dumps(entries, indent=2), "utf-8")
    for file in unfinished.iterdir():
        flush(file)
    flush(unfinished)


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`, or None; damaged ones are named and passed over."""
    _bring_back(folder)
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        fault = damage(candidate)
        if fault is None:
            return candidate
        log.warning("%s is damaged (%s); using the one before it", candidate, fault)
    return None


def load(checkpoint: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The parts and the state of a whole checkpoint, on the CPU."""
    parts = {file.stem: load_file(file) for file in sorted(checkpoint.glob("*.safetensors"))}
    return parts, json.loads((checkpoint / STATE).read_text("utf-8"))


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, in words; None where all is as it was written."""
    try:
        entries = json.loads((checkpoint / MANIFEST).read_text("utf-8"))
        if STATE not in entries:
            return f"{MANIFEST} names no {STATE}"
        for name, expected in entries.items():
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            if _fingerprint(checkpoint / name) != expected:
                return f"{name} has changed"
    except (OSError, ValueError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return None


def prune(folder: Path, keep: int, current: Path) -> None:
    """Keep `current`, just saved, and the newest `keep - 1` before it; remove all others.

    What is numbered after `current` was damaged and passed over when the run went on.
    """
    before = sorted(path for path in folder.glob("step-*") if path.name < current.name)
    after = [path for path in folder.glob("step-*") if path.name > current.name]
    for other in [*before[: max(0, len(before) - keep + 1)], *after]:
        shutil.rmtree(other)


def _fingerprint(file: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def _sweep(folder: Path) -> None:
    """Remove what a killed run left half-written, and bring back what it had set aside."""
    _bring_back(folder)
    for leftover in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _bring_back(folder: Path) -> None:
    """Put what was set aside in its place again, unless what was to come there is there.

    Several processes may do so at once: who comes second finds it done.
    """
    for aside in folder.glob(f"{ASIDE}*"):
        final = folder / aside.name.removeprefix(ASIDE)
        if final.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            with suppress(OSError):
                aside.rename(final)
