"""Captioned pictures on their way into the cache: what changes, fails or differs on that way."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ldm_pipeline import LatentDiffusionPipeline
from ldm_pipeline.data.cache import ALONE, Cache, Share
from ldm_pipeline.errors import UserError
from ldm_pipeline.models.conditioning import conditioning_of
from ldm_pipeline.training.captioned import (
    Captioned,
    CaptionedSettings,
    cached_latents,
)
from ldm_pipeline.training.encoding import cached_texts, text_key
from tests.shares import together
from tests.training.conftest import captioned


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Five captioned pictures; the first has a mask."""
    return write_pictures(tmp_path / "pictures")


def write_pictures(folder: Path) -> Path:
    """The same five in any folder."""
    captioned(folder, [(64, 64)] * 5)
    Image.new("L", (64, 64), 255).save(folder / "0.mask.png")
    return folder


def looked_at(source: Path, **told: Any) -> Captioned:
    """The data set, whose cache lies beside it."""
    settings = {
        "source": str(source),
        "resolution": 64,
        "bucket_step": 32,
        "cache": source.parent / "cache",
        **told,
    }
    return Captioned(CaptionedSettings.model_validate(settings), seed=0, batch_size=2)


def names(data: Captioned) -> set[str]:
    """The pictures that will be trained on."""
    return {sample.item.key for sample in data.every()}


@pytest.mark.parametrize("part", ["encoder", "quant_conv", "decoder", "post_quant_conv"])
def test_only_what_encodes_decides_what_is_encoded_anew(
    pictures: Path, tiny: Any, part: str
) -> None:
    vae, data = tiny()["vae"], looked_at(pictures)
    before = cached_latents(data, vae, ALONE).folder
    with torch.no_grad():
        next(vae.get_submodule(part).parameters()).add_(0.1)
    after = cached_latents(data, vae, ALONE).folder
    assert (after == before) is (part in {"decoder", "post_quant_conv"})


def test_what_is_encoded_in_another_precision_is_kept_apart(pictures: Path, tiny: Any) -> None:
    vae = tiny()["vae"]
    plain, half = looked_at(pictures), looked_at(pictures)
    half.precision = "bf16"
    whole, rounded = (cached_latents(data, vae, ALONE) for data in (plain, half))
    assert whole.folder != rounded.folder
    key = plain.samples[0].key
    assert not torch.equal(whole[key]["mean"], rounded[key]["mean"])
    assert torch.allclose(whole[key]["mean"], rounded[key]["mean"], atol=0.05)


def test_what_else_is_encoded_decides_no_bit_of_a_text(tmp_path: Path, tiny: Any) -> None:
    """So a damaged entry that is encoded anew is what it was, and a run goes on as if it were."""
    pipe = LatentDiffusionPipeline(**tiny())
    texts = [f"a {word} star" for word in ("red", "blue", "green", "tiny", "huge")]
    folders = ([tmp_path / "together"] * 5, [tmp_path / str(i) for i in range(5)])
    asked: list[int] = []
    pipe.text_encoder.register_forward_pre_hook(
        lambda _, told, named: asked.append(len(told[0] if told else named["input_ids"])),
        with_kwargs=True,
    )
    cached_texts(texts, folders[0][0], conditioning_of(pipe), ALONE)
    assert asked == [8], "matrix products of other sizes round otherwise, on many machines"
    for text, *places in zip(texts, *folders, strict=True):
        entries = [cached_texts([text], p, conditioning_of(pipe), ALONE) for p in places]
        first, alone = (entry[text_key(text)] for entry in entries)
        assert first.keys() == alone.keys() == {"embeds"}
        assert torch.equal(first["embeds"], alone["embeds"])


def test_what_else_is_encoded_decides_no_bit_of_a_picture(tmp_path: Path, tiny: Any) -> None:
    """Nor which size the others have: each call is about as many pictures of one size."""
    sizes = [(64, 64)] * 5 + [(128, 32)] * 3
    every = captioned(tmp_path / "together", sizes)
    vae, asked = tiny()["vae"], list[tuple[int, ...]]()
    vae.encoder.register_forward_pre_hook(lambda _, told: asked.append(tuple(told[0].shape)))
    data = looked_at(every)
    together = cached_latents(data, vae, ALONE)
    assert sorted(asked) == [(8, 3, 32, 128), (8, 3, 64, 64)]
    for sample in data.every():
        alone = tmp_path / sample.item.key / "alone"
        alone.mkdir(parents=True)
        shutil.copy(every / sample.item.key, alone / "0.png")
        (alone / "0.txt").write_text("alone")
        (other,) = looked_at(alone).every()
        entry = cached_latents(looked_at(alone), vae, ALONE)[other.key]
        assert all(torch.equal(together[sample.key][name], entry[name]) for name in ("mean", "std"))


def test_large_pictures_are_encoded_one_at_a_time(tmp_path: Path, tiny: Any) -> None:
    """Several would take memory that a run's own step does not need."""
    pictures = captioned(tmp_path / "pictures", [(512, 512)] * 2)
    vae, asked = tiny()["vae"], list[tuple[int, ...]]()
    vae.encoder.register_forward_pre_hook(lambda _, told: asked.append(tuple(told[0].shape)))
    cached_latents(looked_at(pictures, resolution=512), vae, ALONE)
    assert asked == [(1, 3, 512, 512)] * 2


@pytest.mark.parametrize("name", ["2.png", "0.mask.png"])
def test_a_picture_that_changes_before_it_is_encoded_is_not_kept_as_what_it_was(
    pictures: Path, tiny: Any, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """It is named and left out, or stops where that is asked; the next run takes it as it is."""
    vae = tiny()["vae"]
    data = looked_at(pictures)
    old = {sample.item.key: sample.key for sample in data.every()}
    strict = looked_at(pictures, strict=True)
    Image.new("L", (64, 64), 7).save(pictures / name)
    with pytest.raises(UserError, match="has changed since the run began"):
        cached_latents(strict, vae, ALONE)
    store = cached_latents(data, vae, ALONE)
    changed = f"{name[0]}.png"
    assert names(data) == old.keys() - {changed}
    assert f"{pictures / changed}: has changed since the run began" in caplog.text
    assert old[changed] not in store
    again = looked_at(pictures)
    store = cached_latents(again, vae, ALONE)
    assert names(again) == old.keys()
    assert all(sample.key in store for sample in again.every())


def test_what_turns_out_bad_when_it_is_encoded_is_named_and_counted_or_stops(
    pictures: Path, tiny: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Their headers are sound: only decoding finds that the ends are missing."""
    for name in ("1.png", "3.png"):
        whole = (pictures / name).read_bytes()
        (pictures / name).write_bytes(whole[: len(whole) // 2])
    data = looked_at(pictures)
    assert len(names(data)) == 5
    cached_latents(data, tiny()["vae"], ALONE)
    assert names(data) == {"0.png", "2.png", "4.png"}
    for name in ("1.png", "3.png"):
        assert f"left out: {pictures / name}: truncated or damaged" in caplog.text
    assert "2 of 5 pictures could not be encoded and are left out" in caplog.text
    with pytest.raises(UserError, match=r"[13]\.png: truncated or damaged"):
        cached_latents(looked_at(pictures, strict=True), tiny()["vae"], ALONE)


def test_regularisation_of_which_nothing_is_left_is_refused(
    pictures: Path, tiny: Any, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    whole = (pictures / "1.png").read_bytes()
    (kept / "1.png").write_bytes(whole[: len(whole) // 2])
    data = looked_at(pictures, regularisation=str(kept))
    with pytest.raises(UserError, match=f"{kept} has no picture that can be trained on"):
        cached_latents(data, tiny()["vae"], ALONE)


def test_a_source_that_is_its_own_regularisation_must_keep_pictures_of_its_own(
    pictures: Path,
) -> None:
    """What is held out is left to the regularisation alone: nothing is left to train on."""
    data = looked_at(pictures, regularisation=str(pictures), held_out=0.5)
    with pytest.raises(UserError, match=f"{pictures} has no picture that can be trained on"):
        data.leave_out({sample.key for sample in data.samples})
    assert data.kept


def filled(data: Captioned, vae: Any, share: Share) -> Cache:
    """One process's part."""
    return cached_latents(data, vae, share)


def test_processes_on_machines_of_their_own_train_on_the_same(
    tmp_path: Path, tiny: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is shared, neither pictures nor cache: each encodes all, bad ones left out."""
    every = []
    for machine in ("one", "other"):
        (tmp_path / machine).mkdir()
        copy = write_pictures(tmp_path / machine / "pictures")
        (copy / "1.png").write_bytes((copy / "1.png").read_bytes()[:999])
        every.append(looked_at(copy))
    stores = together([partial(filled, data, tiny()["vae"]) for data in every])
    for data, store in zip(every, stores, strict=True):
        assert names(data) == {"0.png", "2.png", "3.png", "4.png"}
        assert all(sample.key in store for sample in data.every())
    assert "is not shared by all processes" in caplog.text


@pytest.mark.parametrize("differs", ["picture", "caption"])
def test_processes_that_see_different_data_are_refused(
    differs: str, tmp_path: Path, tiny: Any
) -> None:
    copies = [write_pictures(tmp_path / name) for name in ("one", "other")]
    if differs == "picture":
        Image.new("RGB", (64, 64), "red").save(copies[1] / "2.png")
    else:
        (copies[1] / "2.txt").write_text("green")
    every = [looked_at(copy) for copy in copies]
    with pytest.raises(UserError, match="processes see different pictures or captions"):
        together([partial(filled, data, tiny()["vae"]) for data in every])
