"""Training of a small decoder for an autoencoder that stays: AutoencoderTiny, as TAESD is built.

In a few steps without guidance the decoder is much of the work; this one does the same in a
fraction of it. It reads the latents in the UNet's own units, and its encoder writes them.

Legend
    x, y     crop of a picture and what the small decoder makes of it, [B, 3, side, side]
    z        the crop's latents [B, C, side/8, side/8], drawn anew from the large encoder's mean and
             std; the crop is cut from them, so they know what lies around it
    z_hat    what the small encoder says of x
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from pydantic import Field
from torch import Tensor, nn

from ldm_pipeline.data.world import World
from ldm_pipeline.errors import UserError
from ldm_pipeline.images import psnr, to_tensor
from ldm_pipeline.models import autoencoder
from ldm_pipeline.processes.ranks import Ranks, launched
from ldm_pipeline.training.autoencoder import Crop, LikenessSettings, corner_of
from ldm_pipeline.training.config import (
    Fraction,
    NonNegativeFloat,
    Positive,
    ShapeSettings,
    TrainingConfig,
)
from ldm_pipeline.training.halving import halved
from ldm_pipeline.training.objective import Batch
from ldm_pipeline.training.shares import share_of
from ldm_pipeline.training.start import precision, take_weights
from ldm_pipeline.training.world_data import (
    CachedWorldSettings,
    cached_latents,
    fresh_pictures,
    key_at,
    noise_of,
)

PIXELS = 8
"""Of a picture along one latent."""


class SmallDecoderSettings(ShapeSettings):
    """The shape of both halves; blocks level by level from the coarsest (the encoder's turned
    round). Each half has one width: between levels AutoencoderTiny cannot change it."""

    channels: Positive = Field(default=32, description="of every level of the decoder")
    blocks: tuple[Positive, Positive, Positive, Positive] = (3, 2, 1, 1)
    encoder_channels: Positive = Field(default=16, description="of every level of the encoder")


class SmallDecoderLossSettings(LikenessSettings):
    """The weights of the loss terms."""

    latents: NonNegativeFloat = Field(default=1.0, description="of the small encoder's MSE")


class SmallDecoderConfig(TrainingConfig):
    """Everything that `train/train_small_decoder.py` reads."""

    autoencoder: Path = Field(description="folder of the AutoencoderKL whose latents are decoded")
    model: SmallDecoderSettings = SmallDecoderSettings()
    loss: SmallDecoderLossSettings = SmallDecoderLossSettings()
    data: CachedWorldSettings = CachedWorldSettings()
    crop: Crop = 64
    around_things: Fraction = Field(default=0.75, description="share of crops that hold a thing")

    def kept_on_resume(self) -> Collection[str]:
        """Whose latents it reads."""
        return ("autoencoder",)


def small_autoencoder(model: SmallDecoderSettings, latent_channels: int) -> AutoencoderTiny:
    """An untrained one, which reads latents in the UNet's own units."""
    return AutoencoderTiny(
        encoder_block_out_channels=(model.encoder_channels,) * 4,
        decoder_block_out_channels=(model.channels,) * 4,
        num_encoder_blocks=model.blocks[::-1],
        num_decoder_blocks=model.blocks,
        latent_channels=latent_channels,
        scaling_factor=1.0,
    )


class SmallDecoderObjective(nn.Module):
    """Make of latents what the large decoder was made to make: the picture."""

    def __init__(self, config: SmallDecoderConfig) -> None:
        super().__init__()
        if not config.autoencoder.is_dir():
            raise UserError(f"{config.autoencoder} is missing; train it first")
        torch.manual_seed(config.run.seed)
        self.config = config
        self.world = World(config.data.seed)
        large = AutoencoderKL.from_pretrained(config.autoencoder)
        self._large = [large]  # in a list: not trained
        model = config.model
        self.small = small_autoencoder(model, large.config.latent_channels)
        if config.begin_from is not None:
            take_weights(self.small, config.begin_from)
        data = config.data
        computed_in = precision(config.run.mixed_precision)
        share = share_of(Ranks(launched()))
        cache = cached_latents(data, large.to(launched().device), computed_in, share)
        entries = [cache[key_at(index)] for index in range(data.pictures)]
        self.mean, self.std = (torch.stack([e[name] for e in entries]) for name in ("mean", "std"))

    def batch(self, positions: range) -> Batch:
        """Crops [B, 3, crop, crop] of the cached pictures, and their latents."""
        config, side = self.config, self.config.crop
        crops, cut = [], []
        for position in positions:
            index = position % config.data.pictures
            sample = self.world[index]
            rng = np.random.default_rng([config.run.seed, position])
            top, left = corner_of(sample.scene, side, config.around_things, rng)
            row, column, length = top // PIXELS, left // PIXELS, side // PIXELS
            crops.append(sample.picture[PIXELS * row :, PIXELS * column :][:side, :side])
            places = (..., slice(row, row + length), slice(column, column + length))
            cut.append(torch.stack([self.mean[index][places], self.std[index][places]]))
        mean, std = torch.stack(cut).float().unbind(1)
        noise = noise_of(positions, tuple(mean.shape[1:]), config.run.seed)
        return {"x": to_tensor(np.stack(crops)), "z": mean + std * noise}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The weighted loss and its terms."""
        x, z, weights = batch["x"], batch["z"], self.config.loss
        y = self.small.decode(z).sample.float()
        z_hat = self.small.encode(x).latents.float()
        likeness, terms = weights.likeness(x, y)
        latents = (z_hat - z).square().mean()
        return {"loss": likeness + weights.latents * latents, **terms, "latents": latents}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """PSNR in dB of both decoders on the same latents of 64 whole pictures of the test split.

        `loss` is the small one's, negative, so that the best is the least.
        """
        device = next(self.small.parameters()).device
        large = self._large[0].to(device)
        small_psnr, large_psnr = [], []
        for x in fresh_pictures(64).split(16):
            z, _ = autoencoder.encode(large, x.to(device))
            small_psnr.append(psnr(x, self.small.decode(z).sample.clamp(-1, 1).float().cpu()))
            large_psnr.append(psnr(x, autoencoder.decode(large, z).clamp(-1, 1).float().cpu()))
        own, full = (float(torch.cat(each).mean()) for each in (small_psnr, large_psnr))
        return {"loss": -own, "psnr": own, "psnr_of_the_large_one": full}

    def export(self, folder: Path, updates: int) -> None:
        """Write the small autoencoder in Diffusers layout, in 16 bits."""
        halved(self.small).save_pretrained(folder)
