"""A task beside the denoising: the error of x0 in pixels, as a small decoder shows it.

The latents of an autoencoder do not all say as much: an error that nobody sees costs the denoising
loss as much as one that smears a part into the next. Through the decoder each counts for what it
changes in the picture (2411.04873 compares features of the decoder instead). Of each sample one
window is decoded, a quarter of its latents, so that the task takes a tenth of a step and not half.

Legend
    z, x0    clean latents and what the network believes of them, [B, C, h, w], in the UNet's units
    corner   the window's upper left latent, [B, 2], rows first
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from ldm_pipeline.errors import UserError

MOST_SNR = 10.0
"""An error of x0 weighs its level's signal-to-noise ratio, capped here (as 2303.09556 does)."""


class PixelLoss:
    """The mean squared error of the pictures of x0 and z, in [-1, 1], level by level.

    The decoder stays as it is on `device`. Raises UserError where `folder` holds no AutoencoderTiny
    or one for latents of other `channels`.
    """

    def __init__(self, folder: Path, channels: int, device: torch.device) -> None:
        try:
            small = AutoencoderTiny.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(f"pixels.decoder: {folder} holds no small decoder ({error})") from error
        if small.config.latent_channels != channels:
            raise UserError(
                f"pixels.decoder: {folder} decodes latents of {small.config.latent_channels} "
                f"channels; the autoencoder's have {channels}"
            )
        self._scale: float = small.config.scaling_factor
        self._decoder = small.decoder.requires_grad_(False).to(device)

    def __call__(self, z: Tensor, x0: Tensor, snr: Tensor, corner: Tensor) -> Tensor:
        """A scalar; snr is [B]."""
        with torch.no_grad():
            truth = self._decoder(window(z, corner) / self._scale)
        shown = self._decoder(window(x0, corner) / self._scale)
        errors = (shown - truth).float().square().flatten(1).mean(dim=1)
        return (snr.clamp(max=MOST_SNR) * errors).mean()


def a_corner(rng: np.random.Generator, side: int) -> list[int]:
    """Where a window of latents of `side` x `side` begins."""
    return rng.integers(0, side - side // 2 + 1, size=2).tolist()


def window(z: Tensor, corner: Tensor) -> Tensor:
    """A window of half of each side, [B, C, h/2, w/2], of each sample's own corner."""
    row, column = (
        corner[:, i, None] + torch.arange(side // 2, device=z.device)
        for i, side in enumerate(z.shape[2:])
    )
    sample = torch.arange(len(z), device=z.device)[:, None, None]
    return z[sample, :, row[:, :, None], column[:, None, :]].permute(0, 3, 1, 2)
