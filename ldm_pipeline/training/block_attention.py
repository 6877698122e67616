"""Attention for training in bfloat16 on a CPU, at sizes whose matrices are too large to be kept.

There torch's fused attention is slow: a layer of Stable Diffusion 1.5's with 4,096 places took 1.2
to 1.3 s forward and backward on a core of an AMD EPYC (Zen 5), and 0.64 to 0.82 s this way. Here a
few rows of the matrix of all pairs are made at a time, as many as the CPU's caches hold, by plain
matrix products, and made again in the backward pass (as FlashAttention does, 2205.14135); nothing
is kept but the inputs.

Legend
    q, k, v    queries [N, n, d], keys and values [N, m, d]; N are the heads of all samples
    p          softmax(scale q k') in bfloat16, some rows of one head at a time; it is rounded where
               the fused kernels keep float32
    g_x        the loss's gradient by x
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

PAIRS = 2**20
"""Entries of p at a time: 2 MB. Half or twice as many were about as quick on an AMD EPYC, Zen 5."""


class BlockAttention:
    """A processor of diffusers' attention layers; what is unusual goes the stock way."""

    def __init__(self) -> None:
        self.stock = AttnProcessor2_0()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **told: Any,
    ) -> Tensor:
        """The layer's answer, [B, n, channels]."""
        odd = attn.spatial_norm, attn.group_norm, attn.norm_cross, attn.norm_q, attn.norm_k
        plain = attention_mask is None and hidden_states.ndim == 3 and not any(odd)
        if not plain or attn.residual_connection:
            answer: Tensor = self.stock(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, **told
            )
            return answer
        read = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            layer(x).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for layer, x in ((attn.to_q, hidden_states), (attn.to_k, read), (attn.to_v, read))
        )
        if q.dtype != torch.bfloat16:
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        attended = attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), attn.scale)
        joined = attended.view(q.shape).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](joined)) / attn.rescale_output_factor


@torch.library.custom_op("ldm_pipeline::block_attention", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q k') v, [N, n, d], in the precision of `q`."""
    rows = _rows(k)
    answer = torch.empty_like(q)
    with torch.autocast(q.device.type, enabled=False):  # it would make softmax float32
        for q1, k1, v1, to in zip(q, k * scale, v, answer, strict=True):
            for some, at in zip(q1.split(rows), to.split(rows), strict=True):
                torch.mm(torch.softmax(some @ k1.T, dim=-1), v1, out=at)
    return answer


@torch.library.custom_op("ldm_pipeline::block_attention_backward", mutates_args=())
def gradients(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss's gradients by q, k and v, from that by the answer."""
    scaled, rows = k * scale, _rows(k)
    g_q, g_k, g_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    heads = zip(q, scaled, v, g, g_q, g_k, g_v, strict=True)
    with torch.autocast(q.device.type, enabled=False):
        for q1, k1, v1, g1, to_q, to_k, to_v in heads:
            sum_k = torch.zeros_like(k1, dtype=torch.float32)
            sum_v = torch.zeros_like(v1, dtype=torch.float32)
            for some, g_some, at in zip(*(x.split(rows) for x in (q1, g1, to_q)), strict=True):
                p = torch.softmax(some @ k1.T, dim=-1)
                sum_v += p.T @ g_some
                g_scores = torch.ops.aten._softmax_backward_data(g_some @ v1.T, p, -1, p.dtype)
                torch.mm(g_scores, k1, out=at)
                sum_k += g_scores.T @ some
            to_k.copy_(sum_k.mul_(scale))
            to_v.copy_(sum_v)
    return g_q, g_k, g_v


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.empty_like(q)


@gradients.register_fake
def _(g: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    return (*gradients(g, *ctx.saved_tensors, ctx.scale), None)


attend.register_autograd(_backward, setup_context=_keep)


def _rows(k: Tensor) -> int:
    """How many queries are looked at together."""
    return max(1, PAIRS // k.shape[1])
