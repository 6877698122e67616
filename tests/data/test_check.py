"""The report on a dataset counts what is there, and every fault that is planted is found."""

from __future__ import annotations

import io
import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm_pipeline.data.buckets import aspect_buckets
from ldm_pipeline.data.check import CLIP_TOKENS, Report, check, least_tokens
from ldm_pipeline.errors import UserError

BUCKETS = aspect_buckets(64, 32)


def picture(seed: int, width: int = 64, height: int = 64, kind: str = "PNG") -> bytes:
    """A noise picture; another seed is another picture."""
    array = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven sound pictures with captions: five squares, two lying, of several sizes."""
    sizes = [(64, 64), (64, 64), (70, 66), (64, 64), (200, 200), (128, 32), (256, 64)]
    for number, (width, height) in enumerate(sizes):
        (tmp_path / f"{number}.png").write_bytes(picture(number, width, height))
        (tmp_path / f"{number}.txt").write_text(f"number {number}\nor so")
    return tmp_path


def test_a_sound_dataset_has_nothing_to_report_but_its_counts(folder: Path) -> None:
    report = check(folder, BUCKETS, batch_size=2)
    assert report.errors == report.warnings == ()
    assert (report.pictures, report.captions, report.masks) == (7, 14, 0)
    assert report.buckets == (((64, 64), 5), ((128, 32), 2))
    assert report.steps_per_epoch == 4
    # Two halves of 4 channels in 16 bits for each of the latents; 9 texts: "or so" and "" are one.
    latents = (5 * 8 * 8 + 2 * 16 * 4) * 4 * 2 * 2
    assert report.cache_bytes == latents + 9 * 77 * 768 * 2
    rows = [line.split() for line in str(report).splitlines()]
    assert ["64x64", "5", "1"] in rows
    assert ["128x32", "2", "0"] in rows
    assert rows[-1] == ["errors:", "0,", "warnings:", "0"]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8])
def test_an_epoch_has_the_fewest_steps_that_show_every_picture(batch_size: int) -> None:
    report = Report(batch_size=batch_size, buckets=(((8, 8), 5), ((8, 16), 1), ((16, 8), 6)))
    shown = report.steps_per_epoch * batch_size
    assert shown - batch_size < 12 <= shown


def cut(folder: Path) -> None:
    (folder / "3.png").write_bytes(picture(3)[:-2000])


def gif(folder: Path) -> None:
    (folder / "3.gif").write_bytes(picture(3, kind="GIF"))
    (folder / "3.png").unlink()


def missing(folder: Path) -> None:
    lines = [{"file_name": f"{i}.png", "text": "x"} for i in range(8)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))


def damaged_metadata(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "x"}\n{')


def outside(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text('{"file_name": "../0.png"}')


def mask_of_another_size(folder: Path) -> None:
    (folder / "3.mask.png").write_bytes(picture(9, 32, 32))


def no_captions(folder: Path) -> None:
    for path in folder.glob("*.txt"):
        path.unlink()


def all_small(folder: Path) -> None:
    for number in range(7):
        (folder / f"{number}.png").write_bytes(picture(number, 20, 20))


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (cut, "3.png: truncated or damaged"),
        (gif, "3.gif: is no JPEG"),
        (missing, "line 8 names it, but there is no such file"),
        (damaged_metadata, "line 2: not JSON"),
        (outside, "line 1: '../0.png' is no path inside"),
        (mask_of_another_size, "3.mask.png: the mask is 32x32, its picture 64x64"),
        (no_captions, "no picture has a caption"),
        (all_small, "every picture is too small"),
    ],
)
def test_every_planted_error_is_the_only_one_and_is_named(
    spoil: Callable[[Path], None], error: str, folder: Path
) -> None:
    spoil(folder)
    report = check(folder, BUCKETS)
    assert len(report.errors) == 1
    assert error in report.errors[0]
    assert f"error: {report.errors[0]}" in str(report).splitlines()


def small(folder: Path) -> None:
    (folder / "3.png").write_bytes(picture(3, 20, 200))


def uncaptioned(folder: Path) -> None:
    (folder / "3.txt").unlink()


def empty(folder: Path) -> None:
    (folder / "3.txt").write_text(" \n")


def long(folder: Path) -> None:
    (folder / "3.txt").write_text("word " * 76)


def copied(folder: Path) -> None:
    """The same pixels in another format, so in other bytes."""
    (folder / "3.png").unlink()
    (folder / "3.bmp").write_bytes(picture(1, kind="BMP"))


def unlisted(folder: Path) -> None:
    lines = [{"file_name": f"{i}.png", "text": "x"} for i in range(7) if i != 3]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for path in folder.glob("*.txt"):
        path.unlink()


def caption_without_picture(folder: Path) -> None:
    (folder / "3.txt").rename(folder / "33.txt")
    (folder / "3.png").unlink()


def black_mask(folder: Path) -> None:
    Image.new("L", (64, 64)).save(folder / "3.mask.png")


@pytest.mark.parametrize(
    ("spoil", "warning"),
    [
        (small, "1 too small for every bucket, so left out: 3.png"),
        (uncaptioned, "1 without a caption: 3.png"),
        (empty, "1 with an empty caption: 3.png"),
        (long, "1 with a caption of certainly more than 77 tokens, whose end is not read: 3.png"),
        (copied, "1 groups of pictures with the same pixels: 1.png = 3.bmp"),
        (unlisted, "1 not used, as nothing belongs to it or names it: 3.png"),
        (caption_without_picture, "1 not used, as nothing belongs to it or names it: 33.txt"),
        (black_mask, "1 with a mask that is black everywhere: 3.png"),
    ],
)
def test_every_planted_oddity_is_the_only_warning_and_names_the_picture(
    spoil: Callable[[Path], None], warning: str, folder: Path
) -> None:
    spoil(folder)
    report = check(folder, BUCKETS)
    assert report.errors == ()
    assert report.warnings == (warning,)


def test_pictures_that_are_left_out_are_in_no_bucket_unless_enlarged(folder: Path) -> None:
    small(folder)
    assert sum(n for _, n in check(folder, BUCKETS).buckets) == 6
    report = check(folder, aspect_buckets(64, 32, upscale=True))
    assert sum(n for _, n in report.buckets) == 7
    assert report.warnings == ()


def test_many_names_are_cut_short_and_no_name_reaches_the_terminal_raw(folder: Path) -> None:
    for path in folder.glob("[1-6].txt"):
        path.unlink()
    (folder / "\x1b[31m.png").write_bytes(b"not a picture")
    report = check(folder, BUCKETS)
    assert any(w.startswith("7 without a caption: ") and w.endswith(", …") for w in report.warnings)
    assert "\x1b" not in str(report)
    assert "?[31m.png: is no" in str(report)


def test_captions_are_read_where_they_are_said_to_be(folder: Path) -> None:
    record = {"file_name": "0.png", "text": "red", "long": ["a red star", "a star"]}
    (folder / "metadata.jsonl").write_text(json.dumps(record), "utf-8")
    assert check(folder, BUCKETS).captions == 1
    assert check(folder, BUCKETS, caption_key="long").captions == 2
    (error,) = check(folder, BUCKETS, caption_key="lang").errors
    assert "there is no 'lang'" in error
    with pytest.raises(UserError, match="has no split 'test'"):
        check(folder, BUCKETS, split="test")


def test_what_is_no_dataset_at_all_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError):
            check(place, BUCKETS)


def test_the_estimate_of_tokens_never_exceeds_the_tokenizers_count(
    components: dict[str, Any], folder: Path
) -> None:
    tokenizer = components["tokenizer"]

    def exact(text: str) -> int:
        return len(tokenizer(text, verbose=False).input_ids)

    rng = np.random.default_rng(0)
    words = ["red", "Blue", "it's", "they'll", "a_b", "x2y", "1984", "...", "(!)", "né", "house"]
    letters = np.array(list(string.printable))
    for _ in range(200):
        text = " ".join(rng.choice(words, rng.integers(0, 30)))
        text += "".join(rng.choice(letters, rng.integers(0, 20)))
        assert least_tokens(text) <= exact(text)
    assert least_tokens("red blue") == exact("red blue") == 4  # words that are one token each
    # A word of unknown letters is many tokens; only the tokenizer can tell.
    (folder / "3.txt").write_text("house " * 30)
    assert check(folder, BUCKETS).warnings == ()
    assert exact("house " * 30) > CLIP_TOKENS
    (warning,) = check(folder, BUCKETS, tokens=exact).warnings
    assert warning == "1 with a caption of more than 77 tokens, whose end is not read: 3.png"
