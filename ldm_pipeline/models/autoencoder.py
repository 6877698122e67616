"""Pictures to latents and back, in the latents' own units.

Two kinds of autoencoder do this: AutoencoderKL, whose encoder says a Gaussian, and the small
AutoencoderTiny (as TAESD is built), whose encoder says one thing and draws no noise.

Legend
    images   [B, 3, H, W] in [-1, 1]
    z        latents [B, C, H/f, W/f], shifted and scaled as the autoencoder's configuration says,
             so that their spread is about 1
    mean, std   of the encoder's Gaussian over z; a sample is mean + std n
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from ldm_pipeline.diffusion.noise import Noise
from ldm_pipeline.models.precision import finite

Autoencoder: TypeAlias = AutoencoderKL | AutoencoderTiny


def encode(vae: Autoencoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, std) of the latents of `images`, each [B, C, H/f, W/f], scaled; std 0 where the
    encoder draws no noise."""
    mean, std = _said(vae, images)
    middle, spread = _units(vae, images)
    scale = vae.config.scaling_factor / spread
    return (mean - middle) * scale, torch.zeros_like(mean) if std is None else std * scale


def sample(
    vae: Autoencoder, images: Tensor, rows: int, noise: Noise, *, singly: bool = False
) -> Tensor:
    """Latents [rows, C, H/f, W/f] of `images` [N, …], dealt out in turn, each drawn by `noise`.

    With `singly` the images are encoded one at a time, so that none depends on its neighbours by
    the rounding of a larger batch. The order of operations is that of stock pipelines, and where
    the encoder draws no noise, none of `noise` is used up.
    """
    parts = [_said(vae, part) for part in images.split(1 if singly else rows)]
    raw = tiled(torch.cat([mean for mean, _ in parts]), rows)
    spreads = [std for _, std in parts if std is not None]
    if spreads:
        raw = raw + tiled(torch.cat(spreads), rows) * noise.like(raw)
    middle, spread = _units(vae, images)
    z: Tensor = (raw - middle) * (vae.config.scaling_factor / spread)
    return z


@contextmanager
def quick(vae: Autoencoder, precision: str) -> Iterator[None]:
    """Within the block an autoencoder answers as quickly as a run's `precision` lets it.

    The channels of a place lie side by side in memory, as processors convolve them more quickly:
    answers differ by some 1e-4 of their spread, less than the caches' float16 rounds. With "bf16"
    it computes in bfloat16, as stock scripts let it: some 5e-3 of the spread. (88 and 280
    pictures of 128 x 128 a second instead of 55, on 2 cores.)
    """
    vae.to(memory_format=torch.channels_last)
    try:
        with torch.autocast(vae.device.type, torch.bfloat16, precision == "bf16"):
            yield
    finally:
        vae.to(memory_format=torch.contiguous_format)


def encoder_weights(vae: AutoencoderKL) -> dict[str, Tensor]:
    """The weights that decide what a picture's latents are; a decoder may be trained on."""
    return {
        name: tensor
        for name, tensor in vae.state_dict().items()
        if not name.startswith(("decoder.", "post_quant_conv."))
    }


def draws_noise(vae: Autoencoder) -> bool:
    """Whether the latents of a picture are drawn, and not said."""
    return not isinstance(vae, AutoencoderTiny)


def _said(vae: Autoencoder, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Raw mean and std of the latents of `images`; no std where the encoder draws no noise."""
    if not draws_noise(vae):
        return finite(vae, images, lambda vae, x: vae.encode(x).latents), None
    told = finite(vae, images, lambda vae, x: vae.encode(x).latent_dist.parameters)
    gaussian = DiagonalGaussianDistribution(told)
    return gaussian.mean, gaussian.std


def tiled(rows: Tensor, count: int) -> Tensor:
    """`rows` [N, …] dealt out in turn until there are `count`, a multiple of N; their layout in
    memory stays."""
    return torch.cat([rows] * (count // rows.shape[0]))


def decode(
    vae: Autoencoder,
    z: Tensor,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Images [B, 3, H, W], nominally in [-1, 1], not clamped.

    `generator` reaches decoders that draw noise; the ordinary one ignores it.
    """
    raw = unscaled(vae, z)
    return finite(vae, raw, lambda vae, z: vae.decode(z, return_dict=False, generator=generator)[0])


def unscaled(vae: Autoencoder, z: Tensor) -> Tensor:
    """z in the decoder's own units."""
    middle, spread = _units(vae, z)
    raw: Tensor = z * spread / vae.config.scaling_factor + middle
    return raw


def _units(vae: Autoencoder, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """What one subtracts from raw latents and divides them by, besides the `scaling_factor`.

    0 and 1 for most; some SDXL autoencoders have `latents_mean` and `latents_std` of each channel,
    others a `shift_factor`.
    """
    config = vae.config
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None or std is None:
        return getattr(config, "shift_factor", None) or 0.0, 1.0
    middle, spread = (like.new_tensor(each)[None, :, None, None] for each in (mean, std))
    return middle, spread


def downscale(vae: Autoencoder | None) -> int:
    """f, how many pixels a latent spans on each side; 8 where there is no autoencoder."""
    return 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 8
