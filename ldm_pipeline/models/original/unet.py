"""The UNet's names in the original layout, from its config.

There the blocks stand in one row: `input_blocks.0` is the first convolution, then one entry for
each resnet (with its attention) and each downsampler, in the order in which they run; so on the way
up, where an upsampler shares the entry of the resnet before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm_pipeline.models.original.names import Names

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}

ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",  # a full LCM's; the layout is older
    "add_embedding.linear_1": "label_emb.0.0",  # SDXL alone has it
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_names(config: Mapping[str, Any]) -> Names:
    """The names of a `UNet2DConditionModel` with `config`."""
    blocks = len(config["down_block_types"])
    depths = config["layers_per_block"]
    depths = [depths] * blocks if isinstance(depths, int) else list(depths)
    pairs = dict(ENDS)
    place = 1
    for b, depth in enumerate(depths):
        for layer in range(depth):
            pairs |= _resnet(f"down_blocks.{b}.resnets.{layer}", f"input_blocks.{place}.0")
            pairs[f"down_blocks.{b}.attentions.{layer}"] = f"input_blocks.{place}.1"
            place += 1
        if b < blocks - 1:
            pairs[f"down_blocks.{b}.downsamplers.0.conv"] = f"input_blocks.{place}.0.op"
            place += 1
    pairs |= _resnet("mid_block.resnets.0", "middle_block.0")
    pairs["mid_block.attentions.0"] = "middle_block.1"
    pairs |= _resnet("mid_block.resnets.1", "middle_block.2")
    place = 0
    for b, (depth, kind) in enumerate(zip(depths[::-1], config["up_block_types"], strict=True)):
        for layer in range(depth + 1):
            pairs |= _resnet(f"up_blocks.{b}.resnets.{layer}", f"output_blocks.{place}.0")
            pairs[f"up_blocks.{b}.attentions.{layer}"] = f"output_blocks.{place}.1"
            if layer == depth and b < blocks - 1:
                attends = "CrossAttn" in kind
                if not attends:
                    del pairs[f"up_blocks.{b}.attentions.{layer}"]
                up = f"output_blocks.{place}.{2 if attends else 1}.conv"
                pairs[f"up_blocks.{b}.upsamplers.0.conv"] = up
            place += 1
    return Names(pairs)


def _resnet(here: str, there: str) -> dict[str, str]:
    return {f"{here}.{mine}": f"{there}.{other}" for mine, other in RESNET.items()}
