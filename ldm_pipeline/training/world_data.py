"""The picture world as the trainers read it: samples by position, drawn afresh, as tensors.

Legend: a position counts the samples of a run from 0; training sees sample `position` of the
world's "train" split, so no picture comes twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ldm_pipeline.data.cache import Cache, Entry, Share, fill, key_of
from ldm_pipeline.data.world import World, caption_of, held_out_caption
from ldm_pipeline.images import to_tensor
from ldm_pipeline.models import autoencoder
from ldm_pipeline.too_large import in_memory
from ldm_pipeline.training.config import NonNegative, Positive, Settings


class WorldSettings(Settings):
    """Which world the samples come from."""

    seed: NonNegative = 0


class CachedWorldSettings(WorldSettings):
    """Which pictures are encoded, and where their latents are kept."""

    pictures: Positive = 32_000
    cache: Path = Path("cache")


def fresh_pictures(n: int, seed: int = 0) -> Tensor:
    """The first `n` pictures of the "test" split, [n, 3, 128, 128] in [-1, 1]."""
    world = World(seed, "test")
    return to_tensor(np.stack([world[i].picture for i in range(n)]))


def noise_of(positions: range, shape: tuple[int, ...], seed: int) -> Tensor:
    """Unit Gaussian noise [B, *shape] that depends on (seed, position) alone.

    torch's CPU generator reads 32 bits of its seed; an odd factor spreads seeds over all of them.
    """
    generator = torch.Generator()
    rows = []
    for position in positions:
        generator.manual_seed((position + seed * 0x9E3779B1) % 2**32)
        rows.append(torch.randn(shape, generator=generator))
    return torch.stack(rows)


def fresh_caption(world: World, index: int, rng: np.random.Generator) -> str:
    """A new wording of picture `index`, none of the held-out ones."""
    scene, _, caption = world.told(index)
    worded = caption_of(scene, rng, held_out=False)
    chosen = worded[1] if worded is not None else caption
    assert not held_out_caption(chosen)
    return chosen


def key_at(index: int, split: str = "train") -> str:
    """The key of picture `index` in a cache of latents."""
    return f"{index:08d}" if split == "train" else f"{split} {index:08d}"


def cached_latents(
    settings: CachedWorldSettings,
    vae: AutoencoderKL,
    precision: str,
    share: Share,
    held_out: int = 0,
) -> Cache:
    """Mean and std of the latents of the train split's first `settings.pictures` and the test
    split's first `held_out` pictures, under `key_at`: scaled to unit variance, float16.

    The autoencoder stays where it is, and computes in bfloat16 where `precision` is "bf16".
    """
    places = [(World(settings.seed), i) for i in range(settings.pictures)]
    places += [(World(settings.seed, "test"), i) for i in range(held_out)]

    @in_memory("while pictures were encoded")
    @torch.no_grad()
    def encode(indices: Sequence[int]) -> list[Entry]:
        told = (places[i] for i in indices)
        pictures = np.stack([world[index].picture for world, index in told])
        mean, std = autoencoder.encode(vae, to_tensor(pictures).to(vae.device))
        halves = zip(mean.half().cpu(), std.half().cpu(), strict=True)
        return [{"mean": m, "std": s} for m, s in halves]

    facts = vae.config.scaling_factor, precision, "world", settings.seed
    cache = Cache(settings.cache / key_of(autoencoder.encoder_weights(vae), *facts))
    with autoencoder.quick(vae, precision):
        fill(cache, [key_at(index, world.split) for world, index in places], encode, share)
    return cache
