"""Where the bytes of a picture or a caption come from, and the files of a folder.

A source is a small frozen value: it can be compared, kept as a key, sent to another process and
read again at any time, in any order. Its `name` is what messages call it.

Legend: a *listing* maps the name of every file of a dataset, relative and with `/`, to its source.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Protocol

from ldm_pipeline.errors import UserError


class BadPicture(UserError):
    """One picture or mask cannot be used; the message names it. Training may leave it out."""


class BadDataset(UserError):
    """The dataset itself is damaged or leaves its folder; the message names the place."""


class Source(Protocol):
    """Anything that bytes can be read from, again and again."""

    @property
    def name(self) -> str:
        """What messages call it."""

    def read(self) -> bytes:
        """The bytes; `BadPicture` where they cannot be had."""


Listing = dict[str, Source]


@dataclass(frozen=True)
class FileBytes:
    """A whole file."""

    path: Path

    @property
    def name(self) -> str:
        """The file's path."""
        return str(self.path)

    def read(self) -> bytes:
        """The file's bytes; `BadPicture` where it cannot be read."""
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise BadPicture(f"{self.path}: {error.strerror or error}") from error


@dataclass(frozen=True)
class InMemory:
    """Bytes that were read, under the name of where they were."""

    name: str
    data: bytes

    def read(self) -> bytes:
        """The bytes."""
        return self.data


@dataclass(frozen=True)
class Missing:
    """A file that the dataset names but does not hold; reading it says so."""

    name: str
    place: str

    def read(self) -> bytes:
        """Raises `BadPicture`."""
        raise BadPicture(f"{self.name}: {self.place} names it, but there is no such file")


def inside(name: str, where: str) -> str:
    """`name` without needless dots, if it stays inside the dataset; else `BadDataset`.

    Both kinds of slashes count, so that a dataset is as safe on Windows.
    """
    path = PureWindowsPath(name)
    if not name.strip() or path.anchor or ".." in path.parts:
        raise BadDataset(
            f"{where}: {name!r} is no path inside the dataset; name files relative to its folder,"
            " without '..'"
        )
    return PurePosixPath(name).as_posix()


def list_folder(folder: Path) -> Listing:
    """Every file below `folder`, by name; what begins with a dot is left out.

    Links to files inside the folder are followed, links to folders are not. Raises `BadDataset`
    for a link that leads out of the folder, or a folder that cannot be read.
    """
    root = folder.resolve()
    found: Listing = {}
    for place, folders, files in os.walk(folder, onerror=_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        shown = [name for name in files if not name.startswith(".")]
        for path in (Path(place, name) for name in (*folders, *shown)):
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise BadDataset(f"{path} is a link that leads out of {folder}; copy the file in")
        for path in (Path(place, name) for name in shown):
            found[path.relative_to(folder).as_posix()] = FileBytes(path)
    return dict(sorted(found.items()))


def _unreadable(error: OSError) -> None:
    raise BadDataset(f"cannot read the folder {error.filename}: {error.strerror}") from error
