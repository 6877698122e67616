"""How much memory training a LoRA takes, without taking any: the UNet answers fake tensors.

They have shapes and no numbers, so that Stable Diffusion's answer in about a second, and what its
backward pass would need is counted as autograd keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
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
from ldm_pipeline.training.start import attend_quickly

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
    kept      the most that is kept for the backward pass: it grows with size and batch. With
              gradient checkpointing it is what the forward pass keeps up to the layer that takes
              most, and what that layer keeps when it is computed again

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
    kept = _Kept()
    if recomputed:
        unet.enable_gradient_checkpointing(kept.again)
    adapter = inject({"unet": unet}, settings, seed=0)
    called = _Called(unet.train())
    with FakeTensorMode():
        weights = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype).requires_grad_(tensor.requires_grad)
            for name, tensor in [*called.named_parameters(), *called.named_buffers()]
        }
        kept.not_counted = {_place(tensor) for tensor in weights.values()}
        half = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
        with kept.noted(kept.storages), half, without_input_casts(adapter):
            torch.func.functional_call(called, weights, _inputs(unet, size, batch, dtype))
    trained = sum(parameter.numel() for parameter in adapter.parameters.values())
    frozen = [p for p in unet.parameters() if not p.requires_grad]
    return Footprint(
        base=sum(p.numel() * p.element_size() for p in frozen),
        adapter=trained * STATE_BYTES,
        kept=max(kept.most, kept.bytes()),
    )


class _Kept:
    """The memory that autograd keeps, each place of it once.

    storages     by place, held so that no other comes to lie there
    not_counted  the places of weights
    most         the most bytes kept while a layer is computed again, 0 where none is
    """

    def __init__(self) -> None:
        self.storages: dict[int, Any] = {}
        self.not_counted: set[int] = set()
        self.most = 0

    def noted(self, storages: dict[int, Any]) -> saved_tensors_hooks:
        """Within the block, what autograd keeps is put into `storages`."""

        def keep(tensor: Tensor) -> Tensor:
            if _place(tensor) not in self.not_counted:
                storages.setdefault(_place(tensor), tensor.untyped_storage())
            return tensor

        return saved_tensors_hooks(keep, lambda tensor: tensor)

    def again(self, layer: nn.Module, *given: Any) -> Any:
        """The layer's answer, as gradient checkpointing has it: what is given is kept, and the rest
        while the backward pass is at this layer."""
        tensors = [value for value in given if isinstance(value, Tensor)]
        self.storages |= {
            _place(tensor): tensor.untyped_storage()
            for tensor in tensors
            if _place(tensor) not in self.not_counted
        }
        rest: dict[int, Any] = {}
        with self.noted(rest):
            answer = layer(*given)
        self.most = max(self.most, self.bytes(rest))
        return answer

    def bytes(self, rest: Mapping[int, Any] = MappingProxyType({})) -> int:
        """Of all that is kept, and of the rest."""
        return sum(storage.nbytes() for storage in {**self.storages, **rest}.values())


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
