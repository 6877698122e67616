"""Image to image as stock `StableDiffusionImg2ImgPipeline` draws it, bit for bit (see pairs.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

from tests.parity.pairs import (
    PROMPTS,
    SCHEDULERS,
    Pair,
    assert_same,
    change_embeds,
    change_guidance,
    change_latents,
    cut_guidance,
    drawn_by_both,
    picture,
    scheduler_of,
    seeded,
    stop_early,
)
from tests.parity.pairs import both as both_of

STEPS = {"num_inference_steps": 4, "image": picture()}


def both(components: dict[str, Any], **changed: Any) -> Pair:
    return both_of(components, StableDiffusionImg2ImgPipeline, **changed)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler(components: dict[str, Any], name: str) -> None:
    pair = both(components, scheduler=scheduler_of(name))
    several = {"prompt": PROMPTS, "num_images_per_prompt": 2, "strength": 0.6, **STEPS}
    assert_same(pair, **several, generator=lambda: seeded(1, 2, 3, 4))
    assert_same(pair, **several, generator=lambda: seeded(5)[0], guidance_scale=1.0)
    assert_same(pair, prompt="a red star", **STEPS)


@pytest.mark.parametrize("strength", [0.25, 0.5, 0.8, 0.99, 1.0])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerAncestralDiscreteScheduler"])
def test_strengths(components: dict[str, Any], name: str, strength: float) -> None:
    pair = both(components, scheduler=scheduler_of(name))
    assert_same(pair, prompt=PROMPTS, strength=strength, **STEPS)


ARGUMENTS: dict[str, dict[str, Any]] = {
    "unguided": {"guidance_scale": 1.0},
    "negative": {"negative_prompt": "a blue moon"},
    "negatives": {"prompt": PROMPTS, "negative_prompt": ["fog", "rain"]},
    "three": {"num_images_per_prompt": 3},
    "eta": {"eta": 0.7},
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


def test_clip_skip(components: dict[str, Any]) -> None:
    encoder = components["text_encoder"]
    # The stock pipeline looks for `text_model`, which transformers 5 folded into the model.
    encoder.__dict__["text_model"] = encoder
    try:
        skipped = assert_same(both(components), prompt="a red star", clip_skip=1, **STEPS)
    finally:
        del encoder.__dict__["text_model"]
    assert not torch.equal(skipped, assert_same(both(components), prompt="a red star", **STEPS))


def test_embeds(components: dict[str, Any]) -> None:
    pair = both(components)
    embeds, negative = pair[0].encode_prompt(PROMPTS, "cpu", 1, True, "fog")
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    drawn = assert_same(pair, num_images_per_prompt=2, **given, **STEPS)
    words = {"prompt": PROMPTS, "negative_prompt": ["fog", "fog"]}
    assert torch.equal(drawn, assert_same(pair, num_images_per_prompt=2, **words, **STEPS))


@pytest.mark.parametrize(
    "levels", [{"timesteps": [901, 601, 301, 1]}, {"sigmas": [14.6, 5.0, 1.0, 0.3, 0.0]}], ids=str
)
def test_custom_levels(components: dict[str, Any], levels: dict[str, Any]) -> None:
    pair = both(components, scheduler=scheduler_of("EulerDiscreteScheduler"))
    chosen = {"prompt": "a red star", "image": picture(), "num_inference_steps": None}
    assert_same(pair, **chosen, **levels)


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler"])
@pytest.mark.parametrize(
    "callback", [change_latents, change_embeds, change_guidance, stop_early, cut_guidance]
)
def test_callbacks(components: dict[str, Any], name: str, callback: Callable[..., Any]) -> None:
    pair = both(components, scheduler=scheduler_of(name))
    chosen: dict[str, Any] = {"prompt": "a red star", "image": picture(), "num_inference_steps": 6}
    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    changed = assert_same(
        pair,
        **chosen,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=names,
    )
    assert not torch.equal(changed, assert_same(pair, **chosen))


def test_guided_lcm(tiny: Callable[..., dict[str, Any]]) -> None:
    pair = both(tiny(time_cond_proj_dim=32), scheduler=scheduler_of("LCMScheduler"))
    chosen = {"prompt": PROMPTS, "generator": lambda: seeded(1, 2), **STEPS}
    strong = assert_same(pair, **chosen, guidance_scale=8.5)
    assert not torch.equal(strong, assert_same(pair, **chosen, guidance_scale=3.0))


@pytest.mark.parametrize("output_type", ["np", "pt", "pil"])
def test_pictures(components: dict[str, Any], output_type: str) -> None:
    """The decoded picture is the same in every format."""
    ours, theirs = drawn_by_both(both(components), prompt=PROMPTS, output_type=output_type, **STEPS)
    if output_type == "pil":
        assert [image.tobytes() for image in ours] == [image.tobytes() for image in theirs]
    else:
        assert (ours == theirs).all()


def test_bfloat16(tiny: Callable[..., dict[str, Any]]) -> None:
    pair = both(tiny(scheduler=scheduler_of("DDPMScheduler")))
    for pipe in pair:
        pipe.to(torch.bfloat16)
    assert assert_same(pair, prompt=PROMPTS, **STEPS).dtype == torch.bfloat16


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_lora_scale(tiny: Callable[..., dict[str, Any]], scale: float) -> None:
    from peft import LoraConfig

    parts = tiny()
    plain = assert_same(both(parts), prompt="a red star", **STEPS)
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    parts["unet"].add_adapter(config)
    adapted = assert_same(
        both(parts), prompt="a red star", cross_attention_kwargs={"scale": scale}, **STEPS
    )
    assert torch.equal(adapted, plain) == (scale == 0.0)
