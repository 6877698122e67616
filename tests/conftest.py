"""What every test shares: an offline, single-threaded torch and tiny components.

The components are random but of the real classes, so that everything that a full model goes
through is gone through here, in milliseconds.

    tiny        a function that builds the components of one pipeline, by keyword
    tiny_xl     the same for SDXL's
    ours, stock pipelines over the same tiny components
"""

from __future__ import annotations

import copy
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import string
from collections.abc import Callable
from typing import Any

import pytest

Components = dict[str, Any]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """One torch thread: two busy ones make tiny models tens of times slower beside other work."""
    import torch

    torch.set_num_threads(1)


def tiny_tokenizer() -> Any:
    """A CLIP tokenizer whose vocabulary is the letters and a few whole words."""
    from transformers import CLIPTokenizer

    letters = list(string.ascii_lowercase + string.digits + ",.!?'-()")
    words = [*letters, *(letter + "</w>" for letter in letters)]
    merges = [("r", "e"), ("re", "d</w>"), ("b", "l"), ("bl", "u"), ("blu", "e</w>")]
    words += ["".join(pair) for pair in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def tiny_text_encoder(vocabulary_size: int, projection: int | None = None) -> Any:
    """A three-layer CLIP text encoder of 32 channels, with a projection if it has a width."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=vocabulary_size,
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=3,
        max_position_embeddings=77,
        bos_token_id=vocabulary_size - 2,
        eos_token_id=vocabulary_size - 1,
        pad_token_id=vocabulary_size - 1,
        **({} if projection is None else {"projection_dim": projection}),
    )
    return (CLIPTextModel if projection is None else CLIPTextModelWithProjection)(config).eval()


def tiny_unet(time_cond_proj_dim: int | None = None, sample_size: int = 16, **settings: Any) -> Any:
    """A two-level cross-attention UNet of 8 and 16 channels, or as `settings` say."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    config: dict[str, Any] = {
        "sample_size": sample_size,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "time_cond_proj_dim": time_cond_proj_dim,
        "cross_attention_dim": 32,
    }
    return UNet2DConditionModel(**{**config, **settings}).eval()


def tiny_vae() -> Any:
    """A two-level autoencoder: one latent spans 2 pixels."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
    ).eval()


def tiny_small_vae(latent_channels: int = 4) -> Any:
    """A two-level AutoencoderTiny for the same latents."""
    import torch
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=latent_channels,
        scaling_factor=0.7,
    ).eval()


def tiny_scheduler(**settings: Any) -> Any:
    """Stable Diffusion's noise schedule behind a DDIM scheduler."""
    from diffusers import DDIMScheduler

    config: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    return DDIMScheduler(**{**config, **settings})


XL_UNET: dict[str, Any] = {
    "cross_attention_dim": 64,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
}
"""What SDXL's UNet reads: both encoders side by side, the pooled answer and six sizes."""


def build(*, scheduler: Any = None, **unet: Any) -> Components:
    """The components of one tiny pipeline, under the names that pipelines give them; `unet` are
    settings of its UNet."""
    tokenizer = tiny_tokenizer()
    return {
        "vae": tiny_vae(),
        "text_encoder": tiny_text_encoder(len(tokenizer)),
        "tokenizer": tokenizer,
        "unet": tiny_unet(**unet),
        "scheduler": scheduler if scheduler is not None else tiny_scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
    }


def build_xl(*, scheduler: Any = None, **unet: Any) -> Components:
    """The components of one tiny pipeline of SDXL's shape: its two text encoders differ, and so do
    their tokenizers, of which the second pads with another token."""
    tokenizer, tokenizer_2 = tiny_tokenizer(), tiny_tokenizer()
    tokenizer_2.pad_token = "!"
    text_encoder_2 = tiny_text_encoder(len(tokenizer), projection=24)
    for parameter in text_encoder_2.parameters():
        parameter.data.mul_(1.25)
    return {
        "vae": tiny_vae(),
        "text_encoder": tiny_text_encoder(len(tokenizer)),
        "text_encoder_2": text_encoder_2,
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer_2,
        "unet": tiny_unet(**{**XL_UNET, **unet}),
        "scheduler": scheduler if scheduler is not None else tiny_scheduler(),
    }


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Components]:
    """Builds fresh tiny components: tiny(scheduler=None, and settings of the UNet)."""
    return build


@pytest.fixture(scope="session")
def tiny_xl() -> Callable[..., Components]:
    """Builds fresh tiny components of SDXL's shape, as `tiny` does."""
    return build_xl


@pytest.fixture(scope="session")
def components() -> Components:
    """One shared set of tiny components; tests must not change it."""
    return build()


@pytest.fixture
def ours(components: Components) -> Any:
    """Our pipeline over the shared tiny components."""
    from ldm_pipeline import LatentDiffusionPipeline

    pipe = LatentDiffusionPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def stock(components: Components) -> Any:
    """The stock pipeline over the shared tiny components."""
    from diffusers import StableDiffusionPipeline

    # A stock pipeline runs its scheduler itself, which changes it.
    parts = {**components, "scheduler": copy.deepcopy(components["scheduler"])}
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe
