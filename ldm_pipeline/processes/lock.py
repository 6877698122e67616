"""One run at a time in a folder, by the operating system's lock on a file in it.

The kernel lets go of the lock when the process ends, even by kill -9, so nothing is ever left that
would block the next run. It is a POSIX record lock: unlike flock's, the workers that a run forks,
which may outlive it for seconds, do not inherit it. Several processes of one run hold it together,
through their first one. Whether a folder can be written at all is asked before.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_pipeline.errors import UserError

if TYPE_CHECKING:
    from ldm_pipeline.processes.ranks import Ranks

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # a module or nothing; _lock asks which

log = logging.getLogger(__name__)

NAME = ".lock"


def check_folder(folder: Path, name: str) -> Path:
    """The part of the path `folder` that is there; `UserError` where it is a file."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise UserError(f"{name}={folder}: {place} is a file; choose another folder")
    return place


def check_writable(folder: Path, name: str) -> None:
    """Raise UserError where a run could not write its folder; nothing is written to find out."""
    place = check_folder(folder, name)
    if not os.access(place, os.W_OK):
        raise UserError(f"{name}={folder}: {place} cannot be written to; choose another folder")


@contextmanager
def alone_in(folder: Path, name: str, ranks: Ranks) -> Iterator[None]:
    """Within the block no other run writes into `folder`, which is made where it is missing.

    `name` is what people call the folder. Raises `UserError`, in every process, where another run
    is at it or it cannot be made. A folder that stays empty does not stay.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    handle, refusal = None, ""
    if ranks.index == 0:
        try:
            handle = _lock(folder / NAME)
        except OSError as error:
            why = error.strerror or error
            refusal = f"{name}={folder} cannot be written to ({why}); choose another folder"
        else:
            if handle is None:
                refusal = (
                    f"another run writes into {name}={folder}; wait until it has ended, or choose "
                    "another folder"
                )
    for told in ranks.told(refusal):
        raise UserError(told)
    try:
        yield
    finally:
        if handle is not None:
            with suppress(OSError):
                (folder / NAME).unlink()
                for place in missing:
                    place.rmdir()
            os.close(handle)


def _lock(path: Path) -> int | None:
    """An open file that this process has locked; None where another process has."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is None:
                raise OSError("this system has no such locks")
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(handle)
            return None
        except OSError as error:  # some network file systems
            log.warning("%s cannot be locked (%s): start no second run there", path, error)
            return handle
        if _is(path, handle):
            return handle
        os.close(handle)  # the run before removed the file between our opening and locking it


def _is(path: Path, handle: int) -> bool:
    """Whether an open file is still the one at `path`."""
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(handle))
    return False
