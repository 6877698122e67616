"""Laws of the noise source: one generator per image, the draws of stock pipelines."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm_pipeline.diffusion import Noise, coarse_noise
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


SIDE = 32


def coarse(n: int, **told: float) -> Tensor:
    """`n` draws of training noise, [n, 4, SIDE, SIDE]."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([coarse_noise((4, SIDE, SIDE), generator, **told) for _ in range(n)])


def test_plain_training_noise_is_the_generators() -> None:
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(coarse(1)[0], torch.randn((1, 4, SIDE, SIDE), generator=generator)[0])


def test_offset_noise_moves_the_mean_of_a_channel_and_nothing_else() -> None:
    """Over 1600 channels: their means have variance s² + 1/1024, their insides variance 1."""
    noise = coarse(400, offset=0.5)
    means = noise.mean(dim=(2, 3))
    # 4 standard errors of a variance of 1600: 4 sqrt(2/1600) = 14 %.
    assert float(means.var()) == pytest.approx(0.25 + 1 / SIDE**2, rel=0.14)
    inside = (noise - means[:, :, None, None]).var(dim=(2, 3), correction=1)
    assert float(inside.mean()) == pytest.approx(1.0, rel=0.01)  # 4 sqrt(2 / 1.6 million)


def test_pyramid_noise_has_unit_variance_and_grows_coarse() -> None:
    """Neighbours have more in common the higher the discount; without one, nothing."""
    alike = []
    for discount in (0.0, 0.3, 0.6, 0.9):
        noise = coarse(50, pyramid=discount)
        # Without a discount it is plain noise, of variance 1 on average only.
        assert noise.std(dim=(1, 2, 3)).tolist() == pytest.approx([1.0] * 50, abs=0.06)
        alike.append(float((noise[..., 1:] * noise[..., :-1]).mean()))
    assert abs(alike[0]) < 4 / noise.numel() ** 0.5  # 4 standard errors
    assert alike == sorted(alike)
    assert alike[1] > 0.02
