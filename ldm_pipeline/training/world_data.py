"""The picture world as the trainers read it: samples by position, drawn afresh, as tensors.

Legend: a position counts the samples of a run from 0; training sees sample `position` of the
world's "train" split, so no picture comes twice.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ldm_pipeline.data.world import World
from ldm_pipeline.training.config import NonNegative, Settings


class WorldSettings(Settings):
    """Which world the samples come from."""

    seed: NonNegative = 0


def as_tensor(pictures: list[np.ndarray]) -> Tensor:
    """uint8 pictures [H, W, 3] as one float tensor [B, 3, H, W] in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return stacked.float() / 127.5 - 1.0


def fresh_pictures(n: int, seed: int = 0) -> Tensor:
    """The first `n` pictures of the "test" split, [n, 3, 128, 128] in [-1, 1]."""
    world = World(seed, "test")
    return as_tensor([world[i].picture for i in range(n)])


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
