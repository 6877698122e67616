"""The one UNet call site."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from ldm_pipeline.models.unet import bind, guidance_embedding


def inputs(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    return torch.randn(batch, 4, 16, 16), torch.full((batch,), 500.0), torch.randn(batch, 77, 32)


def test_bind_is_the_unet(components: dict[str, Any]) -> None:
    x, t, embeds = inputs()
    unet = components["unet"]
    expected = unet(x, 500, encoder_hidden_states=embeds).sample
    assert torch.equal(bind(unet, embeds)(x, t), expected)
    assert torch.equal(bind(unet, embeds)(x, torch.tensor(500)), expected)
    assert not torch.equal(bind(unet, embeds * 2)(x, t), expected)


def test_gradients_reach_latents_and_words(components: dict[str, Any]) -> None:
    x, t, embeds = inputs()
    x.requires_grad_()
    embeds.requires_grad_()
    bind(components["unet"], embeds)(x, t).square().sum().backward()
    for leaf in (x, embeds):
        assert leaf.grad is not None
        assert leaf.grad.abs().max() > 0


def test_the_guidance_embedding_is_an_input(tiny: Callable[..., dict[str, Any]]) -> None:
    unet = tiny(time_cond_proj_dim=32)["unet"]
    x, t, embeds = inputs()
    answers = [
        bind(unet, embeds, timestep_cond=guidance_embedding(torch.tensor([w, w]), 32))(x, t)
        for w in (0.0, 7.5)
    ]
    assert not torch.equal(*answers)


@pytest.mark.parametrize("dim", [2 * 16, 33])
def test_guidance_embedding_is_that_of_diffusers(stock: Any, dim: int) -> None:
    w = torch.tensor([0.0, 2.0, 7.5])
    assert torch.equal(guidance_embedding(w, dim), stock.get_guidance_scale_embedding(w, dim))


def test_threads_scale_adapters_apart(tiny: Callable[..., dict[str, Any]]) -> None:
    """Each call sees its own adapter scale, though diffusers scales the layers in place."""
    from peft import LoraConfig

    unet = tiny()["unet"]
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    x, t, embeds = inputs(1)
    scales = [None, 0.0, 0.3, 0.5, 1.0, 2.0] * 8

    @torch.no_grad()
    def answer(scale: float | None) -> torch.Tensor:
        chosen = None if scale is None else {"scale": scale}
        return bind(unet, embeds, cross_attention_kwargs=chosen)(x, t)

    serial = [answer(scale) for scale in scales]
    assert not torch.equal(serial[1], serial[4])
    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(serial, pool.map(answer, scales), strict=True):
            assert torch.equal(one, other)
