"""AutoencoderTiny as the autoencoder: alone and in a batch, and in folders.

The table of parity has every task with it, against stock.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

import ldm_pipeline
from ldm_pipeline import LatentDiffusionPipeline
from tests.conftest import tiny_small_vae
from tests.parity.pairs import drawn_by_both, picture, scheduler_of, seeded


@pytest.fixture
def small() -> dict[str, Any]:
    """What takes the place of the large autoencoder, and a sampler that shows all noise."""
    return {"vae": tiny_small_vae(), "scheduler": scheduler_of("DDPMScheduler")}


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
