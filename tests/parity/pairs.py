"""Our pipeline and a stock one over the same components, and what both are asked to draw.

pair    (ours, stock); stock's scheduler is a copy, since a stock pipeline changes it
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.callbacks import SDCFGCutoffCallback
from PIL import Image

from ldm_pipeline import LatentDiffusionPipeline, LatentDiffusionXLPipeline

SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {},
    "DDPMScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
    "LCMScheduler": {},
    "KDPM2DiscreteScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {},
    "DEISMultistepScheduler": {},
    "DPMSolverSinglestepScheduler": {"lower_order_final": True},
    "TCDScheduler": {},
}

PROMPTS = ["a red star", "two blue boats on the sea"]

Pair = tuple[Any, Any]
"""Ours, of either class, and a stock one."""

FRESH = ("generator", "callback_on_step_end")
"""Arguments that a run uses up: tests pass functions that make them."""


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def scheduler_of(name: str, **settings: Any) -> Any:
    """The stock scheduler `name` with Stable Diffusion's settings."""
    config = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "clip_sample": False,
    }
    made_by = getattr(diffusers, name)
    known = inspect.signature(made_by).parameters
    chosen = {key: value for key, value in config.items() if key in known}
    return made_by(**chosen, **SCHEDULERS[name], **settings)


def both(components: dict[str, Any], stock: Any = None, **changed: Any) -> Pair:
    """Our pipeline and one of the class `stock` (words alone) over the same components."""
    parts = {**components, **changed}
    copied = {**parts, "scheduler": copy.deepcopy(parts["scheduler"])}
    pair: Pair
    if "text_encoder_2" in parts:
        quiet = {"add_watermarker": False}
        made = (stock or StableDiffusionXLPipeline)(**copied, **quiet)
        pair = LatentDiffusionXLPipeline(**parts, **quiet), made
    else:
        made = (stock or StableDiffusionPipeline)(**copied, requires_safety_checker=False)
        pair = LatentDiffusionPipeline(**parts), made
    for pipe in pair:
        pipe.set_progress_bar_config(disable=True)
    return pair


def drawn_by_both(pair: Pair, **arguments: Any) -> list[Any]:
    """The images of both, each from a fresh copy of the randomness."""
    results = []
    for pipe in pair:
        torch.manual_seed(7)
        fresh = {key: value() if key in FRESH else value for key, value in arguments.items()}
        results.append(pipe(**fresh).images)
    return results


def assert_same(pair: Pair, **arguments: Any) -> torch.Tensor:
    """Draw with both, each from a fresh copy of the randomness; return our latents."""
    results = drawn_by_both(pair, output_type="latent", **arguments)
    assert torch.equal(*results), f"largest difference {(results[0] - results[1]).abs().max():.3g}"
    assert results[0].isfinite().all()
    return torch.as_tensor(results[0])


def picture(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    """A picture of coloured noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def mask(width: int = 32, height: int = 32, soft: bool = False) -> Image.Image:
    """A mask that is white in a part in the middle; `soft` ones have every grey beside it."""
    levels = np.zeros((height, width), dtype=np.uint8)
    if soft:
        levels[:] = np.linspace(0, 255, width).astype(np.uint8)
    levels[height // 4 : height // 2, width // 3 : width * 3 // 4] = 255
    return Image.fromarray(levels)


def change_latents() -> Callable[..., dict[str, Any]]:
    def callback(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * 0.9 + 0.01 * i + 1e-5 * float(t)}

    return callback


def change_embeds() -> Callable[..., dict[str, Any]]:
    """All that the words were made into, and the sizes that SDXL is told."""

    def callback(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        told = [name for name in tensors if "embeds" in name or name == "add_time_ids"]
        return {name: tensors[name] * 0.5 + 0.1 for name in told}

    return callback


def change_guidance() -> Callable[..., dict[str, Any]]:
    def callback(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = pipe.guidance_scale + 2.0 + i / pipe.num_timesteps
        return tensors

    return callback


def stop_early() -> Callable[..., dict[str, Any]]:
    def callback(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = i == 2
        return tensors

    return callback


def cut_guidance() -> SDCFGCutoffCallback:
    """Stock's own callback: no guidance, and half the batch, after two fifths of the run."""
    return SDCFGCutoffCallback(cutoff_step_ratio=0.4)
