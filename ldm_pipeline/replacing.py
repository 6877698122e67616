"""Files and folders that appear whole or not at all.

What is written goes to a temporary name in the same folder, is flushed to the disk, and then takes
the name: neither an interruption, a full disk nor a power failure leaves half a file, or harms the
one that was there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ldm_pipeline.errors import UserError

LONGEST = 100
"""Bytes of a name that its temporary one keeps; file systems take 255."""


def temporary_name(path: Path) -> Path:
    """A name in the folder of `path` that no other process uses, for what is in the making."""
    kept = os.fsencode(path.name)[:LONGEST].decode("utf-8", "ignore")
    return path.with_name(f".{kept}.{os.getpid()}.tmp")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The temporary name for `path`: within the block a file or folder is written there, which
    takes the name at its end. Nothing stays of it where the block fails.

    Raises `UserError` where the disk does not take it, or a folder of that name is not empty.
    """
    temporary = temporary_name(path)
    try:
        yield temporary
        flush_all(temporary)
        temporary.replace(path)
        with suppress(OSError):  # not every file system flushes a folder
            flush(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with suppress(OSError):
                temporary.unlink()


def flush_all(path: Path) -> None:
    """Wait until the disk has a file, or every file of a folder."""
    for each in [path, *path.rglob("*")]:
        if each.is_file():
            flush(each)


def flush(path: Path) -> None:
    """Wait until the disk has it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
