"""Pictures to latents and back, in the latents' own units.

Legend
    images   [B, 3, H, W] in [-1, 1]
    z        latents [B, C, H/f, W/f], scaled by the autoencoder's `scaling_factor` so that their
             spread is about 1
    mean, std   of the encoder's Gaussian over z; a sample is mean + std n
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL
from torch import Tensor


def encode(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, std) of the latents of `images`, each [B, C, H/f, W/f], scaled."""
    gaussian = vae.encode(images).latent_dist
    scale = vae.config.scaling_factor
    return gaussian.mean * scale, gaussian.std * scale


def decode(
    vae: AutoencoderKL,
    z: Tensor,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Images [B, 3, H, W], nominally in [-1, 1], not clamped.

    `generator` reaches decoders that draw noise; the ordinary one ignores it.
    """
    pictures: Tensor = vae.decode(
        z / vae.config.scaling_factor, return_dict=False, generator=generator
    )[0]
    return pictures


def downscale(vae: AutoencoderKL | None) -> int:
    """f, how many pixels a latent spans on each side; 8 where there is no autoencoder."""
    return 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 8
