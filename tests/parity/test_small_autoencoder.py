"""AutoencoderTiny as the autoencoder: every task as stock draws it with the same one, bit for bit.

Its encoder draws no noise, so that what is drawn after a picture was encoded differs from what the
large one leaves; DDPM's fresh noise shows whether both agree on that.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)

import ldm_pipeline
from ldm_pipeline import LatentDiffusionPipeline
from tests.conftest import tiny_small_vae
from tests.parity.pairs import drawn_by_both, mask, picture, scheduler_of, seeded
from tests.parity.test_every_task import arguments, every_task, pair_for
from tests.parity.test_stable_diffusion_xl import both as both_xl

XL: dict[str, tuple[Any, dict[str, Any]]] = {
    "text-to-image": (StableDiffusionXLPipeline, {}),
    "image-to-image": (StableDiffusionXLImg2ImgPipeline, {"image": picture()}),
    "inpainting": (StableDiffusionXLInpaintPipeline, {"image": picture(), "mask_image": mask()}),
}


@pytest.fixture
def small() -> dict[str, Any]:
    """What takes the place of the large autoencoder, and a sampler that shows all noise."""
    return {"vae": tiny_small_vae(), "scheduler": scheduler_of("DDPMScheduler")}


@every_task
@pytest.mark.parametrize(
    "more", [{}, {"strength": 0.6, "num_inference_steps": 5}], ids=["whole", "part"]
)
def test_every_task(
    components: dict[str, Any], small: dict[str, Any], task: str, more: dict[str, Any]
) -> None:
    if task == "text-to-image" and more:
        return  # there is no strength without a picture
    told = {**arguments(task), **more, "output_type": "pt"}
    pair = pair_for(task, {**components, **small})
    ours, theirs = drawn_by_both(pair, **told)
    assert torch.equal(ours, theirs)
    large = pair_for(task, {**components, "scheduler": small["scheduler"]})
    other, _ = drawn_by_both(large, **told)
    assert not torch.equal(ours, other)


@pytest.mark.parametrize("task", XL)
def test_every_task_of_sdxl(
    tiny_xl: Callable[[], dict[str, Any]], small: dict[str, Any], task: str
) -> None:
    stock, inputs = XL[task]
    told = {"num_inference_steps": 4, "generator": lambda: seeded(1), **inputs}
    pair = both_xl({**tiny_xl(), **small}, stock)
    ours, theirs = drawn_by_both(pair, prompt="a red star", output_type="pt", **told)
    assert torch.equal(ours, theirs)


def test_an_image_does_not_depend_on_its_batch(
    components: dict[str, Any], small: dict[str, Any]
) -> None:
    pipe = LatentDiffusionPipeline(**{**components, **small})
    pipe.set_progress_bar_config(disable=True)
    told: dict[str, Any] = {"image": picture(), "num_inference_steps": 3, "output_type": "latent"}
    pair = pipe(["a red star", "a fish"], seed=5, **told).images
    alone = pipe("a fish", seed=6, **told).images
    # The UNet's rounding in a batch of another size, in float32.
    assert (pair[1:] - alone).abs().max() < 1e-4


def test_a_folder_goes_both_ways(
    components: dict[str, Any], small: dict[str, Any], tmp_path: Path
) -> None:
    """What we save stock opens, and draws the same; and so do we."""
    LatentDiffusionPipeline(**{**components, **small}).save_pretrained(tmp_path)
    pair = (ldm_pipeline.load(tmp_path), StableDiffusionPipeline.from_pretrained(tmp_path))
    for pipe in pair:
        pipe.set_progress_bar_config(disable=True)
    told = {"prompt": "a red star", "num_inference_steps": 2, "generator": lambda: seeded(1)}
    ours, theirs = drawn_by_both(pair, output_type="pt", **told)
    assert torch.equal(ours, theirs)
