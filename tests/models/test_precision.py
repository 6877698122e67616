"""An autoencoder that overflows in float16 gives finite pictures all the same.

loud     latents or pictures on which the autoencoder of `narrow` overflows
quiet    others, on which it does not
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipeline import LatentDiffusionPipeline, LatentDiffusionXLPipeline, Memory
from ldm_pipeline.models.autoencoder import decode, encode

Build = Callable[..., dict[str, Any]]

LOUD = 3e4
"""Times the weights of a first convolution: what it says of numbers about 1 passes 65,504."""


@pytest.fixture
def narrow(tiny: Build) -> Any:
    """An autoencoder in float16, both of whose halves overflow unless what they read is quiet."""
    vae = tiny()["vae"]
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(LOUD)
        vae.decoder.conv_in.weight.mul_(LOUD)
    return vae.half()


@pytest.fixture
def rows() -> Tensor:
    """A quiet row and a loud one, [2, 4, 16, 16]."""
    z = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    return torch.stack([z[0] * 1e-2, z[1] * 4]).half()


def said(caplog: pytest.LogCaptureFixture) -> int:
    return sum(record.levelno >= logging.WARNING for record in caplog.records)


@torch.no_grad()
def test_only_what_overflows_is_decoded_anew(
    narrow: Any, rows: Tensor, tiny: Build, caplog: pytest.LogCaptureFixture
) -> None:
    raw = rows / narrow.config.scaling_factor
    tried = [narrow.decode(row[None]).sample.isfinite().all() for row in raw]
    assert tried == [True, False], "the test needs one of each"
    drawn = decode(narrow, rows)
    assert drawn.isfinite().all()
    wide = tiny()["vae"]
    wide.load_state_dict({k: v.float() for k, v in narrow.state_dict().items()})
    assert torch.equal(drawn[1:], wide.decode(raw[1:].float()).sample)
    alike = decode(narrow, rows[:1].repeat(2, 1, 1, 1))[:1].float()
    assert torch.equal(drawn[:1], alike), "its neighbour does not matter"
    assert narrow.dtype == torch.float16
    assert said(caplog) == 1, "once, however often"


@torch.no_grad()
def test_pictures_that_overflow_are_encoded_anew(
    narrow: Any, caplog: pytest.LogCaptureFixture
) -> None:
    loud = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)).half() * 2 - 1
    loud *= 40
    assert not narrow.encode(loud).latent_dist.mean.isfinite().all(), "the test needs it"
    mean, std = encode(narrow, loud)
    assert mean.isfinite().all()
    assert std.isfinite().all()
    assert said(caplog) == 1


@torch.no_grad()
def test_tiles_and_slices_stay_on(narrow: Any, rows: Tensor) -> None:
    """In tiles, 24 x 24 latents are not decoded as in one piece."""
    loud = torch.randn(1, 4, 24, 24, generator=torch.Generator().manual_seed(1)) * 4
    plain = decode(narrow, loud.half())
    narrow.enable_tiling()
    tiled = decode(narrow, loud.half())
    assert tiled.isfinite().all()
    assert not torch.equal(tiled, plain)


@pytest.mark.parametrize("how", ["none", "layers"])
def test_a_pipeline_in_float16_draws(
    narrow: Any, tiny: Build, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where layers come and go, too. The bound is float16's 11 bits, over two steps."""
    from ldm_pipeline.models import offloading

    monkeypatch.setattr(offloading, "check", lambda how, device: None)
    parts = {**tiny(), "vae": narrow}
    pipe = LatentDiffusionPipeline(**parts).to(torch.float16)
    pipe.set_progress_bar_config(disable=True)
    pipe.arrange(Memory(offload=how))
    told = {"num_inference_steps": 2, "seed": [1, 2], "output_type": "pt"}
    drawn = pipe(["a red star", "two boats"], **told).images
    assert drawn.isfinite().all()
    z = pipe(["a red star", "two boats"], **{**told, "output_type": "latent"}).images
    assert not narrow.decode(z / narrow.config.scaling_factor).sample.isfinite().all()
    assert drawn.float().std() > 0.01, "a picture, not one grey"


def test_one_that_says_so_is_kept_wide(tiny_xl: Build, caplog: pytest.LogCaptureFixture) -> None:
    """Stock SDXL widens it for each picture; it is done once here, and said once."""
    pipe = LatentDiffusionXLPipeline(**tiny_xl(), add_watermarker=False).to(torch.float16)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.vae.config.force_upcast
    caplog.clear()
    for _ in range(2):
        drawn = pipe("a red star", num_inference_steps=1, output_type="pt").images
        assert drawn.isfinite().all()
    assert pipe.vae.dtype == torch.float32
    assert pipe.unet.dtype == torch.float16
    assert caplog.text.count("kept in float32 from here") == 1
