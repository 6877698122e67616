"""The autoencoder's objective: its samples, its loss in closed form, its measures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from ldm_pipeline.data.world import World
from ldm_pipeline.errors import UserError
from ldm_pipeline.images import psnr, to_tensor
from ldm_pipeline.training.autoencoder import (
    AutoencoderConfig,
    AutoencoderObjective,
    corner_of,
)
from ldm_pipeline.training.world_data import fresh_pictures, noise_of
from tests.training import laws


@pytest.fixture
def objective(autoencoder_config: AutoencoderConfig) -> AutoencoderObjective:
    """A fresh one of 8 channels."""
    return AutoencoderObjective(autoencoder_config)


def test_the_laws_of_objectives(objective: AutoencoderObjective) -> None:
    laws.a_batch_is_a_function_of_its_positions(objective)
    laws.everything_trained_has_a_gradient(objective)


def test_a_decoder_alone_is_trained_on_latents_that_stay(
    autoencoder_config: AutoencoderConfig, autoencoder_folder: Path
) -> None:
    told = {"begin_from": autoencoder_folder, "decoder_only": True}
    objective = AutoencoderObjective(autoencoder_config.model_copy(update=told))
    laws.everything_trained_has_a_gradient(objective)
    trained = {name.split(".")[1] for name, p in objective.named_parameters() if p.requires_grad}
    assert trained == {"decoder", "post_quant_conv"}


def test_a_decoder_alone_keeps_the_scale_of_its_latents(
    autoencoder_config: AutoencoderConfig, autoencoder_folder: Path, tmp_path: Path
) -> None:
    begun = shutil.copytree(autoencoder_folder, tmp_path / "begun")
    told = json.loads((begun / "config.json").read_text())
    (begun / "config.json").write_text(json.dumps({**told, "scaling_factor": 0.12345}))
    config = autoencoder_config.model_copy(update={"begin_from": begun, "decoder_only": True})
    AutoencoderObjective(config).export(tmp_path / "out", 0)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["scaling_factor"] == 0.12345
    (begun / "config.json").unlink()
    with pytest.raises(UserError, match="that can be read"):
        AutoencoderObjective(config)


def test_a_decoder_alone_needs_the_encoder_that_it_reads(
    autoencoder_config: AutoencoderConfig,
) -> None:
    with pytest.raises(ValueError, match="decoder_only=true needs begin_from"):
        AutoencoderConfig.model_validate(
            {**autoencoder_config.model_dump(), "begin_from": None, "decoder_only": True}
        )


def test_samples_are_cut_from_the_world(objective: AutoencoderObjective) -> None:
    batch = objective.batch(range(3, 5))
    assert batch["x"].shape == (2, 3, 32, 32)
    assert batch["noise"].shape == (2, 4, 4, 4)
    for position, crop in zip((3, 4), batch["x"], strict=True):
        windows = to_tensor(World(0)[position].picture)[0].unfold(1, 32, 1).unfold(2, 32, 1)
        same = (windows == crop[:, None, None]).all(dim=(0, 3, 4))
        assert same.any()


@pytest.mark.parametrize("side", [32, 64, 128])
def test_crops_hold_a_thing_as_often_as_asked(side: int) -> None:
    """Always inside; at share 1 the centre of a thing is in each, at 0 the corner is anywhere."""
    rng = np.random.default_rng(0)
    scenes = [World(0)[i].scene for i in range(40)]
    for scene in scenes:
        top, left = corner_of(scene, side, 1.0, rng)
        assert 0 <= top <= 128 - side
        assert 0 <= left <= 128 - side
        held = [
            top <= thing.y <= top + side and left <= thing.x <= left + side
            for thing in scene.things
        ]
        assert any(held) or not scene.things
    anywhere = [corner_of(scenes[0], side, 0.0, rng)[0] for _ in range(600)]
    assert {min(anywhere), max(anywhere)} == {0, 128 - side}


def test_noise_is_unit_gaussian_and_depends_on_the_position_alone() -> None:
    whole = noise_of(range(5), (2, 3), 7)
    assert torch.equal(noise_of(range(2, 3), (2, 3), 7)[0], whole[2])
    many = noise_of(range(1000), (100,), 0)
    # 100,000 draws: 5 standard errors of the mean and of the variance.
    assert abs(float(many.mean())) < 5 / 100_000**0.5
    assert abs(float(many.var()) - 1) < 5 * (2 / 100_000) ** 0.5
    assert len({tuple(row[:2].tolist()) for row in many}) == 1000


def test_noise_depends_on_the_seed() -> None:
    assert not torch.equal(noise_of(range(2), (2, 3), 7), noise_of(range(2), (2, 3), 8))


class Known(nn.Module):
    """Says mean m and std s of every latent, and decodes each to a ramp of slope g along x."""

    def __init__(self, m: float, s: float, g: float) -> None:
        super().__init__()
        self.m, self.s, self.g = m, s, g
        self.z = torch.empty(0)

    def encode(self, x: Tensor) -> SimpleNamespace:
        """The same Gaussian everywhere."""
        one = torch.ones(len(x), 4, x.shape[-2] // 8, x.shape[-1] // 8)
        moments = torch.cat([self.m * one, 2 * one * torch.tensor(self.s).log()], dim=1)
        return SimpleNamespace(latent_dist=DiagonalGaussianDistribution(moments))

    def decode(self, z: Tensor) -> SimpleNamespace:
        """The ramp, whatever z; z is kept."""
        self.z = z
        ramp = self.g * torch.arange(z.shape[-1] * 8.0)
        return SimpleNamespace(sample=ramp.expand(len(z), 3, z.shape[-2] * 8, -1))


def test_the_loss_in_closed_form(objective: AutoencoderObjective) -> None:
    """For a black error of slope g: L1 = g 31/2, edges = g, MSE = g² 31 63 / 6; the KL term is the
    Gaussian's KL from the unit one, per latent number."""
    m, s, g = 0.5, 0.25, 0.01
    known = Known(m, s, g)
    objective.vae = known
    batch = {"x": torch.zeros(2, 3, 32, 32), "noise": noise_of(range(2), (4, 4, 4), 0)}
    got = {name: float(value) for name, value in objective(batch).items()}
    kl = 0.5 * (m**2 + s**2 - 1) - torch.tensor(s).log().item()
    wanted = {"l1": g * 15.5, "edges": g, "kl": kl}
    mse = g**2 * 31 * 63 / 6
    w = objective.config.loss
    loss = w.l1 * g * 15.5 + w.edges * g + w.mse * mse + w.kl * kl
    # Means over thousands of float32 numbers.
    assert got == pytest.approx({**wanted, "loss": loss}, rel=1e-5)
    assert torch.allclose(known.z, m + s * batch["noise"], rtol=1e-6)  # one rounding


def test_the_decoder_sees_noise_up_to_the_share_asked_for(
    autoencoder_config: AutoencoderConfig,
) -> None:
    """Uniform levels: the mean square is a third of the greatest; in units of the latents' spread
    when they are decoded."""
    asked = autoencoder_config.model_copy(update={"latent_noise": 0.3})
    objective, plain = AutoencoderObjective(asked), AutoencoderObjective(autoencoder_config)
    assert "extra" not in plain.batch(range(4))
    batch = objective.batch(range(400))
    levels = batch["extra"].square().mean(dim=(1, 2, 3)).sqrt()
    assert levels.max() < 0.3 * 1.3  # of 64 numbers each
    assert float(levels.square().mean()) == pytest.approx(0.3**2 / 3, rel=0.15)
    few = objective.batch(range(2))
    decoded: list[torch.Tensor] = []
    objective.vae.post_quant_conv.register_forward_pre_hook(lambda _, z: decoded.append(*z))
    with torch.no_grad():
        objective(few)
        objective({**few, "extra": torch.zeros_like(few["extra"])})
        spread = objective.vae.encode(few["x"]).latent_dist.mean.std()
    assert torch.allclose(decoded[0] - decoded[1], spread * few["extra"], atol=1e-5)


def test_psnr_in_closed_form() -> None:
    """A constant error e on a peak of 2 is 20 log10(2 / e) dB, per picture."""
    x = torch.zeros(2, 3, 8, 8)
    y = x + torch.tensor([0.2, 0.02])[:, None, None, None]
    assert psnr(x, y).tolist() == pytest.approx([20.0, 40.0], abs=1e-4)  # float32 logarithms


def test_measures_repeat_and_the_export_has_unit_latents(
    objective: AutoencoderObjective, tmp_path: Path
) -> None:
    """Validation draws fixed noise: exports after a resume and without a stop are the same."""
    assert objective.validate() == objective.validate()
    objective.export(tmp_path, 0)
    vae = AutoencoderKL.from_pretrained(tmp_path)
    with torch.no_grad():
        z = vae.encode(fresh_pictures(16)).latent_dist.sample(torch.Generator().manual_seed(5))
    # 16 of the 64 pictures that the factor was measured on.
    assert float(z.std()) * vae.config.scaling_factor == pytest.approx(1.0, rel=0.1)
    for name, value in objective.vae.state_dict().items():
        assert torch.equal(value, vae.state_dict()[name])


def test_two_pictures_are_learnt(objective: AutoencoderObjective) -> None:
    losses = laws.losses_of_one_batch(objective, n=2, lr=3e-3)
    assert losses[-1] < 0.8 * losses[0]
