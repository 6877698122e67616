"""Inpainting as stock `StableDiffusionInpaintPipeline` does it, bit for bit (see pairs.py), with
UNets that read latents alone (4 channels) and ones that read the mask beside them (9)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image

from tests.conftest import tiny_unet
from tests.parity.pairs import (
    PROMPTS,
    SCHEDULERS,
    Pair,
    assert_same,
    change_embeds,
    change_guidance,
    change_latents,
    drawn_by_both,
    mask,
    picture,
    scheduler_of,
    seeded,
    stop_early,
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


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler(parts: dict[str, Any], name: str) -> None:
    pair = both(parts, scheduler=scheduler_of(name))
    several = {"prompt": PROMPTS, "num_images_per_prompt": 2, "strength": 0.6, **STEPS}
    assert_same(pair, **several, generator=lambda: seeded(1, 2, 3, 4))
    assert_same(pair, prompt="a red star", **STEPS)


@pytest.mark.parametrize("strength", [0.25, 0.5, 0.99, 1.0])
def test_strengths(parts: dict[str, Any], strength: float) -> None:
    pair = both(parts, scheduler=scheduler_of("EulerAncestralDiscreteScheduler"))
    assert_same(pair, prompt=PROMPTS, strength=strength, **STEPS)


LATENTS = torch.randn(2, 4, 16, 16, generator=seeded(3)[0])
ARGUMENTS: dict[str, dict[str, Any]] = {
    "unguided": {"guidance_scale": 1.0},
    "one generator": {
        "prompt": PROMPTS,
        "num_images_per_prompt": 2,
        "generator": lambda: seeded(5)[0],
        "strength": 0.6,
    },
    "negative": {"negative_prompt": "a blue moon"},
    "negatives": {"prompt": PROMPTS, "negative_prompt": ["fog", "rain"]},
    "three": {"num_images_per_prompt": 3},
    "eta": {"eta": 0.7, "strength": 0.6},
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


def test_clip_skip(parts: dict[str, Any]) -> None:
    encoder = parts["text_encoder"]
    # The stock pipeline looks for `text_model`, which transformers 5 folded into the model.
    encoder.__dict__["text_model"] = encoder
    try:
        skipped = assert_same(both(parts), prompt="a red star", clip_skip=1, **STEPS)
    finally:
        del encoder.__dict__["text_model"]
    assert not torch.equal(skipped, assert_same(both(parts), prompt="a red star", **STEPS))


def test_embeds(parts: dict[str, Any]) -> None:
    pair = both(parts)
    embeds, negative = pair[0].encode_prompt(PROMPTS, "cpu", 1, True, "fog")
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    assert_same(pair, num_images_per_prompt=2, **given, **STEPS)


def change_mask() -> Callable[..., dict[str, Any]]:
    def callback(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        tensors["mask"] = tensors["mask"].roll(1, dims=-1)
        tensors["masked_image_latents"] = tensors["masked_image_latents"] * 0.9
        return tensors

    return callback


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler"])
@pytest.mark.parametrize(
    "callback", [change_latents, change_embeds, change_guidance, stop_early, change_mask]
)
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_callbacks(
    parts: dict[str, Any], name: str, callback: Callable[..., Any], guidance: float
) -> None:
    if guidance == 1 and callback in (change_embeds, change_guidance):
        return  # these need both halves
    pair = both(parts, scheduler=scheduler_of(name))
    chosen: dict[str, Any] = {"prompt": PROMPTS, "guidance_scale": guidance, **STEPS}
    names = ["latents", "prompt_embeds", "negative_prompt_embeds", "mask", "masked_image_latents"]
    changed = assert_same(
        pair,
        **chosen,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=names,
    )
    assert not torch.equal(changed, assert_same(pair, **chosen))


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


@pytest.mark.parametrize("output_type", ["np", "pt", "pil"])
def test_pictures(parts: dict[str, Any], output_type: str) -> None:
    """The decoded picture is the same in every format."""
    ours, theirs = drawn_by_both(both(parts), prompt=PROMPTS, output_type=output_type, **STEPS)
    if output_type == "pil":
        assert [image.tobytes() for image in ours] == [image.tobytes() for image in theirs]
    else:
        assert (ours == theirs).all()


def test_bfloat16(tiny: Callable[..., dict[str, Any]]) -> None:
    pair = both(tiny(scheduler=scheduler_of("DDPMScheduler")))
    for pipe in pair:
        pipe.to(torch.bfloat16)
    assert assert_same(pair, prompt=PROMPTS, **STEPS).dtype == torch.bfloat16
