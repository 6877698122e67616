"""How a UNet attends: torch's own attention, xformers', or one head at a time.

All three compute softmax(q kᵀ / √d) v, and round it differently. The autoencoder's one attention
layer keeps torch's own: its memory is saved by tiles.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from diffusers.models import attention_processor
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import nn

logger = logging.getLogger(__name__)

PROCESSORS: dict[str, Callable[[], object]] = {
    "sdpa": AttnProcessor2_0,
    "xformers": XFormersAttnProcessor,
    "sliced": lambda: SlicedAttnProcessor(1),
}
PLAIN = (AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)
"""What may be exchanged for one another; others hold weights, or read what they are told."""

WIDTHS = (40, 160)
"""The least and the greatest width of a head in Stable Diffusion's UNets."""


def resolve(asked: str, device: torch.device, dtype: torch.dtype) -> str:
    """What `asked`, one of `memory.ATTENTION`, comes to on this device: sdpa, xformers or sliced.

    Where xformers was hoped for and cannot run, one line is logged that says why.
    """
    if asked not in ("auto", "xformers"):
        return asked
    if asked == "auto" and device.type == "cpu":
        return "sdpa"  # xformers has nothing for it
    why = xformers_refusal(device, dtype)
    if why is None:
        return "xformers"
    hoped = asked == "xformers" or attention_processor.xformers is not None
    logger.log(
        logging.WARNING if hoped else logging.INFO,
        "attention: torch's own (sdpa) in place of xformers: %s",
        why,
    )
    return "sdpa"


def xformers_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why xformers' attention cannot run on `device` in `dtype`, told by trying; None where it can.

    It is the module that diffusers' processor will call.
    """
    if attention_processor.xformers is None:
        return "it is not installed (pip install 'ldm-pipeline[xformers]')"
    try:
        for width in WIDTHS:
            q = torch.zeros(2, 16, width, device=device, dtype=dtype)
            attention_processor.xformers.ops.memory_efficient_attention(q, q, q)
    except Exception as error:  # a wheel for another torch, driver or card fails in its own ways
        first = str(error).strip().partition("\n")[0].rstrip(": ")
        return f"it cannot run on {device} in {dtype} ({first or type(error).__name__})"
    return None


def attend(unet: nn.Module, how: str) -> None:
    """Let `unet` attend by `how`, one of `PROCESSORS`; nothing may be drawn meanwhile.

    Layers whose processor does more than attend (those of IP-Adapters) keep it, which is said.
    """
    processor = PROCESSORS[how]()
    kept = set()
    for layer in unet.modules():
        if not isinstance(layer, Attention):
            continue
        if type(layer.processor) in PLAIN:
            layer.set_processor(processor)
        else:
            kept.add(type(layer.processor).__name__)
    if kept and how != "sdpa":
        logger.warning("attention: layers with %s keep that", ", ".join(sorted(kept)))
