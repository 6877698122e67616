"""The latent diffusion objective: its stream of samples, dropped captions, its export."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from ldm_pipeline import load
from ldm_pipeline.data import cache
from ldm_pipeline.data.world import World
from ldm_pipeline.models import autoencoder
from ldm_pipeline.training.latent_diffusion import LatentDiffusionConfig, LatentDiffusionObjective
from ldm_pipeline.training.world_data import as_tensor
from tests.training import laws

PICTURES = 8


@pytest.fixture(scope="module")
def built(
    tmp_path_factory: pytest.TempPathFactory, autoencoder_folder: Path, text_folder: Path
) -> LatentDiffusionObjective:
    """A UNet of 16 channels over eight cached pictures; tests that train it copy it."""
    config = LatentDiffusionConfig.model_validate(
        {
            "run": {"out": "unused", "batch_size": 2},
            "autoencoder": autoencoder_folder,
            "text": text_folder,
            "model": {"channels": [16, 16, 16], "norm_groups": 4, "heads": 2},
            "data": {"pictures": PICTURES, "cache": tmp_path_factory.mktemp("cache")},
        }
    )
    return LatentDiffusionObjective(config)


@pytest.fixture
def objective(built: LatentDiffusionObjective) -> LatentDiffusionObjective:
    """A copy that the test may change."""
    return copy.deepcopy(built)


def test_the_laws_of_objectives(objective: LatentDiffusionObjective) -> None:
    laws.a_batch_is_a_function_of_its_positions(objective)
    laws.everything_trained_has_a_gradient(objective)


def test_the_cached_latents_are_those_of_the_pictures(built: LatentDiffusionObjective) -> None:
    pictures = as_tensor([World(0)[i].picture for i in range(PICTURES)])
    with torch.no_grad():
        mean, std = autoencoder.encode(built._vae[0], pictures)
    # float16 has 11 bits.
    assert torch.allclose(built.mean.float(), mean, rtol=2**-11, atol=1e-6)
    assert torch.allclose(built.std.float(), std, rtol=2**-11, atol=1e-6)


def test_every_pass_sees_every_picture_once(objective: LatentDiffusionObjective) -> None:
    """In another order each time: with std 0, z tells the picture."""
    objective.std = torch.zeros_like(objective.std)
    orders = []
    for epoch in range(3):
        z = objective.batch(range(epoch * PICTURES, (epoch + 1) * PICTURES))["z"]
        distances = (z[:, None] - objective.mean.float()).flatten(2).norm(dim=-1)
        orders.append(tuple(distances.argmin(dim=1).tolist()))
        assert sorted(orders[-1]) == list(range(PICTURES))
    assert len(set(orders)) == 3


def test_the_asked_share_of_captions_is_dropped(built: LatentDiffusionObjective) -> None:
    """400 draws at 0.1: between 20 and 60 are empty, 3.3 standard deviations either way."""
    tokens = built.batch(range(400))["tokens"]
    empty = built.tokenizer("", padding="max_length", return_tensors="pt").input_ids
    assert 20 <= int((tokens == empty).all(dim=1).sum()) <= 60
    assert len(tokens.unique(dim=0)) > 100  # worded anew in each pass


def test_levels_cover_the_schedule(built: LatentDiffusionObjective) -> None:
    t = built.batch(range(400))["t"]
    assert t.min() >= 0
    assert t.max() <= 999
    # 400 uniform draws: 5 standard errors of their mean.
    assert abs(float(t.float().mean()) - 499.5) < 5 * 288.7 / 400**0.5


@pytest.mark.parametrize("tuned", [True, False])
def test_what_is_trained(
    built: LatentDiffusionObjective, tuned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The UNet, the text encoder if asked, the autoencoder never."""
    config = built.config.model_copy(update={"train_text_encoder": tuned})
    monkeypatch.setattr(cache, "latents", lambda *_: (built.mean, built.std))
    objective = LatentDiffusionObjective(config)
    trained = {
        name.partition(".")[0] for name, p in objective.named_parameters() if p.requires_grad
    }
    assert trained == ({"unet", "text_encoder"} if tuned else {"unet"})
    assert all("vae" not in name for name, _ in objective.named_parameters())
    laws.everything_trained_has_a_gradient(objective)


def test_the_export_draws_in_stock_and_in_ours(
    built: LatentDiffusionObjective, tmp_path: Path
) -> None:
    """The same picture, from weights that are the objective's, rounded to 16 bits."""
    built.export(tmp_path)
    pictures = []
    for pipe in (StableDiffusionPipeline.from_pretrained(tmp_path), load(tmp_path)):
        pipe.to(torch.float32)
        pipe.set_progress_bar_config(disable=True)
        drawn = pipe(
            "a red star",
            num_inference_steps=2,
            height=128,
            width=128,
            output_type="pt",
            generator=torch.Generator().manual_seed(0),
        ).images
        assert drawn.shape == (1, 3, 128, 128)
        assert torch.isfinite(drawn).all()
        pictures.append(drawn)
        weights = built.unet.state_dict()
        for name, value in pipe.unet.state_dict().items():
            assert torch.equal(value, weights[name].half().float()), name
    assert torch.equal(*pictures)
    assert next(built.unet.parameters()).dtype == torch.float32  # exporting is no surgery


def test_measures_repeat(built: LatentDiffusionObjective) -> None:
    measures = built.validate()
    assert measures == built.validate()
    bands = [measures[f"loss_band_{i}"] for i in range(4)]
    assert sum(bands) / 4 == pytest.approx(measures["loss"], rel=1e-5)  # float32 means


def test_four_samples_are_learnt(objective: LatentDiffusionObjective) -> None:
    losses = laws.losses_of_one_batch(objective, n=4, lr=5e-3)
    assert losses[-1] < 0.8 * losses[0]
