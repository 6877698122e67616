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
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
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


@pytest.fixture
def half_xl(tiny_xl: Build) -> Any:
    """An SDXL pipeline in float16, whose autoencoder says that it overflows in it."""
    pipe = LatentDiffusionXLPipeline(**tiny_xl(), add_watermarker=False).to(torch.float16)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.vae.config.force_upcast
    return pipe


def shown(pipe: Any, **told: Any) -> Tensor:
    """One picture of one step."""
    generator = torch.Generator().manual_seed(1)
    chosen = {"num_inference_steps": 1, "output_type": "pt", "generator": generator, **told}
    drawn: Tensor = pipe("a red star", **chosen).images
    assert drawn.isfinite().all()
    return drawn


@pytest.mark.parametrize("out_of", ["words", "picture"])
def test_stock_draws_the_same_with_the_autoencoder_that_it_shares(
    half_xl: Any, out_of: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Before and after ours, and where its weights were changed between; ours says once that it
    takes float32."""
    told: dict[str, Any] = {}
    kind: Any = StableDiffusionXLPipeline
    if out_of == "picture":
        pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
        kind, told = StableDiffusionXLImg2ImgPipeline, {"image": pixels, "strength": 1.0}
    stock = kind(**half_xl.components, add_watermarker=False)
    stock.set_progress_bar_config(disable=True)
    caplog.clear()
    drawn = []
    for _ in range(2):
        drawn.append(shown(stock, **told))
        # Stock scales a picture's latents after it rounds them to float16's 11 bits, ours before.
        apart = 0.0 if out_of == "words" else 4 * 2**-11
        assert (shown(half_xl, **told) - drawn[-1]).abs().max() <= apart
        assert torch.equal(shown(stock, **told), drawn[-1])
        assert half_xl.vae.dtype == half_xl.unet.dtype == torch.float16
        with torch.no_grad():
            half_xl.vae.decoder.conv_out.weight.mul_(1.5)
    assert not torch.equal(*drawn)
    assert caplog.text.count("it is computed with in float32") == 1


@pytest.mark.parametrize("how", ["fused", "wrapped", "offloaded", "layer by layer"])
def test_it_is_widened_whatever_was_done_to_it(half_xl: Any, how: str) -> None:
    """An offloaded one lets the others make room before it decodes, as its own methods do."""
    plain = shown(half_xl)
    if how == "fused":
        half_xl.fuse_qkv_projections(unet=False)
    elif how == "wrapped":
        half_xl.vae = torch.compile(half_xl.vae)
    elif how == "offloaded":
        cpu_offload_with_hook(half_xl.vae, torch.device("cpu"))
        asked: list[Any] = []
        half_xl.vae._hf_hook.pre_forward = asked.append
    else:
        cpu_offload(half_xl.vae, torch.device("cpu"))
        assert half_xl.vae.decoder.conv_out.weight.is_meta
    assert torch.equal(shown(half_xl), plain)
    assert how != "offloaded" or asked
