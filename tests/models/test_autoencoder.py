"""Pictures to latents and back."""

from __future__ import annotations

from typing import Any

import torch

from ldm_pipeline.models.autoencoder import decode, downscale, encode


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


def test_decode_takes_latent_units(components: dict[str, Any]) -> None:
    vae = components["vae"]
    z = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    there_and_back = decode(vae, z * vae.config.scaling_factor)
    # Scaling there and back rounds the last bit of z, which the decoder carries on.
    assert torch.allclose(there_and_back, vae.decode(z).sample, atol=1e-5)
    assert decode(vae, z).shape == (2, 3, 32, 32)


def test_gradients_flow_both_ways(components: dict[str, Any]) -> None:
    images = torch.zeros(1, 3, 32, 32, requires_grad=True)
    decode(components["vae"], encode(components["vae"], images)[0]).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().max() > 0


def test_downscale(components: dict[str, Any]) -> None:
    assert downscale(components["vae"]) == 2
    assert downscale(None) == 8
