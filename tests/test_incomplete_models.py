"""Models that are not whole: refused in one line by whatever opens them, and nothing is written.

model    a good folder, of which each case spoils a copy
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import ldm_pipeline
from ldm_pipeline.errors import UserError
from ldm_pipeline.models.original.convert import to_file
from tests.models.original.models import pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"
Spoil = Callable[[Path], object]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("whole") / "model"
    pipeline("sd1").save_pretrained(place)
    return place


def without(file: str) -> Spoil:
    return lambda folder: (folder / file).unlink()


def edited(file: str, **entries: Any) -> Spoil:
    """With entries in a JSON file that are others, or with ... left out."""

    def spoil(folder: Path) -> None:
        contents = {**json.loads((folder / file).read_text()), **entries}
        kept = {key: value for key, value in contents.items() if value is not ...}
        (folder / file).write_text(json.dumps(kept))

    return spoil


def lacking(file: str, part: str) -> Spoil:
    """Without the tensors in whose names `part` is."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / file)
        kept = {key: tensor for key, tensor in tensors.items() if part not in key}
        assert 0 < len(kept) < len(tensors)
        save_file(kept, folder / file, {"format": "pt"})

    return spoil


def a_shard_alone(folder: Path) -> None:
    (folder / "unet" / WEIGHTS).rename(
        folder / "unet/diffusion_pytorch_model-00001-of-00002.safetensors"
    )


CASES: dict[str, tuple[Spoil, str]] = {
    "weights": (without(f"unet/{WEIGHTS}"), "unet holds no weights"),
    "encoder": (without("text_encoder/model.safetensors"), "text_encoder holds no weights"),
    "config": (without("unet/config.json"), r"unet has no config\.json"),
    "encoder's config": (without("text_encoder/config.json"), r"text_encoder has no config\.json"),
    "schedule": (
        without("scheduler/scheduler_config.json"),
        r"scheduler has no scheduler_config\.json",
    ),
    "vocabulary": (without("tokenizer/tokenizer.json"), "tokenizer holds no vocabulary"),
    "index of shards": (a_shard_alone, "shards of weights and no index of them"),
    "index of a pipeline": (
        lambda folder: (folder / "model_index.json").write_text("{}"),
        "names no _class",
    ),
    "UNet": (edited("model_index.json", unet=...), "model names no unet"),
    "UNet that is none": (edited("model_index.json", unet=[None, None]), "model names no unet"),
    "library": (edited("model_index.json", unet="UNet"), "'UNet' as its unet; an entry is a lib"),
    "half of a UNet": (
        lacking(f"unet/{WEIGHTS}", "up_blocks"),
        "unet has not all tensors|of its unet are missing",
    ),
    "half of an encoder": (
        lacking("text_encoder/model.safetensors", "layers.1."),
        "text_encoder has not all tensors|of its text_encoder are missing",
    ),
    "widths": (edited("unet/config.json", block_out_channels="x"), "loaded|can have this config"),
    "blocks": (edited("unet/config.json", down_block_types=...), "loaded|can have this config"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_missing_is_named(model: Path, tmp_path: Path, name: str) -> None:
    spoil, message = CASES[name]
    shutil.copytree(model, tmp_path / "model")
    spoil(tmp_path / "model")
    opens: tuple[Callable[[Path], object], ...] = (
        ldm_pipeline.load,
        lambda folder: to_file(folder, tmp_path / "a.safetensors"),
    )
    for opened in opens:
        with pytest.raises(UserError, match=message) as refusal:
            opened(tmp_path / "model")
        assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tokenizer_that_does_not_say_its_length(model: Path, tmp_path: Path) -> None:
    """Transformers then gives it an astronomic one."""
    shutil.copytree(model, tmp_path / "model")
    edited("tokenizer/tokenizer_config.json", model_max_length=...)(tmp_path / "model")
    pipe = ldm_pipeline.load(tmp_path / "model")
    for weighted in (False, True):
        with pytest.raises(UserError, match="set model_max_length in its tokenizer_config"):
            pipe("a red star", weighted=weighted)


def test_a_file_that_is_not_there_is_no_model_of_the_hub() -> None:
    with pytest.raises(UserError, match=r"^there is no file no/where\.safetensors$"):
        ldm_pipeline.load("no/where.safetensors")
