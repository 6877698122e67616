"""Tables of pictures through the package `datasets`: parquet files here, data sets of the hub.

A row carries the encoded picture itself, in the column of type Image (or called "image"); where
there is a column "mask", every row has a mask. Rows are read by number; or, where a table is too
large to download, streamed once into tar shards, which can be read in any order.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
import tarfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from ldm_pipeline.data.sources import BadDataset, BadPicture
from ldm_pipeline.data.writing import writing
from ldm_pipeline.errors import UserError

log = logging.getLogger(__name__)

MASK = "mask"
ROWS_PER_SHARD = 1000


@dataclass(frozen=True)
class Table:
    """One split of a parquet file, a folder of them, or a hub id, "owner/name[@revision]"."""

    place: str
    split: str = "train"


@dataclass(frozen=True)
class RowBytes:
    """The encoded picture in one column of one row."""

    table: Table
    row: int
    column: str

    @property
    def name(self) -> str:
        """The table, the row and the column."""
        return f"{self.table.place} ({self.table.split}) row {self.row} {self.column}"

    def read(self) -> bytes:
        """The bytes; `BadPicture` where the row does not carry them."""
        return _bytes_of(open_table(self.table)[self.row][self.column], self.name)


@lru_cache(maxsize=8)
def open_table(table: Table) -> Any:
    """The `datasets.Dataset`, pictures left encoded; `UserError` where it cannot be had."""
    return _undecoded(_load(table, streaming=False))


def captions(table: Table, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The columns among `keys` that the table has, row by row, without reading any picture."""
    opened = open_table(table)
    known = [key for key in keys if key in opened.column_names]
    yield from opened.select_columns(known) if known else ({} for _ in range(len(opened)))


def picture_columns(opened: Any, place: str) -> tuple[str, str | None]:
    """The column that holds the pictures, and that of the masks or None; `BadDataset` for none."""
    image_type = _library().Image
    columns = list(opened.column_names)
    mask = MASK if MASK in columns else None
    typed = [name for name in columns if isinstance(opened.features[name], image_type)]
    typed = [name for name in typed if name != mask]
    if len(typed) != 1:
        typed = [name for name in columns if name == "image"]
    if not typed:
        raise BadDataset(
            f"{place}: no column holds pictures (one of type Image, or called 'image'); it has"
            f" {', '.join(columns)}"
        )
    return typed[0], mask


def copy_rows(table: Table, folder: Path, limit: int | None) -> Path:
    """`folder`, with the first `limit` rows of a table in tar shards; nothing else is downloaded.

    Shards that are there already are taken as they are. They appear all together at the end, so
    that an interrupted copy is not taken for a whole one; of several copies made at once the first
    to be whole is taken. Rows without a picture are left out. Raises `UserError` for a table that
    cannot be read, and `NotWritten` for a full disk.
    """
    if any(folder.glob("rows-*.tar")):
        return folder
    stream = _load(table, streaming=True)
    if stream.features is None:
        stream = stream._resolve_features()
    stream = _undecoded(stream)
    picture, mask = picture_columns(stream, table.place)
    _sweep(folder)
    log.info("copying the rows of %s (%s) to %s", table.place, table.split, folder)
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.unfinished")
    with writing(folder, unfinished):
        unfinished.mkdir(parents=True)
        with _in_one_line(table):
            numbered = enumerate(stream if limit is None else stream.take(limit))
            for k in count():
                if (first := next(numbered, None)) is None:
                    break
                with tarfile.open(unfinished / f"rows-{k:05d}.tar", "w") as shard:
                    for number, row in chain([first], islice(numbered, ROWS_PER_SHARD - 1)):
                        _add_row(shard, f"{number:09d}", row, picture, mask)
        try:
            unfinished.replace(folder)
        except OSError:
            if not any(folder.glob("rows-*.tar")):
                raise
            shutil.rmtree(unfinished)
    return folder


def _sweep(folder: Path) -> None:
    """Remove copies begun for `folder` that nobody has written to for an hour: of killed runs."""
    for begun in folder.parent.glob(f".{folder.name}.*unfinished"):
        with suppress(FileNotFoundError):
            last = max(path.stat().st_mtime for path in (begun, *begun.iterdir()))
            if time.time() - last > 3600:
                shutil.rmtree(begun, ignore_errors=True)


def _add_row(shard: Any, stem: str, row: dict[str, Any], picture: str, mask: str | None) -> None:
    """Put a row's picture, mask and texts into a shard; the suffix says nothing of the format.

    Of a text that is empty in this row the column stays: that it is there is known of the table.
    """
    texts = {
        k: v for k, v in row.items() if k not in (picture, mask) and (v is None or _is_text(v))
    }
    files = {".json": json.dumps(texts).encode()}
    for column, suffix in ((picture, ".jpg"), (mask, ".mask.png")):
        if column is not None and row[column] is not None:
            files[suffix] = _bytes_of(row[column], f"row {stem} {column}")
    for suffix, data in files.items():
        member = tarfile.TarInfo(stem + suffix)
        member.size = len(data)
        shard.addfile(member, io.BytesIO(data))


def _is_text(value: object) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(text, str) for text in value)
    )


def _bytes_of(value: Any, name: str) -> bytes:
    """The encoded picture in a cell. A cell may point at a file instead; such a path could be any
    file of this machine, so it is not followed."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(data, bytes):
        return data
    raise BadPicture(
        f"{name}: the row holds no picture's bytes; if the data set is a folder of pictures,"
        " download it and read the folder"
    )


def _undecoded(opened: Any) -> Any:
    """The table with its pictures as bytes, which we decode by our own rules."""
    image = _library().Image
    for name in [name for name, kind in opened.features.items() if isinstance(kind, image)]:
        opened = opened.cast_column(name, image(decode=False))
    return opened


def _load(table: Table, streaming: bool) -> Any:
    """What `datasets` opens; `UserError` in one line where it cannot."""
    load_dataset = _library().load_dataset
    name, _, revision = table.place.partition("@")
    with _in_one_line(table):
        if Path(table.place).is_file():
            files = {table.split: table.place}
            return load_dataset("parquet", data_files=files, split=table.split, streaming=streaming)
        if Path(table.place).is_dir():
            return load_dataset(table.place, split=table.split, streaming=streaming)
        return load_dataset(name, split=table.split, revision=revision or None, streaming=streaming)


@contextmanager
def _in_one_line(table: Table) -> Iterator[None]:
    """Within the block, what `datasets` complains of is a `UserError` that names the table."""
    errors = (OSError, ValueError, _library().exceptions.DatasetsError)
    try:
        yield
    except UserError:
        raise
    except errors as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot read {table.place} ({table.split}): {reason}") from error


def _library() -> Any:
    try:
        return import_module("datasets")
    except ImportError as error:
        raise UserError(
            "tables are read by the package datasets, which is not installed here:"
            " pip install 'ldm-pipeline[datasets]'"
        ) from error
