"""The latent diffusion objective: its stream of samples, dropped captions, its export."""

from __future__ import annotations

import copy
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from ldm_pipeline import load
from ldm_pipeline.data.world import VOCABULARY, World
from ldm_pipeline.data.world.captions import words_of
from ldm_pipeline.errors import UserError
from ldm_pipeline.images import to_tensor
from ldm_pipeline.models import autoencoder
from ldm_pipeline.training.latent_diffusion import (
    LatentDiffusionConfig,
    LatentDiffusionObjective,
    OftenSettings,
    UnetSettings,
)
from ldm_pipeline.training.levels import LevelSettings
from ldm_pipeline.training.pixels import PixelSettings, a_corner, quarter
from tests.conftest import tiny_small_vae
from tests.training import laws

PICTURES = 8


@pytest.fixture(scope="module")
def built(
    tmp_path_factory: pytest.TempPathFactory, autoencoder_folder: Path, text_folder: Path
) -> LatentDiffusionObjective:
    """A UNet of 16 channels over eight cached pictures; tests that train it copy it."""
    config = LatentDiffusionConfig.model_validate(
        {
            "run": {"out": "unused", "batch_size": 2, "mixed_precision": "no"},
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
    pictures = to_tensor(np.stack([World(0)[i].picture for i in range(PICTURES)]))
    with torch.no_grad(), autoencoder.quick(built._vae[0], "no"):
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


def test_pictures_of_some_kinds_come_several_times_in_each_pass(
    built: LatentDiffusionObjective, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each as often as asked, the others once, and no pass leaves one out."""
    scenes = [World(0).told(index)[0] for index in range(PICTURES)]
    kind = next(scene.things[0].kind for scene in scenes if scene.things)
    held = [any(thing.kind == kind for thing in scene.things) for scene in scenes]
    assert 0 < sum(held) < PICTURES
    often = OftenSettings(kinds=(kind,), times=3)
    still = torch.zeros_like(built.std)
    monkeypatch.setattr(LatentDiffusionObjective, "_cached", lambda _: (built.mean, still))
    objective = LatentDiffusionObjective(built.config.model_copy(update={"often": often}))
    n = PICTURES + 2 * sum(held)
    for epoch in range(2):
        z = objective.batch(range(epoch * n, (epoch + 1) * n))["z"]
        distances = (z[:, None] - objective.mean.float()).flatten(2).norm(dim=-1)
        times = distances.argmin(dim=1).bincount(minlength=PICTURES).tolist()
        assert times == [3 if here else 1 for here in held]


def test_kinds_and_decoders_that_are_not_there_are_refused(
    built: LatentDiffusionObjective, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"kinds='stars' is not known.* did you mean 'star'\?"):
        OftenSettings(kinds=("stars",))
    with pytest.raises(ValueError, match=r"times=3 needs kinds"):
        OftenSettings(times=3)
    OftenSettings.model_validate(
        OftenSettings().model_dump()
    )  # as a run's own config.yaml tells it
    with pytest.raises(ValueError, match=r"weight=0.5 needs a decoder"):
        PixelSettings(weight=0.5)
    monkeypatch.setattr(LatentDiffusionObjective, "_cached", lambda _: (built.mean, built.std))
    tiny_small_vae(latent_channels=8).save_pretrained(tmp_path / "eight")
    for place, why in (
        (tmp_path / "eight", "reads latents of 8 channels, and this model draws 4"),
        (tmp_path / "nowhere", "is no folder of an AutoencoderTiny"),
        ("small", "is the bundled model's"),
    ):
        pixels = PixelSettings(weight=0.5, decoder=str(place))
        with pytest.raises(UserError, match=why):
            LatentDiffusionObjective(built.config.model_copy(update={"pixels": pixels}))


def test_an_error_in_pixels_is_that_of_what_the_decoder_shows(
    built: LatentDiffusionObjective, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of x0 in each sample's own quarter, as that decoder decodes, weighted by its level."""
    small = tiny_small_vae()
    small.register_to_config(shift_factor=0.5)
    small.save_pretrained(tmp_path)
    monkeypatch.setattr(LatentDiffusionObjective, "_cached", lambda _: (built.mean, built.std))
    pixels = PixelSettings(weight=0.5, decoder=str(tmp_path))
    objective = LatentDiffusionObjective(built.config.model_copy(update={"pixels": pixels}))

    batch = {name: value[:3] for name, value in objective.batch(range(8)).items()}
    batch["t"] = torch.tensor([20, 500, 980])
    half = batch["z"].shape[-1] // 2
    schedule, expected = objective.schedule, 0.0
    for i in range(3):
        cut = [slice(int(c) * half, (int(c) + 1) * half) for c in batch["corner"][i]]
        z, eps, t = (batch[name][i : i + 1] for name in ("z", "eps", "t"))
        a, sig = schedule.coefficients(t, like=z)
        with torch.no_grad():
            embeds = objective.text_encoder(batch["tokens"][i : i + 1])[0]
            v = objective.unet(a * z + sig * eps, t, encoder_hidden_states=embeds).sample
            x0 = a * (a * z + sig * eps) - sig * v
            shown, truth = (autoencoder.decode(small, told[..., *cut]) for told in (x0, z))
        snr = min(float(a / sig) ** 2, 10.0)
        expected += snr * float((shown - truth).square().mean()) / 3
    measures = objective(batch)
    assert float(measures["pixels"].detach()) == pytest.approx(expected, rel=1e-4)
    loss = (measures["denoising"] + 0.5 * measures["pixels"]).detach()
    assert float(measures["loss"].detach()) == pytest.approx(float(loss), rel=1e-6)
    assert measures["loss"].dtype == torch.float32

    assert not any("decoder" in name for name, _ in objective.named_parameters())
    laws.a_batch_is_a_function_of_its_positions(objective)
    laws.everything_trained_has_a_gradient(objective)


@pytest.mark.parametrize("sides", [(8, 6), (9, 5), (1, 4)])
def test_four_quarters_are_the_whole(sides: tuple[int, int]) -> None:
    """Each sample has its own, and each is drawn as often."""
    height, width = sides
    z = torch.rand(4, 2, height, width)
    corner = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    rows, columns = -(-height // 2), -(-width // 2)
    cut = quarter(z, corner)
    assert torch.equal(cut[0], z[0, :, :rows, :columns])
    assert torch.equal(cut[1], z[1, :, :rows, -columns:])
    assert torch.equal(cut[2], z[2, :, -rows:, :columns])
    assert torch.equal(cut[3], z[3, :, -rows:, -columns:])
    rng = np.random.default_rng(0)
    drawn = torch.stack([a_corner(rng) for _ in range(400)])
    times = (2 * drawn[:, 0] + drawn[:, 1]).bincount(minlength=4)
    assert times.min() > 70  # of 100, 3.5 standard deviations


def test_the_asked_share_of_captions_is_dropped(built: LatentDiffusionObjective) -> None:
    """400 draws at 0.1: between 20 and 60 are empty, 3.3 standard deviations either way."""
    tokens = built.batch(range(400))["tokens"]
    empty = built.tokenizer("", padding="max_length", return_tensors="pt").input_ids
    assert 20 <= int((tokens == empty).all(dim=1).sum()) <= 60
    assert len(tokens.unique(dim=0)) > 100  # worded anew in each pass


def test_the_asked_share_of_captions_is_among_strange_words(
    built: LatentDiffusionObjective,
) -> None:
    """300 draws at 0.5, at least five standard deviations from 0 and 1; no word of a caption is
    lost, and where there would be no room for it the strange ones stay out."""
    config = built.config.model_copy(update={"strange_words": 0.5, "caption_dropout": 0.0})
    objective = copy.copy(built)
    objective.config = config
    told = [objective._caption(i % PICTURES, np.random.default_rng(i)) for i in range(300)]
    strange = [bool(set(words_of(caption)) - set(VOCABULARY)) for caption in told]
    assert 100 <= sum(strange) <= 200
    objective.tokenizer = copy.deepcopy(built.tokenizer)
    objective.tokenizer.model_max_length = 8
    short = [objective._caption(i % PICTURES, np.random.default_rng(i)) for i in range(300)]
    for caption in set(short) - set(told):
        assert set(words_of(caption)) <= set(VOCABULARY), caption
    assert all(
        len(objective.tokenizer(caption, truncation=False).input_ids) <= 8
        for caption in short
        if set(words_of(caption)) - set(VOCABULARY)
    )


@pytest.mark.parametrize("uniform", [1.0, 0.2, 0.0])
def test_levels_have_their_distribution(built: LatentDiffusionObjective, uniform: float) -> None:
    """The law of the draws is the mixture's within what 2000 draws can tell (DKW, 1 in 1500)."""
    settings = LevelSettings(uniform=uniform)
    rng = np.random.default_rng(0)
    drawn = np.sort([settings.draw(rng, 1000) for _ in range(2000)])
    assert drawn[0] >= 0
    assert drawn[-1] <= 999
    share = (drawn + 0.5) / 1000
    normal = NormalDist(settings.mean, settings.std)
    logit = np.log(share / (1 - share))
    law = uniform * share + (1 - uniform) * np.array([normal.cdf(value) for value in logit])
    assert np.abs(law - np.arange(2000) / 2000).max() < 2.0 / 2000**0.5
    seen = built.batch(range(8))["t"]
    assert len(seen.unique()) > 1
    assert torch.equal(seen, built.batch(range(8))["t"])


@pytest.mark.parametrize("attends", [(True, True, False), (False, True, True)])
def test_attention_is_where_it_was_asked_for(
    built: LatentDiffusionObjective, attends: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built.config.model.model_copy(update={"attends": attends})
    config = built.config.model_copy(update={"model": model})
    monkeypatch.setattr(LatentDiffusionObjective, "_cached", lambda _: (built.mean, built.std))
    unet = LatentDiffusionObjective(config).unet
    assert tuple(hasattr(block, "attentions") for block in unet.down_blocks) == attends
    assert tuple(hasattr(block, "attentions") for block in unet.up_blocks) == attends[::-1]


def test_a_level_too_few_is_refused() -> None:
    with pytest.raises(ValueError, match="must tell of 3 levels"):
        UnetSettings(attends=(True, False))


def test_it_goes_on_from_what_was_exported(
    built: LatentDiffusionObjective, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights come back as they were written, in 16 bits, and are trained in 32; another run's seed
    changes nothing."""
    built.export(tmp_path, 0)
    run = built.config.run.model_copy(update={"seed": 1})
    config = built.config.model_copy(update={"begin_from": tmp_path, "text": tmp_path, "run": run})
    monkeypatch.setattr(LatentDiffusionObjective, "_cached", lambda _: (built.mean, built.std))
    again = LatentDiffusionObjective(config)
    for name in ("unet", "text_encoder"):
        before, after = getattr(built, name), getattr(again, name)
        for (key, value), other in zip(before.named_parameters(), after.parameters(), strict=True):
            assert other.dtype == torch.float32
            assert torch.equal(value.half().float(), other), key


@pytest.mark.parametrize("tuned", [True, False])
def test_what_is_trained(
    built: LatentDiffusionObjective, tuned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The UNet, the text encoder if asked, the autoencoder never."""
    config = built.config.model_copy(update={"train_text_encoder": tuned})
    monkeypatch.setattr(LatentDiffusionObjective, "_cached", lambda _: (built.mean, built.std))
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
    built.export(tmp_path, 0)
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
    assert measures["words"] != 0
    bands = [measures[f"loss_band_{i}"] for i in range(4)]
    assert sum(bands) / 4 == pytest.approx(measures["loss"], rel=1e-5)  # float32 means


def test_four_samples_are_learnt(objective: LatentDiffusionObjective) -> None:
    losses = laws.losses_of_one_batch(objective, n=4, lr=5e-3)
    assert losses[-1] < 0.8 * losses[0]
