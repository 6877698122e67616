"""Tiny pipelines of the three families, and LoRAs that adapt everything in them.

sd1, sd2, xl    stock pipelines of the real classes: SD 1.x with convolutions as the projections of
                its transformers, SD 2.x with linear ones, SDXL with three levels of two layers
                and two text encoders
networks        their networks by component
lora            lora(pipe, …): random weights of several ranks and alphas
picture         picture(pipe): one [1, H, W, 3] of one step
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from ldm_pipeline.lora.fitting import modules_of
from ldm_pipeline.lora.layouts.families import FAMILIES
from ldm_pipeline.lora.targets import COMPONENTS, Layout, Slot
from ldm_pipeline.lora.weights import LORA_A, LORA_B, MAGNITUDE, LoraWeights
from tests.conftest import build, build_xl, tiny_unet


def sd1() -> Any:
    """Stable Diffusion 1.x."""
    return StableDiffusionPipeline(**build(), requires_safety_checker=False)


def sd2() -> Any:
    """Stable Diffusion 2.x."""
    parts = {**build(), "unet": tiny_unet(use_linear_projection=True)}
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def xl() -> Any:
    """SDXL, with its UNet's three levels, of which the first has no attention."""
    unet = tiny_unet(
        cross_attention_dim=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
        use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 8, 16),
        layers_per_block=2,
    )
    return StableDiffusionXLPipeline(**{**build_xl(), "unet": unet}, add_watermarker=False)


PIPELINES: dict[str, Callable[[], Any]] = {"sd1": sd1, "sd2": sd2, "sdxl": xl}
assert PIPELINES.keys() <= FAMILIES.keys()


def networks(pipe: Any) -> dict[str, Any]:
    """The networks of a pipeline, by component."""
    return {name: getattr(pipe, name) for name in COMPONENTS if hasattr(pipe, name)}


def lora(
    pipe: Any,
    *,
    seed: int = 0,
    dora: bool = False,
    rslora: bool = False,
    every: int = 1,
    only: Sequence[str] = (),
    size: float = 0.3,
) -> LoraWeights:
    """Random weights beside every `every`th module of a pipeline, ranks and alphas mixed.

    `only` limits it to modules whose names hold one of these words.
    """
    generator, dice = torch.Generator().manual_seed(seed), random.Random(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return size * torch.randn(shape, generator=generator)

    tensors, layouts = {}, {}
    for component, modules in modules_of(networks(pipe)).items():
        slots = {}
        chosen = [n for n in modules if not only or any(word in n for word in only)]
        for name in chosen[seed % every :: every]:
            out, into, *kernel = modules[name]
            rank, alpha = dice.choice([1, 2, 3]), dice.choice([0.5, 2.0, 3.0])
            slots[name] = Slot(rank, alpha)
            key = f"{component}.{name}."
            tensors[key + LORA_A] = drawn(rank, into, *kernel)
            tensors[key + LORA_B] = drawn(out, rank, *[1] * len(kernel))
            if dora:
                m = 1 + 0.1 * drawn(out)
                tensors[key + MAGNITUDE] = m.reshape(1, out, 1, 1) if kernel else m
        if slots:
            layouts[component] = Layout(slots, dora, rslora)
    return LoraWeights(tensors, layouts)


def picture(pipe: Any) -> torch.Tensor:
    """One picture of one step."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    told = {"num_inference_steps": 1, "output_type": "np", "generator": generator}
    size = {"height": 16, "width": 16}
    return torch.from_numpy(pipe("a red star", **told, **size).images)
