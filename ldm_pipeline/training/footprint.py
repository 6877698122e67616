"""How much memory training a LoRA takes, without taking any: the UNet answers fake tensors.

They have shapes and no numbers, so that Stable Diffusion's answer in about a second, and what its
backward pass would need is counted as autograd keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from ldm_pipeline.data.buckets import Size
from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.inject import inject, without_input_casts
from ldm_pipeline.lora.targets import LoraSettings
from ldm_pipeline.models.unet import bind
from ldm_pipeline.training.start import attend_quickly, recompute

TOKENS = 77
"""What CLIP reads of a text."""

SHRINKS = 8
"""So many pixels are a side of a place of the latents, in all that Stable Diffusion is."""

MICRO_CONDITIONS = 6
"""Numbers that SDXL is told of a picture: its size before, the crop's corner, the size after."""

STATE_BYTES = 5 * 4
"""Of a trained number in float32: itself, its gradient, AdamW's two moments, the moving average."""

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Footprint:
    """What is in memory in a training step, in bytes.

    base      the UNet's frozen weights
    adapter   what is trained, with gradients, AdamW's moments and a moving average
    kept      what the forward pass keeps for the backward pass: it grows with size and batch

    Autoencoder and text encoders are not there once all is encoded. Not counted is what an
    operation needs while it runs, some per cent, and what a GPU's driver takes for itself.
    """

    base: int
    adapter: int
    kept: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.base + self.adapter + self.kept


class _Called(nn.Module):
    """A UNet and the way that it is called, as one module."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, embeds: Tensor, added: dict[str, Tensor]) -> Tensor:
        """The UNet's answer."""
        return bind(self.unet, embeds, added_cond_kwargs=added)(x, t)


def footprint(
    config: Mapping[str, Any],
    settings: LoraSettings,
    size: Size,
    batch: int,
    *,
    precision: str,
    device: str = "cpu",
    recomputed: bool = False,
) -> Footprint:
    """What training a LoRA takes on the UNet of this `config`, with `batch` pictures of `size`.

    `precision` is "no", "bf16" or "fp16", of the base and of what is kept; `device` is the kind
    that it trains on, and `recomputed` gradient checkpointing. Raises `UserError` for a config that
    diffusers cannot build.
    """
    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(dict(config))
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
        told = " ".join(str(error).split())
        raise UserError(f"the UNet's config.json describes none ({told})") from error
    dtype = DTYPES[precision]
    nn.Module.to(unet, dtype=dtype)
    attend_quickly(unet, precision, device)
    if recomputed:
        recompute(unet)
    adapter = inject({"unet": unet}, settings, seed=0)
    called = _Called(unet.train())
    kept: dict[int, Any] = {}  # memory by its place, held so that no other comes to lie there
    with FakeTensorMode():
        weights = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype).requires_grad_(tensor.requires_grad)
            for name, tensor in [*called.named_parameters(), *called.named_buffers()]
        }
        owned = {_place(tensor) for tensor in weights.values()}

        def keep(tensor: Tensor) -> Tensor:
            if _place(tensor) not in owned:
                kept.setdefault(_place(tensor), tensor.untyped_storage())
            return tensor

        half = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
        with saved_tensors_hooks(keep, lambda tensor: tensor), half, without_input_casts(adapter):
            torch.func.functional_call(called, weights, _inputs(unet, size, batch, dtype))
    trained = sum(parameter.numel() for parameter in adapter.parameters.values())
    frozen = [p for p in unet.parameters() if not p.requires_grad]
    return Footprint(
        base=sum(p.numel() * p.element_size() for p in frozen),
        adapter=trained * STATE_BYTES,
        kept=sum(storage.nbytes() for storage in kept.values()),
    )


def _place(tensor: Tensor) -> int:
    """What tells the memory of one tensor from that of another, fake or not."""
    place: int = tensor.untyped_storage()._cdata
    return place


def _inputs(unet: Any, size: Size, batch: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """What the UNet is called with: latents, levels, embeddings, and SDXL's further ones."""
    width, height = (side // SHRINKS for side in size)
    x = torch.empty(batch, unet.config.in_channels, height, width)
    embeds = torch.empty(batch, TOKENS, unet.config.cross_attention_dim, dtype=dtype)
    added = {}
    if unet.config.addition_embed_type == "text_time":
        told = MICRO_CONDITIONS * unet.config.addition_time_embed_dim
        pooled = unet.config.projection_class_embeddings_input_dim - told
        added = {
            "text_embeds": torch.empty(batch, pooled),
            "time_ids": torch.empty(batch, MICRO_CONDITIONS),
        }
    return x, torch.zeros(batch, dtype=torch.long), embeds, added
