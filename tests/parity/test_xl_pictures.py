"""SDXL out of pictures and into them, as its stock pipelines draw, bit for bit (see pairs.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline

from ldm_pipeline.errors import UserError
from tests.parity.pairs import assert_same, both, mask, picture, scheduler_of, seeded

TASKS: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "image": (StableDiffusionXLImg2ImgPipeline, 4, {}),
    "mask": (StableDiffusionXLInpaintPipeline, 4, {"mask_image": mask(soft=True)}),
    "mask read": (StableDiffusionXLInpaintPipeline, 9, {"mask_image": mask(soft=True)}),
}
STEPS: dict[str, Any] = {"num_inference_steps": 4, "image": picture()}


@pytest.fixture(scope="module")
def parts(tiny_xl: Callable[..., dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The components, by the channels that their UNet reads."""
    return {channels: tiny_xl(in_channels=channels) for channels in (4, 9)}


def pair_of(parts: dict[int, dict[str, Any]], task: str, **changed: Any) -> Any:
    stock, channels, _ = TASKS[task]
    return both(parts[channels], stock, **changed)


ARGUMENTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": {"strength": 1.0, "guidance_rescale": 0.5},
    "unguided": {"guidance_scale": 1.0, "strength": 0.6},
    "negative": {"negative_prompt": "fog", "negative_prompt_2": "ink", "strength": 0.6},
    "corner": {"crops_coords_top_left": (9, 1), "strength": 0.6},
    "original": {"negative_original_size": (90, 10), "original_size": (64, 48), "strength": 0.6},
    "goes on": {"denoising_start": 0.4},
    "latents": {"latents": torch.randn(1, 4, 16, 16, generator=seeded(3)[0]), "strength": 0.6},
}


@pytest.mark.parametrize("task", ["image", "mask"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(parts: dict[int, dict[str, Any]], task: str, name: str) -> None:
    pair = pair_of(parts, task, scheduler=scheduler_of("EulerAncestralDiscreteScheduler"))
    told = {"prompt": "a red star", **STEPS, "num_inference_steps": 6}
    assert_same(pair, **told, **TASKS[task][2], **ARGUMENTS[name])


def test_a_part_of_the_run(parts: dict[int, dict[str, Any]]) -> None:
    """Stock inpainting that ends early leaves the known part clean; ours, at the level of the rest:
    there it differs from clean latents by noise, and the rest is as stock's."""
    pair = pair_of(parts, "image", scheduler=scheduler_of("EulerAncestralDiscreteScheduler"))
    told: dict[str, Any] = {"prompt": "a red star", **STEPS, "num_inference_steps": 6}
    assert_same(pair, **told, denoising_end=0.8, strength=0.9)
    assert_same(pair, **told, denoising_start=0.4, denoising_end=0.9)
    ours, stock = pair_of(parts, "mask")
    told |= {"mask_image": mask(), "output_type": "latent", "denoising_end": 0.5, "strength": 0.9}
    mine, theirs = (pipe(**told, generator=seeded(1)).images for pipe in (ours, stock))
    painted = torch.zeros(1, 4, 16, 16, dtype=torch.bool)
    painted[..., 4:8, 6:11] = True  # well within the mask, in latents
    assert torch.equal(mine[painted], theirs[painted])
    assert not torch.equal(mine[~painted], theirs[~painted])


def test_a_corner_of_the_negative_half_is_heard(parts: dict[int, dict[str, Any]]) -> None:
    """Stock image-to-image and inpainting take it and do nothing with it."""
    for task in ("image", "mask"):
        ours, stock = pair_of(parts, task)
        told = {"prompt": "a red star", **STEPS, **TASKS[task][2], "output_type": "latent"}
        corner = {"negative_crops_coords_top_left": (9, 1)}
        for pipe, heard in ((ours, True), (stock, False)):
            plain, other = (
                pipe(**told, strength=0.6, generator=seeded(1), **more).images
                for more in ({}, corner)
            )
            assert torch.equal(plain, other) != heard


def test_pixels_outside_the_mask_stay(parts: dict[int, dict[str, Any]]) -> None:
    ours, _ = pair_of(parts, "mask")
    told = {**STEPS, "mask_image": mask(), "output_type": "pil", "seed": 1}
    drawn = ours("a red star", **told, keep_unmasked=True).images[0]
    given, changed, white = (np.asarray(each) for each in (picture(), drawn, mask()))
    assert (given == changed)[white < 128].all()
    assert not (given == changed)[white >= 128].all()


def test_an_inpainting_model_needs_a_mask(parts: dict[int, dict[str, Any]]) -> None:
    ours, _ = pair_of(parts, "mask read")
    with pytest.raises(UserError, match="pass image and mask_image"):
        ours("a red star", **STEPS)
    assert ours._stock_class_name() == "StableDiffusionXLInpaintPipeline"
