"""Where the noise of a run comes from: seeds, generators, or torch's own.

With a seed or a generator for each image, an image is the same picture whatever the batch. With
one generator, or none, the whole batch is drawn from one stream, as stock pipelines do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm_pipeline.diffusion.noise import Noise


@dataclass(frozen=True)
class SharedNoise(Noise):
    """Noise for `count` images out of one generator: an image depends on the batch it is in."""

    count: int = 1

    def __len__(self) -> int:
        return self.count

    def draw(
        self,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Unit Gaussian noise [count, *shape], where `shape` is that of one image, [C, h, w]."""
        one = self.generators[0]
        drawn = torch.randn((self.count, *shape), generator=one, dtype=dtype, device=one.device)
        return drawn.to(device)


def batch_noise(
    sources: Sequence[int] | Sequence[torch.Generator] | torch.Generator | None,
    count: int,
    device: torch.device,
) -> Noise:
    """The noise of `count` images from seeds, generators, one generator, or (None) torch's own."""
    if isinstance(sources, Sequence):
        return Noise.of(sources)
    return SharedNoise((sources if sources is not None else torchs_own(device),), count)


def first_rows(noise: Noise, count: int) -> Noise:
    """The same source for `count` rows: from the one generator, or from the first `count`."""
    if isinstance(noise, SharedNoise):
        return replace(noise, count=count)
    return Noise(noise.generators[:count])


def torchs_own(device: torch.device) -> torch.Generator:
    """The generator that `torch.manual_seed` seeds, of a CUDA device or else of the CPU."""
    if device.type == "cuda":
        torch.cuda.init()
        index = device.index if device.index is not None else torch.cuda.current_device()
        return torch.cuda.default_generators[index]
    return torch.default_generator
