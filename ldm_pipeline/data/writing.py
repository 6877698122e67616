"""Writing to a disk that may be full or gone: one line says so, and nothing half-written stays."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


class NotWritten(OSError):
    """Something could not be written; the message is one line with its path and the reason."""


@contextmanager
def writing(path: Path, unfinished: Path) -> Iterator[None]:
    """Within the block the file or folder `unfinished` is written, and made `path` at the end.

    Where that fails, or is interrupted, nothing stays of `unfinished`. Raises `NotWritten`.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        else:
            unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError | SafetensorError) and not isinstance(error, NotWritten):
            raise NotWritten(
                f"{path} cannot be written ({in_one_line(error)}); the same command goes on from "
                "what is kept"
            ) from error
        raise


def write_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a folder, and put its files into `folder`; what else is there stays.

    Where that fails, `folder` is as it was. Raises `NotWritten`.
    """
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    with writing(folder, unfinished):
        shutil.rmtree(unfinished, ignore_errors=True)  # of a killed run
        write(unfinished)
        for path in sorted(unfinished.rglob("*")):
            place = folder / path.relative_to(unfinished)
            if path.is_file():
                place.parent.mkdir(parents=True, exist_ok=True)
                path.replace(place)
        shutil.rmtree(unfinished)


def in_one_line(error: Exception) -> str:
    """What an error says, with the path that the operating system names."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
