"""The only place that calls a UNet.

`bind` ties a UNet to its conditioning and gives back a `Network`: answer = network(x, t).

Legend
    x        noisy latents [B, C, h, w]
    t        noise level in timesteps of the training grid, a scalar or [B]
    embeds   text embeddings [B, L, channels]
    w        guidance strength of a distilled (guided LCM) UNet, guidance_scale - 1
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ldm_pipeline.diffusion.denoiser import Network
from ldm_pipeline.models.text import has_adapters, scaling_kept

# Adapter layers are rescaled in place during a call, so calls on adapted UNets take turns.
_adapted = threading.Lock()


def bind(
    unet: UNet2DConditionModel,
    embeds: Tensor,
    *,
    timestep_cond: Tensor | None = None,
    cross_attention_kwargs: Mapping[str, Any] | None = None,
    added_cond_kwargs: Mapping[str, Tensor | Sequence[Tensor]] | None = None,
    beside: Tensor | None = None,
) -> Network:
    """The UNet as a function of (x, t), conditioned on `embeds`.

    `beside` [B, c, h, w] is what an inpainting UNet reads after x's own channels: the mask and the
    latents of what stays.

    `timestep_cond` [B, time_cond_proj_dim] is the guidance embedding of a guided LCM.
    `cross_attention_kwargs` goes to the attention layers; its "scale" scales adapter layers.
    Gradients flow unless the caller turned them off.
    """
    attention = dict(cross_attention_kwargs) if cross_attention_kwargs is not None else None
    added = dict(added_cond_kwargs) if added_cond_kwargs is not None else None

    def call(x: Tensor, t: Tensor) -> Tensor:
        answer: Tensor = unet(
            x if beside is None else torch.cat([x, beside], dim=1),
            t,
            encoder_hidden_states=embeds,
            timestep_cond=timestep_cond,
            cross_attention_kwargs=attention,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return answer

    def network(x: Tensor, t: Tensor) -> Tensor:
        if not has_adapters(unet):
            return call(x, t)
        with _adapted, scaling_kept(unet) if "scale" in (attention or {}) else nullcontext():
            return call(x, t)

    return network


@contextmanager
def adapters_at_rest() -> Iterator[None]:
    """Within the block no call on an adapted UNet is under way; nothing may be drawn in it."""
    with _adapted:
        yield


def guidance_embedding(w: Tensor, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sinusoids [B, dim] of the guidance strength w [B], sines first (LCM, 2310.04378).

    Frequencies fall geometrically from 1 to 1/10000, applied to 1000 w; an odd `dim` ends in a
    column of zeros.
    """
    half = dim // 2
    step = torch.log(torch.tensor(10000.0)) / (half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=dtype, device=w.device) * -step)
    angles = (1000.0 * w).to(dtype)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(waves, (0, dim % 2))
