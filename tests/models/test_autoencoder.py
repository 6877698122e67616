"""Pictures to latents and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ldm_pipeline.diffusion import Noise
from ldm_pipeline.models.autoencoder import decode, downscale, encode, quick, sample, tiled


def test_encode_gives_the_gaussian_in_latent_units(components: dict[str, Any]) -> None:
    """mean + std n is what the autoencoder's own sampling gives, scaled."""
    vae = components["vae"]
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean, std = encode(vae, images)
    assert mean.shape == std.shape == (2, 4, 16, 16)
    assert (std > 0).all()
    n = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
    sampled = vae.encode(images).latent_dist.sample(torch.Generator().manual_seed(5))
    # The factor is multiplied in before or after the sum: a rounding of float32 apart.
    assert torch.allclose(mean + std * n, sampled * vae.config.scaling_factor, atol=1e-6)


@torch.no_grad()
def test_encoding_quickly_says_nearly_the_same_and_leaves_no_trace(
    components: dict[str, Any],
) -> None:
    vae = components["vae"]
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean, _ = encode(vae, images)
    off = {}
    for precision in ("no", "bf16"):
        with quick(vae, precision):
            answer, _ = encode(vae, images)
        off[precision] = float((answer.float() - mean).std() / mean.std())
    assert off["no"] < 1e-4 < off["bf16"] < 0.02
    with pytest.raises(KeyError), quick(vae, "bf16"):
        raise KeyError
    assert torch.equal(encode(vae, images)[0], mean)


@pytest.mark.parametrize("singly", [False, True])
def test_sample_deals_images_out_and_encodes_each_once(
    components: dict[str, Any], monkeypatch: pytest.MonkeyPatch, singly: bool
) -> None:
    """Six rows of two images: the encoder runs on two at once, or on one at a time."""
    vae, sizes = components["vae"], []
    encoded = vae.encode

    def watched(images: torch.Tensor) -> Any:
        sizes.append(len(images))
        return encoded(images)

    monkeypatch.setattr(vae, "encode", watched)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    z = sample(vae, images, 6, Noise.of(range(6)), singly=singly)
    assert sizes == ([1, 1] if singly else [2])
    mean, std = encode(vae, images)
    n = Noise.of(range(6)).draw((4, 16, 16))
    # The factor is multiplied in before or after the sum: a rounding of float32 apart.
    assert torch.allclose(z, tiled(mean, 6) + tiled(std, 6) * n, atol=1e-6)


def test_dealing_out_goes_round_and_keeps_the_layout() -> None:
    rows = torch.arange(24.0).view(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    dealt = tiled(rows, 6)
    assert torch.equal(dealt[:2], rows)
    assert torch.equal(dealt[4:], rows)
    assert dealt.is_contiguous(memory_format=torch.channels_last)


def test_decode_takes_latent_units(components: dict[str, Any]) -> None:
    vae = components["vae"]
    z = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    there_and_back = decode(vae, z * vae.config.scaling_factor)
    # Scaling there and back rounds the last bit of z, which the decoder carries on.
    assert torch.allclose(there_and_back, vae.decode(z).sample, atol=1e-5)
    assert decode(vae, z).shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    "told",
    [{"shift_factor": 0.3}, {"latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [1, 2, 3, 4.0]}],
)
def test_a_shift_and_a_spread_of_each_channel(
    tiny: Callable[..., dict[str, Any]], told: dict[str, Any]
) -> None:
    """Latents are moved by what the configuration has, as stock pipelines move them."""
    vae = tiny()["vae"]
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    raw = vae.encode(images).latent_dist
    vae.register_to_config(**told)
    z, std = encode(vae, images)
    shift = torch.tensor(told.get("latents_mean", [0.3] * 4)).view(1, 4, 1, 1)
    spread = torch.tensor(told.get("latents_std", [1.0] * 4)).view(1, 4, 1, 1)
    factor = vae.config.scaling_factor
    assert torch.allclose(z * spread / factor + shift, raw.mean, atol=1e-5)
    assert torch.allclose(std * spread / factor, raw.std, atol=1e-5)
    assert torch.allclose(decode(vae, z), vae.decode(raw.mean).sample, atol=1e-5)


def test_gradients_flow_both_ways(components: dict[str, Any]) -> None:
    images = torch.zeros(1, 3, 32, 32, requires_grad=True)
    decode(components["vae"], encode(components["vae"], images)[0]).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().max() > 0


def test_downscale(components: dict[str, Any]) -> None:
    assert downscale(components["vae"]) == 2
    assert downscale(None) == 8
