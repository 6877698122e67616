"""Pictures to draw out of, in every form and strength, as stock `StableDiffusionImg2ImgPipeline`
takes them, bit for bit (see pairs.py); what all tasks share stands in features.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

from tests.parity.pairs import PROMPTS, Pair, assert_same, picture, scheduler_of, seeded
from tests.parity.pairs import both as both_of

STEPS = {"num_inference_steps": 4, "image": picture()}


def both(components: dict[str, Any], **changed: Any) -> Pair:
    return both_of(components, StableDiffusionImg2ImgPipeline, **changed)


@pytest.mark.parametrize("strength", [0.25, 0.5, 0.8, 0.99, 1.0])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerAncestralDiscreteScheduler"])
def test_strengths(components: dict[str, Any], name: str, strength: float) -> None:
    pair = both(components, scheduler=scheduler_of(name))
    assert_same(pair, prompt=PROMPTS, strength=strength, **STEPS)


ARGUMENTS: dict[str, dict[str, Any]] = {
    "size of its own": {"image": picture(44, 27)},
    "one picture for each prompt": {"prompt": PROMPTS, "image": [picture(), picture(seed=1)]},
    "dealt out": {
        "prompt": PROMPTS,
        "num_images_per_prompt": 2,
        "image": [picture(), picture(seed=1)],
        "generator": lambda: seeded(1, 2, 3, 4),
    },
    "dealt out, one generator": {
        "prompt": PROMPTS,
        "num_images_per_prompt": 2,
        "image": [picture(), picture(seed=1)],
        "generator": lambda: seeded(1)[0],
    },
    "array": {"image": np.asarray(picture()).astype(np.float32) / 255},
    "arrays": {"image": [np.asarray(picture(seed=k)).astype(np.float32) / 255 for k in (0, 1)]}
    | {"prompt": PROMPTS},
    "tensor": {"image": torch.rand(1, 3, 32, 24, generator=seeded(1)[0])},
    "latents": {"image": torch.randn(1, 4, 16, 12, generator=seeded(1)[0])},
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(components: dict[str, Any], name: str) -> None:
    assert_same(both(components), **{"prompt": "a red star", **STEPS, **ARGUMENTS[name]})
