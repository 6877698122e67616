"""Tar shards as WebDataset writes them, read in any order: every file is a stretch of the tar."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path

from ldm_pipeline.data.sources import BadDataset, BadPicture, Listing, inside

BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class TarBytes:
    """`size` bytes of a tar from `offset` on: one of the files in it, called `member`."""

    path: Path
    member: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        """The tar and the file in it."""
        return f"{self.path}/{self.member}"

    def read(self) -> bytes:
        """The file's bytes; `BadPicture` where the tar is gone or has become shorter."""
        try:
            with self.path.open("rb") as shard:
                shard.seek(self.offset)
                data = shard.read(self.size)
        except OSError as error:
            raise BadPicture(f"{self.name}: {error.strerror or error}") from error
        if len(data) != self.size:
            raise BadPicture(f"{self.name}: the shard ends {self.size - len(data)} bytes too early")
        return data


def list_shard(path: Path) -> Listing:
    """Every file in the tar at `path`, by name; of two with one name the later counts, as when
    unpacking, and what begins with a dot is left out.

    Raises `BadDataset` for a tar that is compressed (it cannot be read in any order), damaged or
    cut off, and for members that leave it: links, devices, absolute paths and `..`.
    """
    found: Listing = {}
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                if member.isdir():
                    continue
                name = inside(member.name, str(path))
                if not member.isreg() or member.issparse():
                    raise BadDataset(f"{path}: {name!r} is a link or no ordinary file; put it in")
                if not any(part.startswith(".") for part in name.split("/")):
                    found[name] = TarBytes(path, name, member.offset_data, member.size)
            _check_end(path, shard.offset)
    except (tarfile.TarError, EOFError) as error:
        raise BadDataset(
            f"{path}: not a whole, uncompressed tar ({error}); unpack a .tar.gz first"
        ) from error
    except OSError as error:
        raise BadDataset(f"{path}: {error.strerror or error}") from error
    return dict(sorted(found.items()))


def _check_end(path: Path, offset: int) -> None:
    """Refuse a tar whose list of files stops at damage: tarfile takes that for its end."""
    with path.open("rb") as shard:
        shard.seek(offset)
        if shard.read(BLOCK).strip(b"\0"):
            raise BadDataset(f"{path}: damaged at byte {offset}; the files behind it are lost")
