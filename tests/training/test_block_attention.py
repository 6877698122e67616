"""Attention in blocks is attention: the same answers and gradients, however it is cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ldm_pipeline.training import block_attention
from ldm_pipeline.training.block_attention import BlockAttention, attend

N, HEADS, WIDTH = 50, 3, 16


def said(
    attention: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """The answer to `inputs` and the gradients by each, in float64."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    answer = attention(*leaves)
    toward = torch.randn(answer.shape, generator=torch.Generator().manual_seed(1))
    answer.backward(toward.to(answer.dtype))
    return [x.double() for x in (answer, *(leaf.grad for leaf in leaves)) if x is not None]


@pytest.mark.parametrize("pairs", [1, 7 * N, N * N, 10**6])
@pytest.mark.parametrize("m", [N, 7])
def test_answers_and_gradients_are_those_of_attention(
    m: int, pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As near to the exact ones as the fused kernel in bfloat16, but for p's own rounding."""
    monkeypatch.setattr(block_attention, "PAIRS", pairs)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(HEADS, n, WIDTH, generator=generator) for n in (N, m, m)]
    scale = 0.3

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, scale=scale)

    exact = said(fused, [x.bfloat16() for x in inputs], torch.float64)
    ours = said(lambda *told: attend(*told, scale), inputs, torch.bfloat16)
    theirs = said(fused, inputs, torch.bfloat16)
    assert len(ours) == 4
    for value, other, right in zip(ours, theirs, exact, strict=True):
        size = right.norm()
        assert (value - right).norm() / size < max(1.5 * (other - right).norm() / size, 0.01)


def test_nothing_but_the_inputs_is_kept() -> None:
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    q, k, v = (torch.randn(2, N, WIDTH).bfloat16().requires_grad_() for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attend(q, k, v, 1.0)
    assert kept == [(2, N, WIDTH)] * 3


@pytest.mark.parametrize("crossed", [False, True])
def test_a_layer_says_what_it_says_by_the_stock_processor(crossed: bool) -> None:
    torch.manual_seed(0)
    layer = Attention(24, cross_attention_dim=10 if crossed else None, heads=2, dim_head=8)
    x, words = torch.randn(2, N, 24), torch.randn(2, 7, 10) if crossed else None
    answers = []
    for processor in (AttnProcessor2_0(), BlockAttention()):
        layer.set_processor(processor)
        with torch.autocast("cpu", torch.bfloat16):
            answers.append(layer(x, encoder_hidden_states=words))
    stock, ours = answers
    assert stock.dtype == ours.dtype
    assert not torch.equal(stock, ours), "it went another way"
    assert torch.allclose(stock, ours, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("odd", ["mask", "picture", "norm", "precision"])
def test_what_is_unusual_goes_the_stock_way(odd: str) -> None:
    """Bit for bit: a mask, a picture for tokens, a norm of the layer's own, another precision."""
    torch.manual_seed(0)
    layer = Attention(24, heads=2, dim_head=8, norm_num_groups=4 if odd == "norm" else None)
    x = torch.randn(2, 24, 5, 4) if odd == "picture" else torch.randn(2, N, 24)
    told: dict[str, Any] = {}
    if odd == "mask":
        told["attention_mask"] = torch.randn(2 * 2, 1, N)
    answers = []
    for processor in (AttnProcessor2_0(), BlockAttention()):
        layer.set_processor(processor)
        with torch.autocast("cpu", torch.bfloat16, enabled=odd != "precision"):
            answers.append(layer(x, **told))
    assert torch.equal(*answers)
