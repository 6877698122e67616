"""The small autoencoder in place of a model's own: found, checked, and drawn with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny

import ldm_pipeline
from ldm_pipeline import LatentDiffusionPipeline
from ldm_pipeline.errors import UserError
from ldm_pipeline.models import bundled, small_decoder
from tests.conftest import tiny_small_vae


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The folder of a small autoencoder."""
    tiny_small_vae().save_pretrained(tmp_path / "small-one")
    return tmp_path / "small-one"


@pytest.fixture
def model(tmp_path: Path, tiny: Callable[..., dict[str, Any]]) -> Path:
    """A saved tiny pipeline."""
    LatentDiffusionPipeline(**tiny()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_it_takes_the_place_of_the_model_s_own(model: Path, small: Path) -> None:
    """The latents are the same ones; the large autoencoder is not opened at all."""
    full, quick = ldm_pipeline.load(model), ldm_pipeline.load(model, decoder=small)
    assert isinstance(quick.vae, AutoencoderTiny)
    told: dict[str, Any] = {"num_inference_steps": 2, "seed": 1}
    for pipe in (full, quick):
        pipe.set_progress_bar_config(disable=True)
    z = [pipe("a red star", output_type="latent", **told).images for pipe in (full, quick)]
    assert torch.equal(*z)
    pictures = quick("a red star", output_type="pt", **told).images
    wanted = quick.vae.decode(z[0] / quick.vae.config.scaling_factor).sample
    assert torch.equal(pictures, (wanted / 2 + 0.5).clamp(0, 1))
    (model / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert ldm_pipeline.load(model, decoder=small, dtype=torch.bfloat16).vae.dtype == torch.bfloat16
    for dtype in ({"default": "bfloat16"}, {"unet": "float16", "vae": "bfloat16"}):
        assert ldm_pipeline.load(model, decoder=small, dtype=dtype).vae.dtype == torch.bfloat16


def test_small_is_the_bundled_model_s(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundled, "ASSETS", tmp_path)
    with pytest.raises(UserError, match="this installation has no small decoder"):
        small_decoder.find("small", of_bundled=True)
    small.rename(tmp_path / "decoder")
    assert small_decoder.find("small", of_bundled=True) == tmp_path / "decoder"
    with pytest.raises(UserError, match="is the bundled model's; name the folder"):
        small_decoder.find("small", of_bundled=False)


def test_what_is_none_is_refused_before_anything_is_opened(model: Path, small: Path) -> None:
    for place, words in (
        ("nowhere", "is no folder of an AutoencoderTiny"),
        (model, "is no folder of an AutoencoderTiny"),
        (model / "vae", "holds 'AutoencoderKL'|holds AutoencoderKL"),
    ):
        with pytest.raises(UserError, match=words):
            ldm_pipeline.load(model, decoder=place)
    (small / "code.py").write_text("")
    with pytest.raises(UserError, match="brings code of its own"):
        small_decoder.find(small, of_bundled=False)
    (small / "code.py").unlink()
    (small / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no \.safetensors file of weights"):
        small_decoder.find(small, of_bundled=False)


def test_one_of_other_latents_is_refused(model: Path, tmp_path: Path) -> None:
    tiny_small_vae(latent_channels=16).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="latents of 16 channels, and this model draws 4"):
        ldm_pipeline.load(model, decoder=tmp_path / "other")
