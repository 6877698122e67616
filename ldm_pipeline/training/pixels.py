"""A task beside the denoising: the error of x0 in pixels, as a small decoder shows it.

The latents of an autoencoder do not all say as much: an error that nobody sees costs the denoising
loss as much as one that smears a part into the next. Through the decoder each counts for what it
changes in the picture (2411.04873 compares features of the decoder instead). Of each sample one
quarter is decoded, any of the four, so that the task adds a fifteenth to a step.

Legend
    z        latents [B, C, h, w], in the UNet's units
    corner   which quarter, [B, 2]: 0 or 1 for the upper or lower half, the left or right one
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from ldm_pipeline.models import autoencoder, small_decoder
from ldm_pipeline.processes.ranks import launched
from ldm_pipeline.training.config import NonNegativeFloat, Settings


class PixelSettings(Settings):
    """A task beside the one in latents: the error in pixels."""

    weight: NonNegativeFloat = Field(default=0.0, description="of it, beside the loss in latents")
    decoder: str | None = Field(
        default=None,
        description="folder of an AutoencoderTiny for these latents; small is the bundled model's",
    )

    @model_validator(mode="after")
    def _decodes(self) -> PixelSettings:
        if self.weight and self.decoder is None:
            raise ValueError(f"weight={self.weight} needs a decoder; name its folder")
        return self


class Quarters:
    """Quarters of latents as a small decoder shows them; the decoder itself is not trained."""

    def __init__(self, settings: PixelSettings, unet: Any, of_bundled: bool = False) -> None:
        """UserError where the decoder is not there, or not for latents of `unet`."""
        assert settings.decoder is not None
        place = small_decoder.find(settings.decoder, of_bundled)
        small = small_decoder.opened(place, torch.float32)
        small_decoder.check_fits(small, unet)
        self._small = small.requires_grad_(False).to(launched().device)

    def __call__(self, z: Tensor, corner: Tensor) -> Tensor:
        """Pixels [B, 3, …] in [-1, 1]; they have z's gradient."""
        raw = autoencoder.unscaled(self._small, quarter(z, corner))
        shown: Tensor = self._small.decoder(raw)
        return shown.float()


def a_corner(rng: np.random.Generator) -> Tensor:
    """Any of the four quarters, [2]."""
    return torch.from_numpy(rng.integers(0, 2, size=2))


def quarter(z: Tensor, corner: Tensor) -> Tensor:
    """A quarter of each sample, [B, C, ⌈h/2⌉, ⌈w/2⌉]: quarters of odd sides share their middle."""
    row, column = (
        corner[:, i, None] * (side // 2) + torch.arange(side - side // 2, device=z.device)
        for i, side in enumerate(z.shape[2:])
    )
    sample = torch.arange(len(z), device=z.device)[:, None, None]
    return z[sample, :, row[:, :, None], column[:, None, :]].permute(0, 3, 1, 2)
