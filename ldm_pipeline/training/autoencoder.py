"""Training of the autoencoder that gives the latents Z: AutoencoderKL, 8 x down, 4 channels.

Legend
    x, y     picture and its reconstruction, [B, 3, H, W] in [-1, 1]
    z        latent, [B, 4, H/8, W/8], drawn from N(mean, std²) as the encoder says
    extra    more noise on z, for a decoder that bears latents which a denoiser made

The loss is L1 + L1 of the differences between neighbouring pixels (edges) + MSE + a small KL term
that keeps Z near a unit Gaussian (2112.10752, section 3.1, without the adversarial part: drawn
shapes have no texture to invent).

The KL term leaves the encoder's std at less than a hundredth of the latents' own spread. A decoder
that never saw more turns the small errors of a denoised latent into lumpy outlines; `latent_noise`
shows it errors of that size while the picture stays the same (as in 2510.11690).
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import torch
from diffusers import AutoencoderKL
from pydantic import Field, model_validator
from torch import Tensor, nn

from ldm_pipeline.data.world import Scene, World
from ldm_pipeline.errors import UserError
from ldm_pipeline.images import psnr, to_tensor
from ldm_pipeline.training.config import (
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    Settings,
    ShapeSettings,
    TrainingConfig,
    must_divide,
)
from ldm_pipeline.training.objective import Batch
from ldm_pipeline.training.start import take_weights
from ldm_pipeline.training.world_data import WorldSettings, fresh_pictures, noise_of

Crop = Annotated[int, Field(gt=0, le=128, multiple_of=8)]


class AutoencoderSettings(ShapeSettings):
    """The shape of the network: four levels, each but the last halves the sides."""

    channels: tuple[Positive, Positive, Positive, Positive] = (32, 64, 96, 128)
    layers_per_block: Positive = 1
    latent_channels: Positive = 4
    norm_groups: Positive = 4

    @model_validator(mode="after")
    def _fits(self) -> Self:
        must_divide("norm_groups", self.norm_groups, channels=self.channels)
        return self


class LikenessSettings(Settings):
    """The weights of what makes one picture unlike another."""

    l1: NonNegativeFloat = 1.0
    edges: NonNegativeFloat = 1.0
    mse: NonNegativeFloat = 1.0

    def likeness(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum for reconstructions y of x, a scalar, and the terms worth a look."""
        error = y - x
        l1, mse = error.abs().mean(), error.square().mean()
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        return self.l1 * l1 + self.edges * edges + self.mse * mse, {"l1": l1, "edges": edges}


class AutoencoderLossSettings(LikenessSettings):
    """The weights of the loss terms."""

    kl: NonNegativeFloat = 1e-4


class AutoencoderConfig(TrainingConfig):
    """Everything that `train/train_autoencoder.py` reads."""

    model: AutoencoderSettings = AutoencoderSettings()
    loss: AutoencoderLossSettings = AutoencoderLossSettings()
    data: WorldSettings = WorldSettings()
    crop: Crop = 64
    first_crop: Crop = 32
    first_steps: NonNegative = Field(
        default=0, description="so many steps on crops of first_crop: colours are soon learnt"
    )
    around_things: Fraction = Field(
        default=0.75, description="share of crops that hold a thing: plain ground is soon learnt"
    )
    decoder_only: bool = Field(
        default=False,
        description="leave the encoder as begin_from has it, and so the latents what they are",
    )

    latent_noise: NonNegativeFloat = Field(
        default=0.0,
        description="the decoder bears noise up to this share of the latents' spread",
    )

    def kept_on_resume(self) -> Collection[str]:
        """Which encoder it is, where that is frozen."""
        return ("decoder_only", "begin_from") if self.decoder_only else ("decoder_only",)

    @model_validator(mode="after")
    def _begun(self) -> Self:
        if self.decoder_only and self.begin_from is None:
            raise ValueError("decoder_only=true needs begin_from: whose latents should it read?")
        return self


class AutoencoderObjective(nn.Module):
    """Reconstruct random crops of freshly drawn pictures."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        torch.manual_seed(config.run.seed)
        levels = len(config.model.channels)
        self.config = config
        self.world = World(config.data.seed)
        self.vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=config.model.channels,
            layers_per_block=config.model.layers_per_block,
            latent_channels=config.model.latent_channels,
            norm_num_groups=config.model.norm_groups,
            mid_block_add_attention=False,
            sample_size=128,
        )
        if config.begin_from is None:
            _begin_well(self.vae)
        else:
            take_weights(self.vae, config.begin_from)
        if config.decoder_only:
            assert config.begin_from is not None
            self.vae.register_to_config(**_units(config.begin_from))
            for part in (self.vae.encoder, self.vae.quant_conv):
                part.requires_grad_(False)

    def batch(self, positions: range) -> Batch:
        """Random crops [B, 3, crop, crop], and for each the latent noise and, where some is asked
        for, the extra, in units of the latents' spread."""
        config = self.config
        begun = positions.start // config.run.batch_size < config.first_steps
        side = config.first_crop if begun else config.crop
        crops, levels = [], []
        for position in positions:
            sample = self.world[position]
            rng = np.random.default_rng([config.run.seed, position])
            top, left = corner_of(sample.scene, side, config.around_things, rng)
            crops.append(sample.picture[top : top + side, left : left + side])
            levels.append(config.latent_noise * rng.random())
        latent = (config.model.latent_channels, side // 8, side // 8)
        batch = {
            "x": to_tensor(np.stack(crops)),
            "noise": noise_of(positions, latent, config.run.seed),
        }
        if config.latent_noise:
            extra = noise_of(positions, latent, config.run.seed + 1)
            batch["extra"] = torch.tensor(levels).view(-1, 1, 1, 1) * extra
        return batch

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The weighted loss and its terms."""
        x, weights = batch["x"], self.config.loss
        posterior = self.vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * batch["noise"]
        if "extra" in batch:
            z = z + posterior.mean.detach().std() * batch["extra"]
        y = self.vae.decode(z).sample.float()
        likeness, terms = weights.likeness(x, y)
        kl = posterior.kl().mean() / z[0].numel()
        return {"loss": likeness + weights.kl * kl, **terms, "kl": kl}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """PSNR in dB (mean over 64 whole pictures of the test split), and the latents' spread."""
        x = fresh_pictures(64)
        device = next(self.vae.parameters()).device
        values, latents = [], []
        noise = torch.Generator().manual_seed(0)
        for part in x.split(16):
            posterior = self.vae.encode(part.to(device)).latent_dist
            y = self.vae.decode(posterior.mean).sample.clamp(-1, 1).cpu()
            values.append(psnr(part, y))
            latents.append(posterior.sample(noise).cpu())
        return {
            "psnr": float(torch.cat(values).mean()),
            "latent_std": float(torch.cat(latents).std()),
        }

    @torch.no_grad()
    def export(self, folder: Path, updates: int) -> None:
        """Write the autoencoder; its scaling factor gives latents of unit variance, and stays what
        it was where they are kept."""
        if not self.config.decoder_only:
            scale = 1.0 / self.validate()["latent_std"]
            self.vae.register_to_config(scaling_factor=round(scale, 5))
        self.vae.save_pretrained(folder)


def _units(folder: Path) -> dict[str, Any]:
    """How the latents of the autoencoder in `folder` are shifted and scaled, as its config says;
    UserError where it cannot be read."""
    try:
        told = AutoencoderKL.load_config(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"begin_from: {folder} has no config.json that can be read") from error
    names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    return {name: told[name] for name in names if name in told}


def corner_of(
    scene: Scene, side: int, around_things: float, rng: np.random.Generator
) -> tuple[int, int]:
    """(top, left) of a crop of `side` pixels: anywhere, or so that the centre of a thing lies in
    its middle half."""
    room = 128 - side
    top, left = (int(value) for value in rng.integers(0, room + 1, 2))
    if scene.things and rng.random() < around_things:
        thing = scene.things[int(rng.integers(len(scene.things)))]
        off = rng.integers(side // 4, side - side // 4 + 1, 2)
        top = min(room, max(0, int(thing.y) - int(off[0])))
        left = min(room, max(0, int(thing.x) - int(off[1])))
    return top, left


@torch.no_grad()
def _begin_well(vae: AutoencoderKL) -> None:
    """Start where colours pass: torch's own start loses them (loss 0.76, not 0.50, in 300 steps).

    Torch draws filters of variance 1 / (3 inputs) and biases as large; through some ten layers the
    signal shrinks a hundredfold while biases do not, and group norm then sees biases alone. Filters
    of variance 1 / inputs without biases keep the signal. The encoder's std begins at exp(-2).
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.mul_(3**0.5)
            assert module.bias is not None
            module.bias.zero_()
    latent = vae.config.latent_channels
    vae.quant_conv.weight[latent:] = 0.0
    vae.quant_conv.bias[latent:] = -4.0
