"""The small decoder's objective: latents and crops of the same place, a loss that falls, a folder
that stock diffusers opens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny

from ldm_pipeline.data.world import World
from ldm_pipeline.errors import UserError
from ldm_pipeline.images import to_tensor
from ldm_pipeline.models import autoencoder
from ldm_pipeline.training.small_decoder import (
    SmallDecoderConfig,
    SmallDecoderObjective,
    SmallDecoderSettings,
    small_autoencoder,
)
from tests.training import laws


@pytest.fixture(scope="module")
def config(
    tmp_path_factory: pytest.TempPathFactory, autoencoder_folder: Path
) -> SmallDecoderConfig:
    return SmallDecoderConfig.model_validate(
        {
            "run": {"out": "unused", "batch_size": 2, "mixed_precision": "no"},
            "autoencoder": autoencoder_folder,
            "model": {"channels": 8, "blocks": [1, 1, 1, 1], "encoder_channels": 8},
            "data": {"pictures": 8, "cache": tmp_path_factory.mktemp("cache")},
        }
    )


@pytest.fixture
def objective(config: SmallDecoderConfig) -> SmallDecoderObjective:
    return SmallDecoderObjective(config)


def test_the_laws_of_objectives(objective: SmallDecoderObjective) -> None:
    objective.config = objective.config.model_copy(update={"crop": 32})
    laws.a_batch_is_a_function_of_its_positions(objective)
    laws.everything_trained_has_a_gradient(objective)


def test_crops_and_latents_are_of_one_place(objective: SmallDecoderObjective) -> None:
    """The crop is found in its picture, and its latents in the picture's, eight times smaller."""
    objective.std = torch.zeros_like(objective.std)
    batch = objective.batch(range(6))
    for position, (crop, z) in enumerate(zip(batch["x"], batch["z"], strict=True)):
        picture = to_tensor(World(0)[position].picture)
        with torch.no_grad():
            whole, _ = autoencoder.encode(objective._large[0], picture)
        found = [
            (row, column)
            for row in range(9)
            for column in range(9)
            if torch.equal(picture[0, :, 8 * row :, 8 * column :][:, :64, :64], crop)
        ]
        near = [
            torch.allclose(whole[0, :, row : row + 8, column : column + 8], z, atol=5e-3)
            for row, column in found
        ]
        assert any(near), position  # float16 in the cache


def test_a_sample_is_learnt(objective: SmallDecoderObjective) -> None:
    losses = laws.losses_of_one_batch(objective, n=2, lr=5e-3)
    assert losses[-1] < 0.8 * losses[0]


def test_the_export_opens_in_stock_and_decodes_the_same(
    objective: SmallDecoderObjective, tmp_path: Path
) -> None:
    """Within what 16 bits keep of the weights."""
    objective.export(tmp_path, 0)
    small = AutoencoderTiny.from_pretrained(tmp_path)
    z = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, stock = objective.small.decode(z).sample, small.decode(z).sample
        assert torch.equal(autoencoder.decode(small, z), stock)
    assert ours.shape == (1, 3, 32, 32)
    torch.testing.assert_close(ours, stock, rtol=0, atol=0.02)
    assert next(objective.small.parameters()).dtype == torch.float32


def test_measures_say_both_decoders(objective: SmallDecoderObjective) -> None:
    measures = objective.validate()
    assert measures == objective.validate()
    assert measures["loss"] == -measures["psnr"]
    assert measures["psnr"] != measures["psnr_of_the_large_one"]


def test_the_shape_that_is_shipped_decodes_and_encodes() -> None:
    """The tests' own shape is smaller: this one is trained."""
    small = small_autoencoder(SmallDecoderSettings(), 4)
    z = torch.zeros(1, 4, 2, 2)
    assert small.decode(z).sample.shape == (1, 3, 16, 16)
    assert small.encode(small.decode(z).sample).latents.shape == z.shape
    assert 0.25e6 < sum(p.numel() for p in small.parameters()) < 0.35e6


def test_a_missing_autoencoder_is_named(config: SmallDecoderConfig) -> None:
    with pytest.raises(UserError, match="nowhere is missing; train it first"):
        SmallDecoderObjective(config.model_copy(update={"autoencoder": Path("nowhere")}))
