"""Laws of the noise source: one generator per image, the draws of stock pipelines."""

from __future__ import annotations

import pytest
import torch

from ldm_pipeline.diffusion import Noise
from ldm_pipeline.errors import UserError

SHAPE = (4, 5, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 3])
def test_draws_are_those_of_stock_pipelines(size: int, dtype: torch.dtype) -> None:
    from diffusers.utils.torch_utils import randn_tensor

    theirs = [torch.Generator().manual_seed(i) for i in range(size)]
    ours = Noise.of(range(size))
    for _ in range(2):  # the second draw goes on where the first stopped
        wanted = randn_tensor((size, *SHAPE), generator=theirs, dtype=dtype)
        assert torch.equal(ours.draw(SHAPE, dtype), wanted)


def test_an_image_draws_the_same_alone() -> None:
    batch = Noise.of([3, 4, 5])
    alone = Noise.of([4])
    for _ in range(2):
        assert torch.equal(batch.draw(SHAPE)[1], alone.draw(SHAPE)[0])


def test_noise_like_a_tensor() -> None:
    x = torch.zeros(2, *SHAPE, dtype=torch.float64)
    drawn = Noise.of([1, 2]).like(x)
    assert (drawn.shape, drawn.dtype, drawn.device) == (x.shape, x.dtype, x.device)
    with pytest.raises(AssertionError, match="2 images but 1 generators"):
        Noise.of([1]).like(x)


def test_generators_pass_through() -> None:
    generator = torch.Generator().manual_seed(9)
    assert Noise.of([generator]).generators[0] is generator


def test_mistakes_are_named() -> None:
    generator = torch.Generator()
    with pytest.raises(UserError, match="passed twice"):
        Noise.of([generator, generator])
    with pytest.raises(UserError, match="at least one"):
        Noise.of([])
    for seed in (2**70, 1.5, "7"):
        with pytest.raises(UserError, match="seed="):
            Noise.of([seed])  # type: ignore[list-item]  # what a caller without types may pass
