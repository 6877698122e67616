"""Readers: whatever a dataset lies in, the same pictures and captions come out, and never a file
from outside.

`FILES` is one small dataset as names and bytes; it is written as a folder, as a tar, or as parts.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm_pipeline.data import rows
from ldm_pipeline.data.captioned import ALPHA, Item, load, read_dataset
from ldm_pipeline.data.sources import BadDataset, BadPicture
from ldm_pipeline.errors import UserError


def png(seed: int, mode: str = "RGB", size: tuple[int, int] = (7, 5)) -> bytes:
    """A noise picture; another seed is another picture."""
    width, height = size
    shape = (height, width, len(mode)) if len(mode) > 1 else (height, width)
    array = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(array, mode).save(file, "PNG")
    return file.getvalue()


PLAIN = {
    "b.png": png(0),
    "b.txt": b"one thing\n\n another thing \n",
    "b.mask.png": png(1, "L"),
    "a.webp": png(2),
    "a.json": json.dumps({"caption": "from json", "width": 7}).encode(),
    "more/c v1.2.jpg": png(3, "RGBA"),
    "more/c v1.2.txt": "\ufeffein Häuschen".encode(),
    "more/d.bmp": png(4),
    "e.png": png(5),
    "e.txt": b" \n",
    "README.md": b"not part of it",
}

LISTED = {
    "metadata.jsonl": "\n".join(
        json.dumps(record)
        for record in (
            {"file_name": "x/b.png", "text": "first", "scene": {"any": 1}},
            {"file_name": "./a.png", "captions": ["one", " two "], "mask_file_name": "m.png"},
            {"file_name": "c.png", "caption": None},
            {"file_name": "gone.png", "text": ""},
        )
    ).encode(),
    "x/b.png": png(0),
    "a.png": png(1),
    "c.png": png(2),
    "m.png": png(3, "L"),
    "unlisted.png": png(4),
}


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    """The files in a folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_tar(path: Path, files: dict[str, bytes], mode: Any = "w") -> Path:
    """The files in a tar, in the order that they are given."""
    with tarfile.open(path, mode) as shard:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))
    return path


def content(item: Item) -> tuple[object, ...]:
    """An item with the bytes in place of their sources; a missing file's bytes are None."""

    def bytes_of(source: Any) -> object:
        try:
            return source.read() if hasattr(source, "read") else source
        except BadPicture:
            return None

    return (item.key, bytes_of(item.picture), item.captions, bytes_of(item.mask))


def contents(items: list[Item]) -> list[tuple[object, ...]]:
    """Each item's `content`, read from the last to the first: order of reading is free."""
    return [content(item) for item in reversed(items)][::-1]


def test_a_plain_folder_finds_what_lies_beside_each_picture(tmp_path: Path) -> None:
    assert contents(read_dataset(write_folder(tmp_path, PLAIN))) == [
        ("a.webp", PLAIN["a.webp"], ("from json",), None),
        ("b.png", PLAIN["b.png"], ("one thing", "another thing"), PLAIN["b.mask.png"]),
        ("e.png", PLAIN["e.png"], ("",), None),
        ("more/c v1.2.jpg", PLAIN["more/c v1.2.jpg"], ("ein Häuschen",), None),
        ("more/d.bmp", PLAIN["more/d.bmp"], (), None),
    ]


def test_metadata_decides_order_captions_and_masks(tmp_path: Path) -> None:
    items = read_dataset(write_folder(tmp_path, LISTED))
    assert contents(items) == [
        ("x/b.png", LISTED["x/b.png"], ("first",), None),
        ("a.png", LISTED["a.png"], ("one", "two"), LISTED["m.png"]),
        ("c.png", LISTED["c.png"], (), None),
        ("gone.png", None, ("",), None),
    ]
    with pytest.raises(BadPicture, match=r"gone\.png.*metadata\.jsonl line 4 names it"):
        load(items[3])


@pytest.mark.parametrize("files", [PLAIN, LISTED], ids=["plain", "listed"])
def test_every_item_of_a_tar_is_that_of_the_folder(files: dict[str, bytes], tmp_path: Path) -> None:
    folder = contents(read_dataset(write_folder(tmp_path / "folder", files)))
    rng = np.random.default_rng(0)
    for _ in range(3):  # whatever the order of the members
        shuffled = {name: files[name] for name in rng.permutation(list(files))}
        assert contents(read_dataset(write_tar(tmp_path / "all.tar", shuffled))) == folder


def test_of_two_members_with_one_name_the_later_counts_as_when_unpacking(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", PLAIN)
    write_tar(path, {"b.png": png(9)}, mode="a")
    bytes_of = {item.key: item.picture.read() for item in read_dataset(path)}
    assert bytes_of == {**{key: PLAIN[key] for key in bytes_of}, "b.png": png(9)}


def test_several_shards_keep_their_files_apart(tmp_path: Path) -> None:
    """The same names in two shards: pictures go with the captions of their own shard."""
    for number in range(2):
        files = {"0.png": png(number), "0.txt": f"in shard {number}".encode()}
        write_tar(tmp_path / f"s{number}.tar", files)
    assert contents(read_dataset(tmp_path)) == [
        ("s0.tar/0.png", png(0), ("in shard 0",), None),
        ("s1.tar/0.png", png(1), ("in shard 1",), None),
    ]


def test_items_are_values_that_travel(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", PLAIN)
    for place in (tmp_path / "a.tar", write_folder(tmp_path / "folder", LISTED)):
        items = read_dataset(place)
        assert items == read_dataset(str(place))
        assert len(set(items)) == len(items)
        assert pickle.loads(pickle.dumps(items)) == items


def test_what_is_asked_for_is_put_on_every_item(tmp_path: Path) -> None:
    place = write_folder(tmp_path, PLAIN)
    plain = read_dataset(place)
    other = read_dataset(place, regularisation=True, weight=0.5, default_caption="a thing",
                         alpha_masks=True, limit=4)  # fmt: skip
    assert not {item.key for item in plain} & {item.key for item in other}
    assert [item.weight for item in other] == [0.5] * 4
    assert all(item.regularisation for item in other)
    assert [item.captions for item in other[:3]] == [item.captions for item in plain[:3]]
    assert [item.mask == ALPHA for item in other] == [True, False, True, True]
    assert read_dataset(place, default_caption="a thing")[4].captions == ("a thing",)


def test_loading_brings_the_mask_that_the_item_names(tmp_path: Path) -> None:
    items = {item.key: item for item in read_dataset(write_folder(tmp_path, PLAIN))}
    grey = np.asarray(Image.open(io.BytesIO(PLAIN["b.mask.png"])))
    loaded = load(items["b.png"])
    assert loaded.mask is not None
    assert np.array_equal(loaded.mask, grey)
    clear = items["more/c v1.2.jpg"]
    assert load(clear).mask is None
    alpha = load(replace(clear, mask=ALPHA)).mask
    stored = np.asarray(Image.open(io.BytesIO(PLAIN["more/c v1.2.jpg"])))
    assert alpha is not None
    assert np.array_equal(alpha, stored[..., 3])
    assert load(replace(items["e.png"], mask=ALPHA)).mask is None
    (tmp_path / "b.mask.png").write_bytes(png(1, "L", (5, 7)))
    with pytest.raises(BadPicture, match=r"b\.mask\.png: the mask is 5x7, its picture 7x5"):
        load(items["b.png"])


def test_captions_are_taken_from_the_key_that_is_named(tmp_path: Path) -> None:
    record = {"file_name": "a.png", "text": "t", "caption": "c", "long": ["x", "y"]}
    write_folder(tmp_path, {"a.png": png(0), "metadata.jsonl": json.dumps(record).encode()})
    found = {key: read_dataset(tmp_path, caption_key=key)[0].captions for key in (None, "long")}
    assert found == {None: ("t",), "long": ("x", "y")}
    with pytest.raises(BadDataset, match=r"no 'log'; did you mean 'long'"):
        read_dataset(tmp_path, caption_key="log")


@pytest.mark.parametrize(("key", "wanted"), [("long", ("x", "y")), ("caps", ("t",))])
def test_of_a_regularisation_set_the_named_key_comes_first_and_the_usual_ones_after(
    tmp_path: Path, key: str, wanted: tuple[str, ...]
) -> None:
    record = {"file_name": "a.png", "text": "t", "long": ["x", "y"]}
    write_folder(tmp_path, {"a.png": png(0), "metadata.jsonl": json.dumps(record).encode()})
    (item,) = read_dataset(tmp_path, caption_key=key, regularisation=True)
    assert item.captions == wanted


OUTSIDE = ["../secret.png", "/etc/secret.png", "a/../../secret.png", "..", "C:\\a.png",
           "..\\secret.png", "C:a.png", " ", "//server/share/a.png"]  # fmt: skip


def test_pictures_have_no_splits(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no split 'test'"):
        read_dataset(write_folder(tmp_path, PLAIN), split="test")


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("key", ["file_name", "mask_file_name"])
def test_metadata_cannot_name_a_file_outside(name: str, key: str, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(0))
    record = {"file_name": "a.png", key: name}
    files = {"a.png": png(0), "metadata.jsonl": json.dumps(record).encode()}
    for place in (
        write_folder(tmp_path / "folder", files),
        write_tar(tmp_path / "a.tar", files),
    ):
        with pytest.raises(BadDataset, match=r"metadata\.jsonl line 1: .*inside the dataset"):
            read_dataset(place)


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "x/../../a.png"])
def test_members_of_a_tar_cannot_leave_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadDataset, match="inside the dataset"):
        read_dataset(write_tar(tmp_path / "a.tar", {"b.png": png(0), name: png(1)}))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(kind: bytes, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"b.png": png(0)})
    with tarfile.open(path, "a") as shard:
        member = tarfile.TarInfo("c.png")
        member.type, member.linkname = kind, "b.png"
        shard.addfile(member)
    with pytest.raises(BadDataset, match=r"'c\.png' is a link"):
        read_dataset(path)


@pytest.mark.parametrize("target", ["secret.png", "elsewhere"])
def test_links_out_of_a_folder_are_refused_and_links_inside_are_read(
    target: str, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "secret.png").write_bytes(png(0))
    folder = write_folder(tmp_path / "folder", {"deep/a.png": png(1)})
    (folder / "b.png").symlink_to(Path("deep") / "a.png")
    (folder / "loop").symlink_to(folder)
    assert [item.key for item in read_dataset(folder)] == ["b.png", "deep/a.png"]
    (folder / "deep/c.png").symlink_to(tmp_path / target)
    with pytest.raises(BadDataset, match=r"c\.png is a link that leads out"):
        read_dataset(folder)


def test_hidden_files_are_no_pictures(tmp_path: Path) -> None:
    files = {"a.png": png(0), "._a.png": b"of a Mac", ".git/b.png": png(1)}
    for place in (write_folder(tmp_path / "f", files), write_tar(tmp_path / "a.tar", files)):
        assert [item.key for item in read_dataset(place)] == ["a.png"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", r"metadata\.jsonl line 2: not JSON"),
        (b"[1]", r"line 2: must be an object"),
        (b"[" * 100_000, r"line 2: not JSON"),
        (b'{"text": "x"}', r"line 2: there is no 'file_name'"),
        (b'{"filename": "b.png"}', r"did you mean 'filename'"),
        (b'{"file_name": 3}', r"line 2: 'file_name' must be a text, not 3"),
        (b'{"file_name": "b.png", "text": 3}', r"line 2: captions must be a text or a list"),
        (b'{"file_name": "b.png", "text": ["x", 3]}', r"line 2: captions must be"),
        (b'{"file_name": "./a.png"}', r"line 2: 'a\.png' was in line 1"),
        (b"\xff", r"metadata\.jsonl: not UTF-8 at byte"),
    ],
)
def test_damaged_metadata_is_named_by_its_line(line: bytes, message: str, tmp_path: Path) -> None:
    first = b'{"file_name": "a.png", "text": "x"}'
    write_folder(tmp_path, {"a.png": png(0), "metadata.jsonl": first + b"\r\n" + line + b"\n"})
    with pytest.raises(BadDataset, match=message) as caught:
        read_dataset(tmp_path)
    assert "\n" not in str(caught.value)


def test_captions_that_are_no_text_name_their_file(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a.png": png(0), "a.txt": b"\xff\xfe"})
    with pytest.raises(BadDataset, match=r"a\.txt: not UTF-8"):
        read_dataset(tmp_path)


def test_a_damaged_tar_is_refused_and_never_read_in_part(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "a.tar", PLAIN).read_bytes()
    path = tmp_path / "b.tar"
    with tarfile.open(tmp_path / "a.tar") as shard:
        starts = [member.offset for member in shard]
    for start in starts:  # a header is overwritten, or the file ends within the member
        path.write_bytes(whole[: start + 100] + b"\xff" * 100 + whole[start + 200 :])
        with pytest.raises(BadDataset, match=r"b\.tar"):
            read_dataset(path)
        path.write_bytes(whole[: start + 300])
        with pytest.raises(BadDataset, match=r"b\.tar"):
            read_dataset(path)
    for mode in ("w:gz", "w:xz"):
        with pytest.raises(BadDataset, match="uncompressed"):
            read_dataset(write_tar(path, PLAIN, mode))


def test_a_shard_that_became_shorter_is_noticed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", PLAIN)
    items = read_dataset(path)
    os.truncate(path, 600)
    with pytest.raises(BadPicture, match=r"a\.tar/.* too early"):
        [item.picture.read() for item in items]
    path.unlink()
    with pytest.raises(BadPicture, match="No such file"):
        items[0].picture.read()


def test_what_is_no_dataset_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.zip").write_bytes(b"")
    write_folder(tmp_path / "both", {"a.png": png(0)})
    write_tar(tmp_path / "both/s.tar", PLAIN)
    reasons = {
        "empty": "holds no pictures",
        "both": "holds pictures and tar shards",
        "a.zip": "is no dataset",
        "nowhere": "there is no dataset nowhere",
        "empty/nowhere": "there is no dataset",
        "./no/where": "there is no dataset",
    }
    for place, reason in reasons.items():
        with pytest.raises(UserError, match=reason):
            read_dataset(place)


def test_tables_without_their_package_name_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    for place in (tmp_path, tmp_path / "a.parquet", "some/dataset", "some/dataset@main"):
        with pytest.raises(UserError, match=r"ldm-pipeline\[datasets\]"):
            read_dataset(place)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A parquet file of three rows, written by `datasets`, and a cache of its own."""
    return write_table(tmp_path, monkeypatch)


def write_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty: bool = False) -> Path:
    """That file; in one with an `empty` caption, the second row has none."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    picture = datasets.Image()
    features = datasets.Features(
        {"photo": picture, "mask": picture, "text": datasets.Value("string"),
         "captions": datasets.List(datasets.Value("string"))}
    )  # fmt: skip
    columns = {
        "photo": [{"bytes": png(i), "path": None} for i in range(3)],
        "mask": [{"bytes": png(i + 10, "L"), "path": None} for i in range(3)],
        "text": ["row 0", None, "row 2"] if empty else [f"row {i}" for i in range(3)],
        "captions": [[f"a {i}", f"b {i}"] for i in range(3)],
    }
    path = tmp_path / "table" / "train.parquet"
    path.parent.mkdir()
    datasets.Dataset.from_dict(columns, features).to_parquet(path)
    rows.open_table.cache_clear()
    return path


def test_rows_of_a_table_are_items_too(table: Path) -> None:
    for place in (table, table.parent):
        items = read_dataset(place)
        assert contents(items) == [
            (f"train/{i}", png(i), (f"row {i}",), png(i + 10, "L")) for i in range(3)
        ]
        assert pickle.loads(pickle.dumps(items)) == items
        assert load(items[2]).size == (7, 5)
        other = read_dataset(place, caption_key="captions", limit=1)
        assert [item.captions for item in other] == [("a 0", "b 0")]
        other = read_dataset(place, caption_key="caps", regularisation=True)
        assert [item.captions for item in other] == [item.captions for item in items]
    with pytest.raises(UserError, match="test"):
        read_dataset(table.parent, split="test")
    assert [item.key for item in read_dataset(table, split="test")] == [
        f"test/{i}" for i in range(3)
    ], "a file is whichever split is asked for"


def test_a_streamed_table_holds_the_same_items(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "ROWS_PER_SHARD", 2)
    whole = read_dataset(table)
    streamed = read_dataset(table, stream_to=tmp_path / "all")
    assert [content(item)[1:] for item in streamed] == [content(item)[1:] for item in whole]
    assert len(list((tmp_path / "all").iterdir())) == 2
    two = read_dataset(table, stream_to=tmp_path / "two", limit=2)
    assert [content(item)[1:] for item in two] == [content(item)[1:] for item in whole[:2]]
    table.unlink()
    assert read_dataset(tmp_path / "two") == two, "what was streamed is an ordinary dataset"


def test_an_empty_caption_is_streamed_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets the default, as in the table itself, and ends no run."""
    table = write_table(tmp_path, monkeypatch, empty=True)
    for copy in (None, tmp_path / "copy"):
        items = read_dataset(table, caption_key="text", default_caption="a thing", stream_to=copy)
        assert [item.captions for item in items] == [("row 0",), ("a thing",), ("row 2",)]


def test_a_copy_that_was_interrupted_is_none(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither while rows are read nor while the shards appear, which they do at once."""
    monkeypatch.setattr(rows, "ROWS_PER_SHARD", 1)
    add, replace = rows._add_row, Path.replace
    named: list[Path] = []

    def until_the_last(shard: Any, stem: str, *told: Any) -> None:
        if stem.endswith("2"):
            raise KeyboardInterrupt
        add(shard, stem, *told)

    def noted(path: Path, to: Path) -> Path:
        named.append(to)
        return replace(path, to)

    with monkeypatch.context() as broken:
        broken.setattr(rows, "_add_row", until_the_last)
        with pytest.raises(KeyboardInterrupt):
            rows.copy_rows(rows.Table(str(table)), tmp_path / "copy", None)
    assert not list(tmp_path.glob("*copy*"))

    with monkeypatch.context() as counted:
        counted.setattr(Path, "replace", noted)
        rows.copy_rows(rows.Table(str(table)), tmp_path / "copy", None)
    assert named == [tmp_path / "copy"]
    assert len(list((tmp_path / "copy").iterdir())) == 3


def test_rows_that_point_at_files_are_not_followed(table: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "secret.png").write_bytes(png(0))
    struct = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    columns = {"image": [{"bytes": None, "path": str(tmp_path / "secret.png")}]}
    path = tmp_path / "b.parquet"
    datasets.Dataset.from_dict(columns, datasets.Features({"image": struct})).to_parquet(path)
    (item,) = read_dataset(path)
    with pytest.raises(BadPicture, match="row 0 image: the row holds no picture's bytes"):
        load(item)
