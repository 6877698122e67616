"""Embeddings of pictures as prompts: one shape with guidance, the same or half of it without."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ldm_pipeline import LatentDiffusionPipeline
from ldm_pipeline.errors import UserError
from tests.parity.features import adapter_weights, save_adapters


@pytest.fixture
def pipe(tiny: Callable[..., dict[str, Any]], tmp_path: Path) -> Any:
    """A pipeline with an IP-Adapter that reads embeddings of 16 channels."""
    made = LatentDiffusionPipeline(**tiny())
    made.set_progress_bar_config(disable=True)
    save_file(adapter_weights(made.unet), tmp_path / "ip.safetensors")
    made.load_ip_adapter(str(tmp_path), "", "ip.safetensors", image_encoder_folder=None)
    return made


def draw(pipe: Any, embeds: torch.Tensor, guidance: float) -> torch.Tensor:
    """The latents of two images."""
    drawn: torch.Tensor = pipe(
        "a red star", num_inference_steps=1, num_images_per_prompt=2, seed=1, output_type="latent",
        guidance_scale=guidance, ip_adapter_image_embeds=[embeds],
    ).images  # fmt: skip
    return drawn


def test_without_guidance_the_negative_half_is_left_out(pipe: Any) -> None:
    """For every image of the run."""
    halves = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(1))
    told = draw(pipe, halves[1:], 1.0)
    assert torch.equal(draw(pipe, halves, 1.0), told)
    assert not torch.equal(draw(pipe, halves.flip(0), 1.0), told)
    assert draw(pipe, halves, 3.0).isfinite().all()


@pytest.mark.parametrize(
    ("shape", "guidance", "said"),
    [
        ((1, 1, 16), 7.5, r"holds \(1, 1, 16\); each must be \[2, pictures, channels\]"),
        ((4, 1, 16), 7.5, r"holds \(4, 1, 16\); each must be \[2, pictures, channels\]"),
        ((4, 1, 16), 1.0, r"holds \(4, 1, 16\); each must be \[1, pictures, channels\]"),
        ((2, 16), 7.5, r"holds \(2, 16\)"),
    ],
)
def test_other_shapes_are_refused_before_any_network_runs(
    pipe: Any, shape: tuple[int, ...], guidance: float, said: str
) -> None:
    called: list[object] = []
    pipe.text_encoder.register_forward_pre_hook(lambda *_: called.append(1))
    with pytest.raises(UserError, match=said) as refused:
        draw(pipe, torch.zeros(shape), guidance)
    assert "\n" not in str(refused.value)
    assert called == []


def test_an_image_encoder_of_the_hub_is_checked(
    tiny: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """As one in a folder is, before it is opened."""
    pipe = LatentDiffusionPipeline(**tiny())
    repository = tmp_path / "models--somebody--adapter"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    save_adapters(snapshot, pipe.unet)
    config = snapshot / "models/image_encoder/config.json"
    good = config.read_text()
    told: dict[str, Any] = {"cache_dir": tmp_path, "local_files_only": True}
    config.write_text(json.dumps({**json.loads(good), "attn_implementation": "evil/kernel"}))
    with pytest.raises(UserError, match="names a kernel to fetch"):
        pipe.load_ip_adapter("somebody/adapter", "models", "0.safetensors", **told)
    config.write_text(good)
    pipe.load_ip_adapter("somebody/adapter", "models", "0.safetensors", **told)
    assert pipe.image_encoder is not None
