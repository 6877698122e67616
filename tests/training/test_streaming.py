"""Tables that are too large to download: their first rows are copied, once, and trained on."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_pipeline.data import rows
from ldm_pipeline.errors import UserError
from ldm_pipeline.training.captioned import Captioned, CaptionedSettings
from ldm_pipeline.training.engine import fit
from ldm_pipeline.training.lora import LoraConfig, LoraObjective
from tests.training.tiny_lora import open_model

ROWS = 6


def png(i: int) -> bytes:
    """A picture of 64 x 64 pixels in a file."""
    pixels = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A parquet file of captioned pictures."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    rows.open_table.cache_clear()
    return write_table(tmp_path / "table" / "train.parquet", range(ROWS))


def write_table(path: Path, numbers: range) -> Path:
    """A parquet file with the pictures of these numbers."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    pictures = [{"bytes": png(i), "path": None} for i in numbers]
    columns = {"image": pictures, "text": [f"red, {i}" for i in numbers]}
    path.parent.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(columns, features).to_parquet(path)
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The same pictures and captions in two webdataset tars."""
    place = tmp_path / "shards"
    place.mkdir()
    for shard in range(2):
        with tarfile.open(place / f"{shard:03d}.tar", "w") as tar:
            for i in range(3 * shard, 3 * shard + 3):
                for suffix, data in ((".png", png(i)), (".txt", f"red, {i}".encode())):
                    member = tarfile.TarInfo(f"{i:06d}{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return place


def config_of(source: Path, out: Path, **told: Any) -> LoraConfig:
    """A run of two steps on this source."""
    run = {"out": out, "steps": 2, "batch_size": 2, "workers": 0, "mixed_precision": "no",
           "log_with": "none"}  # fmt: skip
    data = {"source": str(source), "resolution": 64, "cache": out.parent / "cache", **told}
    return LoraConfig.model_validate({"run": run, "data": data, "lora": {"rank": 2}})


def settings(source: Path, cache: Path, **told: Any) -> CaptionedSettings:
    """The same for the data alone."""
    return config_of(source, cache.parent / "run", stream=True, **told).data


def test_a_streamed_table_trains_the_same_adapter(
    table: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the table, from its streamed copy and from tar shards: the same file, to the byte."""
    streamed: list[bool] = []
    load = rows._load

    def noted(table: rows.Table, streaming: bool) -> Any:
        streamed.append(streaming)
        return load(table, streaming)

    monkeypatch.setattr(rows, "_load", noted)
    written = []
    told = [(table, False), (table, True), (shards, False)]
    for i, (source, stream) in enumerate(told):
        config = config_of(source, tmp_path / f"run {i}", stream=stream)
        final = fit(LoraObjective(config, open_model), config)
        written.append((final / "pytorch_lora_weights.safetensors").read_bytes())
    assert len(set(written)) == 1
    assert streamed == [False, True]


def test_what_is_no_table_is_not_streamed(table: Path, shards: Path, tmp_path: Path) -> None:
    """Unless pictures beside it are, which are then read as they lie."""
    for source in (shards, shards / "000.tar"):
        with pytest.raises(UserError, match=r"data\.stream=true is for tables.*shards"):
            Captioned(settings(source, tmp_path / "cache"), 0, 2)
    beside = Captioned(settings(table, tmp_path / "cache", regularisation=str(shards)), 0, 2)
    assert (len(beside.samples), len(beside.kept)) == (ROWS, ROWS)


def test_only_the_rows_asked_for_are_copied_and_only_once(table: Path, tmp_path: Path) -> None:
    first = Captioned(settings(table, tmp_path / "cache", limit=4), 0, 2)
    assert len(first.samples) == 4
    (place,) = (tmp_path / "cache" / "rows").iterdir()
    (shard,) = place.iterdir()
    with tarfile.open(shard) as tar:
        assert len(tar.getnames()) == 2 * 4
    when = shard.stat().st_mtime_ns
    again = Captioned(settings(table, tmp_path / "cache", limit=4), 0, 2)
    assert again.samples == first.samples
    assert shard.stat().st_mtime_ns == when
    assert len(Captioned(settings(table, tmp_path / "cache", limit=5), 0, 2).samples) == 5
    assert len(list((tmp_path / "cache" / "rows").iterdir())) == 2


def test_a_table_that_has_changed_is_copied_anew(table: Path, tmp_path: Path) -> None:
    before = Captioned(settings(table, tmp_path / "cache"), 0, 2)
    write_table(table, range(10, 13))
    after = Captioned(settings(table, tmp_path / "cache"), 0, 2)
    assert (len(before.samples), len(after.samples)) == (ROWS, 3)
    assert not {s.key for s in before.samples} & {s.key for s in after.samples}


def test_two_runs_that_copy_at_once_take_the_copy_that_is_whole_first(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither touches what the other has begun, and nothing of the second copy stays."""
    place = tmp_path / "cache" / "rows" / "same"
    add = rows._add_row
    begun: list[bool] = []

    def meanwhile(shard: tarfile.TarFile, stem: str, *told: Any) -> None:
        add(shard, stem, *told)
        if not begun:
            begun.append(True)
            rows.copy_rows(rows.Table(str(table)), place, 4)

    monkeypatch.setattr(rows, "_add_row", meanwhile)
    assert rows.copy_rows(rows.Table(str(table)), place, ROWS) == place
    assert list(place.parent.iterdir()) == [place]
    with tarfile.open(place / "rows-00000.tar") as tar:
        assert len(tar.getnames()) == 2 * 4, "that of the second run, which was whole first"


def test_what_a_killed_copy_left_is_swept_when_it_is_old(table: Path, tmp_path: Path) -> None:
    place = tmp_path / "rows" / "same"
    left = {name: place.with_name(f".same.{name}.unfinished") for name in ("old", "new")}
    for name, folder in left.items():
        folder.mkdir(parents=True)
        (folder / "rows-00000.tar").write_bytes(b"half")
        for path in (folder / "rows-00000.tar", folder):
            os.utime(path, None if name == "new" else (0, 0))
    rows.copy_rows(rows.Table(str(table)), place, None)
    assert set(place.parent.iterdir()) == {place, left["new"]}


def test_limit_cuts_the_source_alone(table: Path, tmp_path: Path) -> None:
    """Whether the regularisation's table is streamed or not."""
    for stream in (True, False):
        told = config_of(table, tmp_path / "run", limit=2, stream=stream, regularisation=str(table))
        data = Captioned(told.data, 0, 2)
        assert (len(data.samples), len(data.kept)) == (2, ROWS)


def test_a_table_in_the_home_that_has_changed_is_copied_anew(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(table.parent))
    short = Path("~") / table.name

    def copies() -> int:
        Captioned(settings(short, tmp_path / "cache"), 0, 2)
        return len(list((tmp_path / "cache" / "rows").iterdir()))

    assert (copies(), copies()) == (1, 1)
    file = next(path for path in (table, *table.rglob("*")) if path.is_file())
    os.utime(file, (0, 0))
    assert copies() == 2


def test_a_batch_has_the_rows_captions(table: Path, tmp_path: Path) -> None:
    config = config_of(table, tmp_path / "run", stream=True, captions={"dropout": 0.0})
    objective = LoraObjective(config, open_model)
    data = objective.data
    assert sorted(data.caption(s) for s in data.samples) == [f"red, {i}" for i in range(ROWS)]
    assert torch.isfinite(objective(objective.batch(range(2)))["loss"])
