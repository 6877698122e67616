"""The same pictures as stock diffusers, bit for bit.

Every comparison is an exact one (`torch.equal`): both pipelines hold the same random fp32
components on the CPU, call them on the same tensors in the same order, and so have no reason to
differ in a single bit. What all tasks share stands in features.py; here is more of text-to-image.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.parity.pairs import (
    PROMPTS,
    assert_same,
    both,
    change_embeds,
    change_guidance,
    change_latents,
    cut_guidance,
    scheduler_of,
    seeded,
    stop_early,
)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DDPMScheduler"])
@pytest.mark.parametrize(
    "settings",
    [
        {"prediction_type": "v_prediction"},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        {"prediction_type": "sample"},
        {"timestep_spacing": "trailing"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_what_the_network_predicts(
    components: dict[str, Any], name: str, settings: dict[str, Any]
) -> None:
    pair = both(components, scheduler=scheduler_of(name, **settings))
    assert_same(pair, prompt=PROMPTS, num_inference_steps=3, guidance_rescale=0.7)


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": "a red star"},
        {"prompt": "a red star", "guidance_scale": 1.0},
        {"prompt": "a red star", "guidance_scale": 0.5},
        {"prompt": "a red star", "negative_prompt": "a blue moon"},
        {"prompt": PROMPTS, "negative_prompt": ["fog", "rain"], "guidance_rescale": 0.5},
        {"prompt": "a red star", "num_images_per_prompt": 3},
        {"prompt": PROMPTS, "num_images_per_prompt": 2, "generator": lambda: seeded(4, 3, 2, 1)},
        {"prompt": PROMPTS, "height": 48, "width": 16},
        {"prompt": PROMPTS, "eta": 1.0, "generator": lambda: seeded(1, 2)},
        {"prompt": "a red star", "eta": 0.3},
        {"prompt": "red " * 100},
    ],
    ids=lambda arguments: re.sub(r" at 0x\w+", "", str(arguments)),  # the same in every process
)
def test_arguments(components: dict[str, Any], arguments: dict[str, Any]) -> None:
    assert_same(both(components), num_inference_steps=3, **arguments)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerAncestralDiscreteScheduler"])
def test_bfloat16(tiny: Callable[..., dict[str, Any]], name: str) -> None:
    pair = both(tiny(scheduler=scheduler_of(name)))
    for pipe in pair:
        pipe.to(torch.bfloat16)
    drawn = assert_same(pair, prompt=PROMPTS, num_inference_steps=3, guidance_rescale=0.3)
    assert drawn.dtype == torch.bfloat16


@pytest.mark.parametrize("output_type", ["np", "pt", "pil"])
def test_pictures(components: dict[str, Any], output_type: str) -> None:
    """The decoded picture is the same in every format."""
    drawn = [
        pipe(
            PROMPTS,
            num_inference_steps=2,
            generator=seeded(1, 2),
            output_type=output_type,
            return_dict=False,
        )
        for pipe in both(components)
    ]
    (images, unsafe), (stock_images, _) = drawn
    assert unsafe is None
    if output_type == "pt":
        assert torch.equal(images, stock_images)
    elif output_type == "np":
        assert (images == stock_images).all()
    else:
        assert [image.tobytes() for image in images] == [i.tobytes() for i in stock_images]


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_clip_skip(components: dict[str, Any], skip: int) -> None:
    encoder = components["text_encoder"]
    plain = assert_same(both(components), prompt="a red star", num_inference_steps=2)
    # The stock pipeline looks for `text_model`, which transformers 5 folded into the model.
    encoder.__dict__["text_model"] = encoder
    try:
        pair = both(components)
        skipped = assert_same(pair, prompt="a red star", num_inference_steps=2, clip_skip=skip)
    finally:
        del encoder.__dict__["text_model"]
    assert torch.equal(skipped, plain) == (skip == 0)


def test_latents_and_embeds(components: dict[str, Any]) -> None:
    pair = both(components)
    embeds, negative = pair[0].encode_prompt(PROMPTS, "cpu", 1, True, "fog")
    latents = torch.randn(4, 4, 16, 16, generator=seeded(3)[0])
    arguments: dict[str, Any] = {
        "num_inference_steps": 3,
        "num_images_per_prompt": 2,
        "latents": latents,
    }
    given = assert_same(pair, prompt_embeds=embeds, negative_prompt_embeds=negative, **arguments)
    with_words = pair[0](PROMPTS, negative_prompt="fog", output_type="latent", **arguments).images
    assert torch.equal(given, with_words)


def test_encode_prompt(components: dict[str, Any]) -> None:
    """Embeddings are equal one by one, for every way to ask."""
    ours, stock = both(components)
    for negative in (None, ["fog", "rain"]):
        for guided in (False, True):
            mine = ours.encode_prompt(PROMPTS, "cpu", 2, guided, negative)
            theirs = stock.encode_prompt(PROMPTS, "cpu", 2, guided, negative)
            assert torch.equal(mine[0], theirs[0])
            assert (mine[1] is None) == (theirs[1] is None) == (not guided)
            if mine[1] is not None:
                assert torch.equal(mine[1], theirs[1])


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler"])
@pytest.mark.parametrize(
    "callback", [change_latents, change_embeds, change_guidance, stop_early, cut_guidance]
)
def test_callbacks(components: dict[str, Any], name: str, callback: Callable[..., Any]) -> None:
    """A callback changes the run, and changes it as it changes a stock run."""
    pair = both(components, scheduler=scheduler_of(name))
    arguments: dict[str, Any] = {"prompt": "a red star", "num_inference_steps": 5}
    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    changed = assert_same(
        pair,
        **arguments,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=names,
    )
    assert not torch.equal(changed, assert_same(pair, **arguments))


def test_guided_lcm(tiny: Callable[..., dict[str, Any]]) -> None:
    """A UNet that takes the guidance strength as an input: no doubled batch, no negative."""
    pair = both(tiny(time_cond_proj_dim=32), scheduler=scheduler_of("LCMScheduler"))
    arguments: dict[str, Any] = {
        "prompt": PROMPTS,
        "num_inference_steps": 4,
        "generator": lambda: seeded(1, 2),
    }
    strong = assert_same(pair, **arguments, guidance_scale=8.5)
    refused = {"guidance_scale": 8.5, "negative_prompt": ["fog", "rain"]}
    assert torch.equal(strong, assert_same(pair, **arguments, **refused))
    assert not torch.equal(strong, assert_same(pair, **arguments, guidance_scale=3.0))
