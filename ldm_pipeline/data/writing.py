"""Writing to a disk that may be full or gone: one line says so, and nothing half-written stays."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ldm_pipeline.replacing import flush_all

log = logging.getLogger(__name__)


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
    """Let `write` fill a folder, and put it in the place of `folder` as a whole.

    Where that fails, `folder` is as it was. A kill or a power failure at any moment leaves the old
    one or the new one, perhaps beside its place, from where `settle_folder` brings it back. Raises
    `NotWritten`.
    """
    folder = folder.resolve()  # where it is a link, what it points to
    unfinished, old = (folder.with_name(f".{folder.name}.{end}") for end in ("unfinished", "old"))
    with writing(folder, unfinished):
        settle_folder(folder)
        shutil.rmtree(unfinished, ignore_errors=True)  # of a killed run
        write(unfinished)
        flush_all(unfinished)
        if folder.exists():
            folder.rename(old)
        try:
            unfinished.rename(folder)
        except OSError:
            settle_folder(folder)
            raise
        settle_folder(folder)


def settle_folder(folder: Path) -> None:
    """End what `write_folder` began for `folder`, should it have been killed.

    Files that the new folder lacks, of another layout or somebody's own, are put beside it, into
    `<folder>.before`.
    """
    folder = folder.resolve()
    old, before = folder.with_name(f".{folder.name}.old"), folder.with_name(f"{folder.name}.before")
    if not old.exists():
        return
    if not folder.exists():
        old.rename(folder)
        return
    files = [path.relative_to(old) for path in sorted(old.rglob("*")) if path.is_file()]
    left = [file for file in files if not (folder / file).exists()]
    for file in left:
        (before / file).parent.mkdir(parents=True, exist_ok=True)
        (old / file).replace(before / file)
    if left:
        log.info("%s was written anew; in %s are from before: %s",
                 folder, before, ", ".join(map(str, left)))  # fmt: skip
    shutil.rmtree(old)


def in_one_line(error: Exception) -> str:
    """What an error says, with the path that the operating system names."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
