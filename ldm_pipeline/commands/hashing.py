"""The SHA-256 of files: large ones are read once, and not again until they change.

Whether a file is still the one that was read, its place, size, inode and dates tell, the date of
its last change of status among them, which no program sets at will. A date is no witness against a
change in the same tick of the clock: what was written just now is not kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from ldm_pipeline.caches import user_cache
from ldm_pipeline.replacing import temporary_name

LARGE = 2**26
"""Bytes from which on a digest is kept; less is read in a tenth of a second."""

TICK = 2 * 10**9
"""Nanoseconds: the coarsest clock of a file system."""


def folder() -> Path:
    """Where digests are kept."""
    return user_cache("digests")


def of_bytes(contents: bytes) -> str:
    """The SHA-256 of what was read, in hexadecimal."""
    return hashlib.sha256(contents).hexdigest()


def of_file(path: Path) -> str:
    """The SHA-256 of a file's contents, in hexadecimal."""
    place = path.resolve()
    with place.open("rb") as opened:
        facts = _facts(opened.fileno())
        if facts["size"] < LARGE:
            return hashlib.file_digest(opened, "sha256").hexdigest()
        note = folder() / f"{of_bytes(os.fsencode(place))}.json"
        if (kept := _kept(note, facts)) is not None:
            return kept
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
        settled = time.time_ns() - max(facts["mtime"], facts["ctime"]) > TICK
        if settled and _facts(opened.fileno()) == facts:
            _keep(note, {**facts, "digest": digest})
        return digest


def _facts(descriptor: int) -> dict[str, int]:
    """What changes where a file does."""
    told = os.fstat(descriptor)
    return {
        "size": told.st_size,
        "mtime": told.st_mtime_ns,
        "ctime": told.st_ctime_ns,
        "inode": told.st_ino,
        "device": told.st_dev,
    }


def _kept(note: Path, facts: dict[str, int]) -> str | None:
    """The digest that was kept of a file with these `facts`, or None."""
    try:
        told = json.loads(note.read_text(encoding="utf-8"))
        digest = told.pop("digest")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return str(digest) if told == facts else None


def _keep(note: Path, contents: dict[str, int | str]) -> None:
    """Write a note, whole or not at all; without one the file is read again next time."""
    temporary = temporary_name(note)
    with suppress(OSError):
        note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary.write_text(json.dumps(contents), encoding="utf-8")
        temporary.replace(note)
