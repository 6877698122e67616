"""Putting a trained model where it can be given away: whole, small, and silent about its maker."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ldm_pipeline.errors import UserError
from ldm_pipeline.models import bundled
from ldm_pipeline.training import bundle as module
from ldm_pipeline.training.bundle import bundle


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The bundled model, as a training run of some machine leaves it."""
    folder = tmp_path / "model"
    shutil.copytree(bundled.folder(), folder)
    config = folder / "vae" / "config.json"
    told = json.loads(config.read_text("utf-8"))
    config.write_text(json.dumps({**told, "_name_or_path": "/somewhere/on/a/machine"}), "utf-8")
    return folder


def test_it_is_what_was_trained_and_says_nothing_of_where(model: Path, tmp_path: Path) -> None:
    out = bundle(model, model, None, tmp_path / "out")
    for config in out.rglob("config.json"):
        trained = json.loads((model / config.relative_to(out)).read_text("utf-8"))
        trained.pop("_name_or_path", None)
        assert json.loads(config.read_text("utf-8")) == trained
    for weights in out.rglob("*.safetensors"):
        assert weights.read_bytes() == (model / weights.relative_to(out)).read_bytes()
    assert "Not measured yet" in (out / "README.md").read_text("utf-8")


def test_what_does_not_fit_leaves_everything_as_it_was(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "kept").touch()
    monkeypatch.setattr(module, "MOST_BYTES", 1_000_000)
    with pytest.raises(UserError, match=r"takes .* MB; at most 1 fit"):
        bundle(model, model, None, out)
    shutil.rmtree(model / "clip")
    with pytest.raises(UserError, match="clip is missing"):
        bundle(model, model, None, out)
    assert [path.name for path in tmp_path.iterdir() if path != model] == ["out"]
    assert [path.name for path in out.iterdir()] == ["kept"]
