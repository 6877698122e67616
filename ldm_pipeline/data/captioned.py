"""Folders, tar shards and tables of captioned pictures, read into one kind of value: `Item`.

    image folder    `metadata.jsonl`: lines with "file_name", a caption under "text", "captions" or
                    "caption" (a text or a list of texts), and perhaps "mask_file_name"
    plain folder    beside `a.png`, at any depth: `a.txt` (every line is a caption of its own) or
                    `a.json` (captions under the same names), and perhaps `a.mask.png`
    tar shards      one tar or a folder of them, with files as in either kind of folder
    tables          parquet files, or a data set of the Hugging Face hub (extra: datasets)

Nothing is decoded here. The order is that of metadata.jsonl or of the rows, else by name.

Legend: a *record* is a line of metadata.jsonl, the content of `a.json` or a row of a table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from ldm_pipeline.data import rows
from ldm_pipeline.data.shards import list_shard
from ldm_pipeline.data.sources import (
    BadDataset,
    BadPicture,
    InMemory,
    Listing,
    Missing,
    Source,
    inside,
    list_folder,
)
from ldm_pipeline.errors import UserError, suggestion

if TYPE_CHECKING:
    from ldm_pipeline.data.decoding import Picture

METADATA = "metadata.jsonl"
MASK = ".mask"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
CAPTION_KEYS = ("text", "captions", "caption")
"""Where a record's captions are looked for, in this order."""

# Also what is not read, so that such a picture is named and refused and not passed over.
PICTURE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"),
    *(".gif", ".avif", ".heic", ".heif", ".jxl"),
)

ALPHA: Literal["alpha"] = "alpha"
"""As a mask: the picture's own alpha channel."""


@dataclass(frozen=True)
class Item:
    """One picture of a dataset and what belongs to it; `load` decodes it.

    key             its name, which no other item of the dataset has
    picture         where its bytes come from
    captions        none or several; "" is a caption that says nothing
    mask            where the mask's bytes come from, `ALPHA`, or None
    regularisation  whether it shows what the model should keep (prior preservation)
    weight          what its loss counts
    """

    key: str
    picture: Source
    captions: tuple[str, ...] = ()
    mask: Source | Literal["alpha"] | None = None
    regularisation: bool = False
    weight: float = 1.0


def read_dataset(
    source: str | Path,
    *,
    caption_key: str | None = None,
    default_caption: str | None = None,
    alpha_masks: bool = False,
    regularisation: bool = False,
    weight: float = 1.0,
    split: str | None = None,
    stream_to: Path | None = None,
    limit: int | None = None,
) -> list[Item]:
    """The items of a folder, tar, parquet file or hub id ("owner/name"), whichever `source` is.

    `caption_key` names where the captions of records are, instead of `CAPTION_KEYS`; of a
    regularisation set's, which may come from elsewhere, where they are looked for first.
    `default_caption` goes to pictures that have none. With `alpha_masks`, pictures without a mask
    file take their alpha channel. Regularisation items get keys of their own kind, so that they
    can be put beside others. `limit` keeps the first items only. `split` is a table's, "train"
    unless given.

    With `stream_to`, a table is not downloaded as a whole: its first `limit` rows are copied into
    tar shards in that folder, unless shards are there already, and read from there.

    Raises `UserError` where there is nothing to read or what has no splits is asked for one,
    `BadDataset` where what is there is damaged or leaves the folder. A picture that is missing or
    damaged shows only in `load`.
    """
    keys: tuple[str, ...] = CAPTION_KEYS if caption_key is None else (caption_key,)
    if regularisation and caption_key is not None:
        keys += CAPTION_KEYS
    found = _find(source, split or "train")
    if split is not None and not isinstance(found, rows.Table):
        raise UserError(
            f"{source} has no split {split!r}; only parquet files and hub ids have some"
        )
    if isinstance(found, rows.Table) and stream_to is not None:
        found = _shards(stream_to, list_folder(rows.copy_rows(found, stream_to, limit)))
    if isinstance(found, rows.Table):
        items = _from_table(found, keys)
    else:
        items = [
            replace(item, key=prefix + item.key)
            for prefix, (place, files) in found.items()
            for item in _from_files(place, files, keys)
        ]
    kind = "regularisation:" if regularisation else ""
    return [
        replace(
            item,
            key=kind + item.key,
            captions=item.captions or (() if default_caption is None else (default_caption,)),
            mask=ALPHA if alpha_masks and item.mask is None else item.mask,
            regularisation=regularisation,
            weight=weight,
        )
        for item in items[:limit]
    ]


def is_table(source: str | Path) -> bool:
    """Whether `source` is a table, and not files; `UserError` where it is no dataset."""
    return isinstance(_find(source, "train"), rows.Table)


def in_memory(item: Item) -> Item:
    """The item with the bytes that its files hold now; raises `BadPicture` where one has none."""
    picture = InMemory(item.picture.name, item.picture.read())
    if item.mask is None or item.mask == ALPHA:
        return replace(item, picture=picture)
    return replace(item, picture=picture, mask=InMemory(item.mask.name, item.mask.read()))


def load(item: Item) -> Picture:
    """The decoded picture of an item, with its mask where it has one.

    Raises `BadPicture` for what cannot be read, and for a mask of another size.
    """
    from ldm_pipeline.data.decoding import decode, decode_mask

    picture = decode(item.picture.read(), item.picture.name)
    if item.mask == ALPHA:
        return picture
    if item.mask is None:
        return replace(picture, mask=None)
    mask = decode_mask(item.mask.read(), item.mask.name)
    if mask.shape != picture.pixels.shape[:2]:
        raise BadPicture(
            f"{item.mask.name}: the mask is {mask.shape[1]}x{mask.shape[0]}, its picture"
            f" {picture.size[0]}x{picture.size[1]}; make them one size"
        )
    return replace(picture, mask=mask)


def is_picture(name: str) -> bool:
    """Whether a file's name is that of a picture, also of one in a format that is not read."""
    return PurePosixPath(name).suffix.lower() in PICTURE_SUFFIXES


def captions_of(record: Mapping[str, object], where: str, keys: Sequence[str]) -> tuple[str, ...]:
    """A record's captions, under the first of `keys` that is there; none without any of them.

    Raises `BadDataset` where the only key is missing, or the value is neither a text nor a list of
    texts.
    """
    if len(keys) == 1 and keys[0] not in record:
        raise BadDataset(f"{where}: there is no {keys[0]!r}{suggestion(keys[0], record)}")
    value = next((record[k] for k in keys if record.get(k) is not None), ())
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise BadDataset(f"{where}: captions must be a text or a list of texts, not {value!r:.80}")
    return tuple(text.strip() for text in texts)


Found = dict[str, tuple[str, Listing]]
"""What goes before the keys -> where the files are, and the files."""


def _find(source: str | Path, split: str) -> Found | rows.Table:
    """Which kind of dataset `source` is; `UserError` for what is none."""
    path = Path(source).expanduser()
    if path.is_dir():
        return _find_in_folder(path, split)
    if path.is_file() and path.suffix == ".tar":
        return {"": (str(path), list_shard(path))}
    if path.is_file() and path.suffix == ".parquet":
        return rows.Table(str(path), split)
    if path.exists():
        raise UserError(f"{source} is no dataset; name a folder, a .tar, a .parquet or a hub id")
    if HUB_ID.fullmatch(str(source)) and not path.parent.is_dir():
        return rows.Table(str(source), split)
    raise UserError(f"there is no dataset {source}; name a folder, a .tar, a .parquet or a hub id")


def _find_in_folder(folder: Path, split: str) -> Found | rows.Table:
    files = list_folder(folder)
    kinds = {
        "pictures": METADATA in files or any(map(is_picture, files)),
        "tar shards": any(name.endswith(".tar") for name in files),
        "parquet files": any(name.endswith(".parquet") for name in files),
    }
    there = [kind for kind, found in kinds.items() if found]
    if len(there) != 1:
        holds = " and ".join(there) or "no pictures, tar shards or parquet files"
        raise UserError(f"{folder} holds {holds}; a dataset is a folder with one of these kinds")
    if there == ["parquet files"]:
        return rows.Table(str(folder), split)
    return {"": (str(folder), files)} if there == ["pictures"] else _shards(folder, files)


def _shards(folder: Path, files: Listing) -> Found:
    """The shards among the files of a folder; with several, keys begin with the shard's name."""
    tars = [name for name in files if name.endswith(".tar")]
    paths = {f"{name}/" if len(tars) > 1 else "": folder / name for name in tars}
    return {prefix: (str(path), list_shard(path)) for prefix, path in paths.items()}


def _from_table(table: rows.Table, keys: Sequence[str]) -> list[Item]:
    """An item for every row; its key is the split and the row's number."""
    picture, mask = rows.picture_columns(rows.open_table(table), table.place)
    return [
        Item(
            f"{table.split}/{row}",
            rows.RowBytes(table, row, picture),
            captions_of(record, f"{table.place} row {row}", keys),
            rows.RowBytes(table, row, mask) if mask is not None else None,
        )
        for row, record in enumerate(rows.captions(table, keys))
    ]


def _from_files(place: str, files: Listing, keys: Sequence[str]) -> list[Item]:
    """The items among the files of a folder or a shard, which `place` names."""
    if METADATA in files:
        return list(_from_metadata(place, files, keys))
    pictures = [name for name in files if is_picture(name)]
    masks = {_stem(name).removesuffix(MASK): name for name in pictures if _is_mask(name)}
    return [
        Item(
            name,
            files[name],
            _captions_beside(_stem(name), place, files, keys),
            files[masks[_stem(name)]] if _stem(name) in masks else None,
        )
        for name in pictures
        if not _is_mask(name)
    ]


def _from_metadata(place: str, files: Listing, keys: Sequence[str]) -> Iterator[Item]:
    """An item for every line of metadata.jsonl; `BadDataset` names the line that is wrong."""
    first: dict[str, int] = {}
    for number, line in enumerate(_text(files[METADATA]).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{place}/{METADATA} line {number}"
        record = _record(line, where)
        name = _file(record, "file_name", where)
        if name is None:
            raise BadDataset(f"{where}: there is no 'file_name'{suggestion('file_name', record)}")
        if name in first:
            raise BadDataset(
                f"{where}: {name!r} was in line {first[name]}; give one line all of its captions"
            )
        first[name] = number
        mask = _file(record, "mask_file_name", where)
        picture, covered = (
            None if n is None else files.get(n, Missing(f"{place}/{n}", where))
            for n in (name, mask)
        )
        assert picture is not None
        yield Item(name, picture, captions_of(record, where, keys), covered)


def _captions_beside(stem: str, place: str, files: Listing, keys: Sequence[str]) -> tuple[str, ...]:
    """The captions in `stem.txt`, a line each, or else in `stem.json`."""
    if (source := files.get(f"{stem}.txt")) is not None:
        lines = [line.strip() for line in _text(source).splitlines()]
        return tuple(line for line in lines if line) or ("",)
    if (source := files.get(f"{stem}.json")) is not None:
        where = f"{place}/{stem}.json"
        return captions_of(_record(_text(source), where), where, keys)
    return ()


def _record(text: str, where: str) -> dict[str, object]:
    """A JSON object; `BadDataset` for anything else."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadDataset(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise BadDataset(f"{where}: must be an object in braces, not {text.strip()!r:.80}")
    return record


def _file(record: Mapping[str, object], key: str, where: str) -> str | None:
    """The name of a file under `key`, or None where there is none."""
    name = record.get(key)
    if name is None:
        return None
    if not isinstance(name, str):
        raise BadDataset(f"{where}: {key!r} must be a text, not {name!r:.80}")
    return inside(name, where)


def _text(source: Source) -> str:
    """A source as text; `BadDataset` where it cannot be read or is not UTF-8."""
    try:
        return source.read().decode("utf-8-sig")
    except BadPicture as error:
        raise BadDataset(str(error)) from error
    except UnicodeDecodeError as error:
        raise BadDataset(f"{source.name}: not UTF-8 at byte {error.start}; save it so") from error


def _stem(name: str) -> str:
    """`name` without its last suffix, folders included."""
    return name.removesuffix(PurePosixPath(name).suffix)


def _is_mask(name: str) -> bool:
    """Whether a picture is the mask of another, `a.mask.png` of `a.png`."""
    return _stem(name).endswith(MASK)
