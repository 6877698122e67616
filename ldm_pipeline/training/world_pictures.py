"""The picture world as an adapter is trained on it: cached latents, as the UNet is trained on them.

Captions are worded anew at each position, so they are no texts that could be cached.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from diffusers import AutoencoderKL
from PIL import Image

from ldm_pipeline.data.buckets import Size, cover
from ldm_pipeline.data.cache import Cache, Share
from ldm_pipeline.data.captioned import Item
from ldm_pipeline.data.order import epoch_order
from ldm_pipeline.data.world import World
from ldm_pipeline.data.world.scene import CANVAS
from ldm_pipeline.training.captioned import Sample
from ldm_pipeline.training.world_data import (
    CachedWorldSettings,
    cached_latents,
    fresh_caption,
    key_at,
)

SIDE = CANVAS
MEASURED = 64
"""So many pictures of the test split a validation looks at."""


@dataclass(frozen=True)
class Rendered:
    """A picture of the world as a source of bytes."""

    world: World
    index: int

    @property
    def name(self) -> str:
        """Which picture of which split."""
        return f"{self.world.split} picture {self.index}"

    def read(self) -> bytes:
        """The picture as PNG."""
        buffer = io.BytesIO()
        Image.fromarray(self.world[self.index].picture).save(buffer, "PNG")
        return buffer.getvalue()


class WorldPictures:
    """The first pictures of the world's "train" split, in shuffled passes; see `Pictures`."""

    def __init__(
        self, settings: CachedWorldSettings, seed: int, batch_size: int, precision: str
    ) -> None:
        """`precision` is what the autoencoder may compute in, "bf16" or another."""
        self.settings, self.seed, self.batch_size = settings, seed, batch_size
        self.precision = precision
        self.samples = [_sample(World(settings.seed), i) for i in range(settings.pictures)]
        self.measured = [_sample(World(settings.seed, "test"), i) for i in range(MEASURED)]
        self._order = lru_cache(maxsize=2)(self._order_of)

    @property
    def side(self) -> int:
        """Of a picture, in pixels."""
        return SIDE

    @property
    def sizes(self) -> list[Size]:
        """The one size."""
        return [(SIDE, SIDE)]

    @property
    def cache(self) -> Path:
        """The folder of what is encoded once."""
        return self.settings.cache

    def sample(self, position: int) -> Sample:
        """The sample at a position of the run."""
        epoch, place = divmod(position, len(self.samples))
        return self.samples[self._order(epoch)[place]]

    def words(self, sample: Sample, rng: np.random.Generator) -> str:
        """A new wording of what a sample shows."""
        return fresh_caption(*_place(sample), rng)

    def caption(self, sample: Sample) -> str:
        """The caption that the world tells with a sample."""
        world, index = _place(sample)
        return world.told(index)[2]

    def texts(self) -> None:
        """Too many to be cached."""
        return

    def latents(self, vae: AutoencoderKL, share: Share) -> Cache:
        """Mean and std of every picture's latents, encoded where they are not in the cache."""
        return cached_latents(self.settings, vae, self.precision, share, held_out=MEASURED)

    def _order_of(self, epoch: int) -> np.ndarray:
        return epoch_order([0] * len(self.samples), self.batch_size, epoch, self.seed)


def _sample(world: World, index: int) -> Sample:
    key = key_at(index, world.split)
    return Sample(Item(key, Rendered(world, index)), cover((SIDE, SIDE), (SIDE, SIDE)), key)


def _place(sample: Sample) -> tuple[World, int]:
    """Where in the world a sample is."""
    picture = sample.item.picture
    assert isinstance(picture, Rendered)
    return picture.world, picture.index
