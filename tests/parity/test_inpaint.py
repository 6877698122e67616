"""Pictures and masks, in every form and strength, as stock `StableDiffusionInpaintPipeline` takes
them, bit for bit (see pairs.py), with UNets that read latents alone (4 channels) and ones that read
the mask beside them (9); what all tasks share stands in features.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image

from tests.conftest import tiny_unet
from tests.parity.pairs import (
    PROMPTS,
    Pair,
    assert_same,
    drawn_by_both,
    mask,
    picture,
    scheduler_of,
    seeded,
)
from tests.parity.pairs import both as both_of

STEPS: dict[str, Any] = {
    "num_inference_steps": 4,
    "image": picture(),
    "mask_image": mask(soft=True),
}


@pytest.fixture(scope="module", params=[4, 9])
def parts(request: pytest.FixtureRequest, components: dict[str, Any]) -> dict[str, Any]:
    """The components, with a UNet of 4 or of 9 channels."""
    if request.param == 4:
        return components
    return {**components, "unet": tiny_unet(in_channels=9)}


def both(parts: dict[str, Any], **changed: Any) -> Pair:
    return both_of(parts, StableDiffusionInpaintPipeline, **changed)


@pytest.mark.parametrize("strength", [0.25, 0.5, 0.99, 1.0])
def test_strengths(parts: dict[str, Any], strength: float) -> None:
    pair = both(parts, scheduler=scheduler_of("EulerAncestralDiscreteScheduler"))
    assert_same(pair, prompt=PROMPTS, strength=strength, **STEPS)


LATENTS = torch.randn(2, 4, 16, 16, generator=seeded(3)[0])
ARGUMENTS: dict[str, dict[str, Any]] = {
    "one generator": {
        "prompt": PROMPTS,
        "num_images_per_prompt": 2,
        "generator": lambda: seeded(5)[0],
        "strength": 0.6,
    },
    "resized": {"image": picture(44, 27), "mask_image": mask(44, 27)},
    "another size": {"height": 40, "width": 24},
    "a picture and a mask for each prompt": {
        "prompt": PROMPTS,
        "image": [picture(), picture(seed=1)],
        "mask_image": [mask(), mask(soft=True)],
    },
    "a mask for each image": {
        "prompt": PROMPTS,
        "num_images_per_prompt": 2,
        "mask_image": [mask(), mask(soft=True)],
        "generator": lambda: seeded(1, 2, 3, 4),
        "strength": 0.6,
    },
    "latents": {"prompt": PROMPTS, "latents": LATENTS},
    "latents, part": {"prompt": PROMPTS, "latents": LATENTS, "strength": 0.5},
    "masked latents": {"masked_image_latents": LATENTS[:1], "strength": 0.6},
    "all latents": {"image": LATENTS[:1], "masked_image_latents": LATENTS[1:], "strength": 0.6},
    "arrays": {
        "image": np.asarray(picture()).astype(np.float32) / 255,
        "mask_image": np.asarray(mask(soft=True)).astype(np.float32) / 255,
    },
    "tensors": {
        "image": torch.rand(1, 3, 32, 32, generator=seeded(1)[0]),
        "mask_image": torch.rand(1, 1, 32, 32, generator=seeded(1)[0]),
    },
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(parts: dict[str, Any], name: str) -> None:
    """DDPM's fresh noise shows whether all noise before it was drawn alike."""
    pair = both(parts, scheduler=scheduler_of("DDPMScheduler"))
    assert_same(pair, **{"prompt": "a red star", **STEPS, **ARGUMENTS[name]})


@pytest.mark.parametrize("pad,size", [(0, (90, 50)), (4, (32, 32)), (64, (90, 50))])
def test_a_part_enlarged(parts: dict[str, Any], pad: int, size: tuple[int, int]) -> None:
    """`padding_mask_crop` cuts out, draws, and lays back what stock does."""
    hole = np.zeros(size[::-1], dtype=np.uint8)
    hole[8:18, 10:30] = np.linspace(30, 255, 20).astype(np.uint8)
    chosen = {
        **STEPS,
        "image": picture(*size),
        "mask_image": Image.fromarray(hole),
        "padding_mask_crop": pad,
    }
    ours, theirs = drawn_by_both(both(parts), prompt=PROMPTS, **chosen)
    assert [image.size for image in ours] == [size] * 2
    assert [image.tobytes() for image in ours] == [image.tobytes() for image in theirs]
