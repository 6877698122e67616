"""Randomness as an argument: one CPU generator per image.

Image i of a batch draws from its own generator, one image at a time, so that it is the same picture
whatever stands beside it, on any device, and the same as stock pipelines draw from such a list.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_pipeline.errors import UserError


@dataclass(frozen=True)
class Noise:
    """The noise source of one run: a generator per image. Drawing advances the generators."""

    generators: tuple[torch.Generator, ...]

    def __post_init__(self) -> None:
        if not self.generators:
            raise UserError("a batch needs at least one generator")
        if len({id(generator) for generator in self.generators}) < len(self.generators):
            raise UserError("each image needs a generator of its own; one was passed twice")

    @classmethod
    def of(cls, sources: Iterable[int | torch.Generator]) -> Noise:
        """A source from one seed or generator per image; an int seeds a fresh CPU generator."""
        return cls(tuple(seeded(source) for source in sources))

    def __len__(self) -> int:
        return len(self.generators)

    def draw(
        self,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Unit Gaussian noise [B, *shape], where `shape` is that of one image, [C, h, w]."""
        rows = [
            torch.randn((1, *shape), generator=generator, dtype=dtype, device=generator.device)
            for generator in self.generators
        ]
        return torch.cat(rows).to(device)

    def like(self, x: Tensor) -> Tensor:
        """Noise in the shape, dtype and place of x [B, C, h, w]."""
        assert x.shape[0] == len(self), f"{x.shape[0]} images but {len(self)} generators"
        return self.draw(x.shape[1:], x.dtype, x.device)


def seeded(source: int | torch.Generator) -> torch.Generator:
    """A CPU generator for a seed (any integer from -2⁶³ to 2⁶⁴-1); generators pass through."""
    if isinstance(source, torch.Generator):
        return source
    try:
        return torch.Generator().manual_seed(operator.index(source))
    except (RuntimeError, ValueError, OverflowError, TypeError):
        raise UserError(f"seed={source!r} must be an integer between -2**63 and 2**64-1") from None


def coarse_noise(
    shape: Sequence[int], generator: torch.Generator, offset: float = 0.0, pyramid: float = 0.0
) -> Tensor:
    """Training noise [C, h, w] with more than its share of coarse structure.

    `offset` s adds s times one number per channel: the mean of a picture is then noised as well,
    and very dark or light ones can be learnt (N. Guttenberg, "Diffusion with offset noise", 2023).
    `pyramid` d adds noise at half, a quarter, … of the size, enlarged, times d, d², …, and scales
    the sum to unit variance (J. Whitaker, "Multi-resolution noise", 2023). 0 leaves either out.
    """
    channels, height, width = shape
    eps = torch.randn((1, *shape), generator=generator)
    factor, h, w = 1.0, height, width
    while pyramid and (h > 1 or w > 1):
        h, w, factor = max(1, h // 2), max(1, w // 2), factor * pyramid
        level = torch.randn((1, channels, h, w), generator=generator)
        eps = eps + factor * F.interpolate(level, size=(height, width), mode="bilinear")
    if pyramid:
        eps = eps / eps.std()
    if offset:
        eps = eps + offset * torch.randn((1, channels, 1, 1), generator=generator)
    return eps[0]
