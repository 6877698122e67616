"""A large file is read once, and its digest is right after every change of it."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import pytest

from ldm_pipeline.commands import hashing

TICK = 20_000_000
"""Nanoseconds; no file system here has a coarser clock."""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that counts as large, written long enough ago."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashing, "LARGE", 8)
    monkeypatch.setattr(hashing, "TICK", TICK)
    made = tmp_path / "model.safetensors"
    made.write_bytes(b"0123456789")
    time.sleep(2 * TICK / 1e9)
    return made


def right(file: Path) -> bool:
    time.sleep(2 * TICK / 1e9)
    return hashing.of_file(file) == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_file_is_read_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = hashing.of_file(file)
    assert right(file)
    (file.parent / "link").symlink_to(file)
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    assert hashing.of_file(file) == hashing.of_file(file.parent / "link") == first


def test_every_change_is_seen(file: Path) -> None:
    """Of one byte, at the same size and with the old date put back; of another file in place."""
    assert right(file)
    before = file.stat()
    with file.open("r+b") as opened:
        opened.write(b"9")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert right(file)
    other = file.with_name("other")
    other.write_bytes(b"abcdefghij")
    other.replace(file)
    assert right(file)
    file.write_bytes(b"small")
    assert right(file)


def test_what_was_written_just_now_or_meanwhile_is_not_kept(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "TICK", 10**12)
    assert right(file)
    assert not hashing.folder().exists()
    monkeypatch.setattr(hashing, "TICK", TICK)
    digest = hashlib.file_digest

    def meanwhile(opened: Any, name: Any) -> Any:
        found = digest(opened, name)
        time.sleep(2 * TICK / 1e9)
        file.write_bytes(b"changed meanwhile")
        return found

    monkeypatch.setattr(hashlib, "file_digest", meanwhile)
    hashing.of_file(file)
    monkeypatch.undo()
    assert not list(file.parent.rglob("*.json"))


def test_a_damaged_note_and_a_cache_that_cannot_be_written_do_no_harm(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert right(file)
    (note,) = hashing.folder().iterdir()
    for text in ("", "[]", "{}", '{"digest": 1}'):
        note.write_text(text)
        assert right(file)
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert right(file)
