"""The autoencoder's names in the original layout, from its config.

There the decoder's blocks are counted from the fine end, so that its first to run has the highest
number; and attention is made of 1 x 1 convolutions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm_pipeline.models.original.names import Names

ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What diffusers called them before; folders of that time are still about."""


def vae_names(config: Mapping[str, Any]) -> Names:
    """The names of an `AutoencoderKL` with `config`."""
    blocks, depth = len(config["block_out_channels"]), config.get("layers_per_block", 1)
    pairs = {name: name for name in ("quant_conv", "post_quant_conv")}
    matrices = set()
    for half in ("encoder", "decoder"):
        pairs |= {f"{half}.conv_in": f"{half}.conv_in", f"{half}.conv_out": f"{half}.conv_out"}
        pairs[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        for layer in range(2):
            pairs |= _resnet(f"{half}.mid_block.resnets.{layer}", f"{half}.mid.block_{layer + 1}")
        for mine, other in ATTENTION.items():
            pairs[f"{half}.mid_block.attentions.0.{mine}"] = f"{half}.mid.attn_1.{other}"
            if mine != "group_norm":
                matrices.add(f"{half}.mid_block.attentions.0.{mine}")
    for b in range(blocks):
        for layer in range(depth):
            here, there = f"encoder.down_blocks.{b}", f"encoder.down.{b}"
            pairs |= _resnet(f"{here}.resnets.{layer}", f"{there}.block.{layer}")
            pairs[f"{here}.downsamplers.0.conv"] = f"{there}.downsample.conv"
        for layer in range(depth + 1):
            here, there = f"decoder.up_blocks.{b}", f"decoder.up.{blocks - 1 - b}"
            pairs |= _resnet(f"{here}.resnets.{layer}", f"{there}.block.{layer}")
            pairs[f"{here}.upsamplers.0.conv"] = f"{there}.upsample.conv"
    return Names(pairs, frozenset(matrices))


def modern(key: str) -> str:
    """The name that diffusers gives a tensor today, from what it was called once."""
    for old, new in OLD.items():
        key = key.replace(f".mid_block.attentions.0.{old}.", f".mid_block.attentions.0.{new}.")
    return key


def _resnet(here: str, there: str) -> dict[str, str]:
    same = {f"{here}.{part}": f"{there}.{part}" for part in ("norm1", "conv1", "norm2", "conv2")}
    return same | {f"{here}.conv_shortcut": f"{there}.nin_shortcut"}
