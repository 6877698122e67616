"""The report: someone who draws the truth is praised, someone who does not is not."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ldm_pipeline.data.world import World, render
from ldm_pipeline.errors import UserError
from ldm_pipeline.evaluation.metrics import Share
from ldm_pipeline.evaluation.report import (
    AIMS,
    READ_BACK,
    Report,
    evaluate,
    judged,
    reconstructed,
    shares_of,
)
from ldm_pipeline.evaluation.retrieval import caption_accuracy


@pytest.fixture(autouse=True)
def _few_reconstructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """What becomes of the autoencoder's pictures is looked at by name."""
    monkeypatch.setattr("ldm_pipeline.evaluation.report.RECONSTRUCTED", 20)


class Painter:
    """Stands in for a pipeline: paints the scene a caption was told of, or another one."""

    def __init__(self, shift: int = 0) -> None:
        self.shift = shift
        self.config = SimpleNamespace(_name_or_path="")
        self.vae = Mirror()
        self.unet = SimpleNamespace(dtype=torch.float32)
        self.seeds: list[int] = []
        self.settings: list[dict[str, Any]] = []
        worlds = [World(0, "test"), World(0, "unseen pairs")]
        self.scenes: dict[str, Any] = {}
        for world in worlds:
            for i in range(40):
                self.scenes[world.told(i)[2]] = world.told(i + shift)[0]

    def set_progress_bar_config(self, **settings: bool) -> None:
        """As a pipeline has it."""

    def __call__(self, prompts: list[str], *, seed: list[int], **settings: Any) -> Any:
        assert settings["output_type"] == "np"
        self.seeds += seed
        self.settings.append(settings)
        pictures = np.stack([render(self.scenes[prompt]) for prompt in prompts])
        return SimpleNamespace(images=pictures / 255.0)


class Mirror:
    """An autoencoder that gives back what it was given, a tenth of the range brighter."""

    device, dtype = torch.device("cpu"), torch.float32
    config = SimpleNamespace(scaling_factor=0.5)

    def encode(self, x: torch.Tensor) -> Any:
        return SimpleNamespace(latent_dist=SimpleNamespace(parameters=torch.cat([x, x], dim=1)))

    def decode(self, z: torch.Tensor, **_: Any) -> Any:
        return (torch.where(z > 0, z - 0.2, z + 0.2),)


def test_painting_the_truth_scores_full_marks(tmp_path: Path) -> None:
    painter = Painter()
    report = evaluate(painter, prompts=40, seed=0, batch_size=16, out=tmp_path / "report")
    for name, share in report.shares.items():
        assert share.k == share.n or name == READ_BACK, name
    # Every pixel is off by a tenth of the range: 20 dB exactly.
    assert report.psnr == pytest.approx(20.0, abs=1e-3)
    written = json.loads((tmp_path / "report" / "report.json").read_text("utf-8"))
    assert written["shares"]["background"]["value"] == 1.0
    assert (tmp_path / "report" / "grid.png").stat().st_size > 10_000
    assert all(name in str(report) for name in report.shares)
    assert len(set(painter.seeds[:40])) == 40, "each test picture has a seed of its own"


def test_the_sampler_is_heard_and_told(tmp_path: Path) -> None:
    painter = Painter()
    told = evaluate(painter, prompts=2, seed=0, sampler="tcd", eta=0.0).settings
    assert (told["sampler"], told["eta"]) == ("tcd", 0.0)
    assert all((s["sampler"], s["eta"]) == ("tcd", 0.0) for s in painter.settings)
    assert not {"sampler", "eta"} & set(evaluate(painter, prompts=2, seed=0).settings)


def test_painting_something_else_scores_little() -> None:
    report = evaluate(Painter(shift=1), prompts=40, seed=0)
    for name in ("one thing: kind and colour", "everything the words say", "background"):
        # Neighbouring scenes share a background in 1 case of 12 or so, a thing in 1 of 336.
        assert report.shares[name].value < 0.5, name


def test_every_aim_but_clips_is_measured_without_clip() -> None:
    samples = [World(0, "test")[i] for i in range(4)]
    drawn = [judged(sample, sample.picture) for sample in samples]
    further = {"caption among 100, half of them hard", READ_BACK}
    assert set(AIMS) - set(shares_of(drawn, drawn)) == further


def test_a_pipeline_of_no_folder_is_not_judged_with_the_clip_that_lies_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clip").mkdir()
    monkeypatch.chdir(tmp_path)
    assert not any("caption" in name for name in evaluate(Painter(), prompts=2, seed=0).shares)


@pytest.mark.parametrize(
    ("part", "file", "refusal"),
    [
        ("clip", "pytorch_model.bin", "only pickled weights"),
        ("clip", "adapter_config.json", "names another model"),
        ("tokenizer", "tokenizer.py", "brings code of its own"),
    ],
)
def test_the_clip_beside_a_model_is_looked_at_first(
    tmp_path: Path, part: str, file: str, refusal: str
) -> None:
    for name in ("clip", "tokenizer"):
        (tmp_path / name).mkdir()
    (tmp_path / part / file).write_text("{}")
    with pytest.raises(UserError, match=refusal):
        caption_accuracy(tmp_path, 1, 0)


def test_scenes_are_read_back_where_the_autoencoder_keeps_them() -> None:
    class Faithful(Mirror):
        def decode(self, z: torch.Tensor, **_: Any) -> Any:
            return (z,)

    class Confused(Mirror):
        def decode(self, z: torch.Tensor, **_: Any) -> Any:
            return (z.roll(1, dims=0),)

    _, kept = reconstructed(Faithful(), 40, 0)
    assert kept.value >= 0.97
    _, lost = reconstructed(Confused(), 40, 0)
    assert lost.value <= 0.1


def test_counting_weighs_every_count_alike() -> None:
    samples = [World(0, "test")[i] for i in range(120)]
    share = shares_of([judged(s, s.picture) for s in samples], [])["count, 1 to 4"]
    counts = [s.description.mentions[0].count for s in samples if len(s.description.mentions) == 1]
    assert share.n == 4 * min(counts.count(n) for n in (1, 2, 3, 4))


def test_a_figure_without_trials_is_no_number() -> None:
    """A few prompts may hold none of a sort; the report is JSON that any reader takes."""
    report = Report({"size": Share.of([])}, 30.0, {})
    assert "nan" not in str(report)
    told = json.dumps(report.to_json(), allow_nan=False)
    assert json.loads(told)["shares"]["size"]["value"] is None
