"""Tiny models of the four families, of the real classes, such that shapes tell their configs.

Widths are multiples of 32 and heads are 64 wide, as in the real ones: what no file says (32 groups
in a normalisation) then holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.conftest import tiny_scheduler, tiny_tokenizer

KINDS = ("sd1", "sd1-inpaint", "sd1-lcm", "sd2", "sdxl", "sdxl-inpaint", "refiner")


def _text(act: str, size: int = 64, projects: bool = False, layers: int = 2) -> Any:
    words = len(tiny_tokenizer())
    config = CLIPTextConfig(
        vocab_size=words,
        hidden_size=size,
        intermediate_size=48,
        num_attention_heads=size // 64,
        num_hidden_layers=layers,
        max_position_embeddings=77,
        hidden_act=act,
        projection_dim=size,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
        pad_token_id=0 if act == "gelu" else words - 1,
    )
    return (CLIPTextModelWithProjection if projects else CLIPTextModel)(config).eval()


def _unet(kind: str) -> Any:
    xl = kind.startswith("sdxl") or kind == "refiner"
    cross = 128 if kind.startswith("sdxl") else 64
    first = "DownBlock2D" if xl else "CrossAttnDownBlock2D"
    last = "UpBlock2D" if xl else "CrossAttnUpBlock2D"
    told: dict[str, Any] = {}
    if xl:
        told = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 64 + (5 if kind == "refiner" else 6) * 256,
            "transformer_layers_per_block": [1, 2, 2],
        }
    if kind.startswith("sdxl"):
        told |= {"down_block_types": (first, "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")}
        told |= {"up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", last)}
    else:
        told |= {"down_block_types": (first, "CrossAttnDownBlock2D", "DownBlock2D")}
        told |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", last)}
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=9 if kind.endswith("inpaint") else 4,
        out_channels=4,
        block_out_channels=(64, 64, 128),
        layers_per_block=2 if xl else 1,
        cross_attention_dim=cross,
        attention_head_dim=8 if kind.startswith("sd1") else [1, 1, 2],
        use_linear_projection=not kind.startswith("sd1"),
        time_cond_proj_dim=8 if kind == "sd1-lcm" else None,
        **told,
    ).eval()


def pipeline(kind: str) -> Any:
    """A stock pipeline of the kind, with random weights."""
    torch.manual_seed(0)
    xl = kind.startswith("sdxl") or kind == "refiner"
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64),
        layers_per_block=2 if kind == "sd2" else 1,
        latent_channels=4,
        sample_size=32,
        scaling_factor=0.13025 if xl else 0.18215,
    ).eval()
    parts: dict[str, Any] = {"vae": vae, "unet": _unet(kind), "tokenizer": tiny_tokenizer()}
    prediction = "v_prediction" if kind == "sd2" else "epsilon"
    parts["scheduler"] = tiny_scheduler(prediction_type=prediction)
    if kind == "sd1-lcm":
        parts["scheduler"] = LCMScheduler.from_config(parts["scheduler"].config)
    if xl:
        other = tiny_tokenizer()
        other.pad_token = "!"
        parts |= {"tokenizer_2": other, "add_watermarker": False}
        if kind == "refiner":
            parts |= {"tokenizer": None, "text_encoder": None, "requires_aesthetics_score": True}
            parts |= {"text_encoder_2": _text("gelu", projects=True)}
            return StableDiffusionXLImg2ImgPipeline(**parts, force_zeros_for_empty_prompt=False)
        return StableDiffusionXLPipeline(
            **parts,
            text_encoder=_text("quick_gelu"),
            text_encoder_2=_text("gelu", projects=True),
        )
    if kind == "sd2":
        parts["tokenizer"].pad_token = "!"
    return StableDiffusionPipeline(
        **parts,
        text_encoder=_text("gelu" if kind == "sd2" else "quick_gelu"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def plain(file: Path) -> Path:
    """The same file without what ours say in their header, as others write it."""
    from safetensors.torch import load_file, save_file

    other = file.with_stem(file.stem + "-plain")
    save_file(load_file(file), other)
    return other
