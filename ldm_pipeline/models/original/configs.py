"""The configs of a single file's networks, which it does not hold, from its tensors' shapes.

What shapes do not tell is the family's (`families.py`): the number of attention heads, the size of
the pictures, the scale of the latents, what the network predicts.

Legend
    shapes    name of a tensor, without its component's prefix -> its shape
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ldm_pipeline.models.original.families import Family, TextPart

Shapes = Mapping[str, tuple[int, ...]]
Config = dict[str, Any]

GUIDED = "time_embed.cond_proj.weight"
"""What a full LCM's UNet has, which is told the guidance."""


def unet_config(shapes: Shapes, family: Family, prediction: str) -> Config:
    """The config of the UNet with these shapes."""
    blocks = _blocks(shapes)
    widths = [shapes[f"input_blocks.{block[0]}.0.out_layers.3.weight"][0] for block in blocks]
    depths = [_depth(shapes, f"input_blocks.{block[0]}.1.") for block in blocks]
    middle = _depth(shapes, "middle_block.1.")
    attends = [depth > 0 for depth in depths]
    layers = [max(depth, 1) for depth in depths[:-1]] + [middle or 1]
    down = [f"{'CrossAttn' if each else ''}DownBlock2D" for each in attends]
    up = [f"{'CrossAttn' if each else ''}UpBlock2D" for each in attends[::-1]]
    projections = [key for key in shapes if key.endswith(".1.proj_in.weight")]
    keys = [key for key in shapes if key.endswith("transformer_blocks.0.attn2.to_k.weight")]
    config: Config = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": _latent_side(family, prediction),
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "down_block_types": down,
        "up_block_types": up,
        "block_out_channels": widths,
        "layers_per_block": len(blocks[0]),
        "cross_attention_dim": shapes[keys[0]][1],
        "attention_head_dim": family.heads or [width // 64 for width in widths],
        "transformer_layers_per_block": layers if max(layers) > 1 else 1,
        "use_linear_projection": len(shapes[projections[0]]) == 2,
    }
    if prediction == "v_prediction" and family.heads is None:
        config["upcast_attention"] = True  # the 768 pixel model overflows in 16 bits without
    if GUIDED in shapes:
        config["time_cond_proj_dim"] = shapes[GUIDED][1]
    if "label_emb.0.0.weight" in shapes:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": shapes["label_emb.0.0.weight"][1],
        }
    return config


def vae_config(shapes: Shapes, family: Family, prediction: str) -> Config:
    """The config of the autoencoder with these shapes."""
    count = 1 + max(_numbers(shapes, r"encoder\.down\.(\d+)\."))
    widths = [shapes[f"encoder.down.{i}.block.0.conv2.weight"][0] for i in range(count)]
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "down_block_types": ["DownEncoderBlock2D"] * count,
        "up_block_types": ["UpDecoderBlock2D"] * count,
        "block_out_channels": widths,
        "layers_per_block": 1 + max(_numbers(shapes, r"encoder\.down\.0\.block\.(\d+)\.")),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "sample_size": 8 * _latent_side(family, prediction),
        "scaling_factor": family.scaling,
    }


def text_config(shapes: Shapes, part: TextPart) -> Config:
    """The config of a text encoder with these shapes."""
    if part.open_clip:
        words, places = shapes["model.token_embedding.weight"], shapes["model.positional_embedding"]
        wide = shapes["model.transformer.resblocks.0.mlp.c_fc.weight"][0]
        layers = 1 + max(_numbers(shapes, r"model\.transformer\.resblocks\.(\d+)\."))
        projection = shapes.get("model.text_projection")
        if not part.projects and projection is not None:
            layers -= 1  # SD 2.x reads the last but one of an OpenCLIP that is there in full
    else:
        body = "transformer.text_model"
        words = shapes[f"{body}.embeddings.token_embedding.weight"]
        places = shapes[f"{body}.embeddings.position_embedding.weight"]
        wide = shapes[f"{body}.encoder.layers.0.mlp.fc1.weight"][0]
        layers = 1 + max(_numbers(shapes, r"transformer\.text_model\.encoder\.layers\.(\d+)\."))
        projection = None
    return {
        "architectures": ["CLIPTextModelWithProjection" if part.projects else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": words[0],
        "hidden_size": words[1],
        "max_position_embeddings": places[0],
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": max(words[1] // 64, 1),
        "hidden_act": "gelu" if part.open_clip else "quick_gelu",
        "projection_dim": projection[1] if projection is not None else words[1],
        "bos_token_id": words[0] - 2,
        "eos_token_id": words[0] - 1,
        "pad_token_id": 0 if part.open_clip else words[0] - 1,
    }


def scheduler_config(family: Family, prediction: str, zero_terminal: bool = False) -> Config:
    """The noise schedule that these families were trained with, behind the scheduler of the
    family's own folders on the hub."""
    config: Config = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
        "prediction_type": prediction,
        "steps_offset": 1,
    }
    if family.is_xl:
        spacing = "trailing" if zero_terminal else "leading"
        config |= {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": spacing}
        return config | ({"rescale_betas_zero_snr": True} if zero_terminal else {})
    config |= {"clip_sample": False, "set_alpha_to_one": False}
    if family.heads is None:
        return config | {"_class_name": "DDIMScheduler"}
    return config | {"_class_name": "PNDMScheduler", "skip_prk_steps": True}


def _latent_side(family: Family, prediction: str) -> int:
    """The side of the latents: SD 2.x that predicts noise is the model of 512 pixels."""
    small = family.prediction == "v_prediction" and prediction == "epsilon"
    return 64 if small else family.size


def _blocks(shapes: Shapes) -> list[list[int]]:
    """The places of the resnets in `input_blocks`, one list for each block of Diffusers."""
    blocks: list[list[int]] = [[]]
    for place in range(1, 1 + max(_numbers(shapes, r"input_blocks\.(\d+)\."))):
        if f"input_blocks.{place}.0.op.weight" in shapes:
            blocks.append([])
        else:
            blocks[-1].append(place)
    return blocks


def _depth(shapes: Shapes, prefix: str) -> int:
    """How many transformer blocks stand under `prefix`."""
    pattern = re.escape(prefix) + r"transformer_blocks\.(\d+)\."
    return 1 + max(_numbers(shapes, pattern), default=-1)


def _numbers(shapes: Iterable[str], pattern: str) -> list[int]:
    """The numbers in the names that begin with `pattern`."""
    found = (re.match(pattern, key) for key in shapes)
    return [int(match[1]) for match in found if match]
