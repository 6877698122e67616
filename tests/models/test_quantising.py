"""Rounded weights: a little another picture, in far less memory, and whole weights are never lost
without a word. torchao is an extra, and where it is missing all but the refusals are left out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipeline import LatentDiffusionPipeline, LatentDiffusionXLPipeline, Memory
from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.attach import attach
from ldm_pipeline.lora.files import save
from ldm_pipeline.lora.fusing import Fused
from ldm_pipeline.lora.inject import inject
from ldm_pipeline.lora.targets import LoraSettings
from ldm_pipeline.models import offloading, quantising
from ldm_pipeline.models.quantising import quantised

Build = Callable[..., dict[str, Any]]

needs_torchao = pytest.mark.skipif(
    find_spec("torchao") is None, reason="torchao is not installed (the extra `quantise`)"
)


@pytest.fixture(params=["sd", "sdxl"])
def pipe(request: pytest.FixtureRequest, tiny: Build, tiny_xl: Build) -> LatentDiffusionPipeline:
    """A tiny pipeline of each shape, of its own."""
    if request.param == "sdxl":
        return LatentDiffusionXLPipeline(**tiny_xl(), add_watermarker=False)
    return LatentDiffusionPipeline(**tiny())


def draw(pipe: Any, **told: Any) -> Tensor:
    """One picture [1, 3, H, W] in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    told = {"num_inference_steps": 2, "output_type": "pt", "seed": 3, **told}
    drawn: Tensor = pipe("a red star", **told).images
    return drawn


@pytest.fixture
def style(tiny: Build, tmp_path: Path) -> Path:
    """The file of a LoRA of the tiny UNet's attention that changes every picture."""
    adapter = inject({"unet": tiny()["unet"]}, LoraSettings(["mid_block.*.attn2"]), seed=0)
    with torch.no_grad():
        for parameter in adapter.parameters.values():
            parameter.add_(0.3)
    return save(tmp_path / "style.safetensors", adapter.weights())


@needs_torchao
@pytest.mark.parametrize("how, apart", [("int8", 0.02), ("float8", 0.05)])
def test_weights_are_rounded_and_pictures_nearly_stay(pipe: Any, how: str, apart: float) -> None:
    """Rows in 8 bits are off by a 250th of their greatest entry, or by a 16th of each."""
    plain = draw(pipe)
    exact = copy.deepcopy(dict(pipe.unet.named_parameters()))
    pipe.arrange(Memory(quantise=how))
    assert quantised(pipe.unet) == how
    drawn = draw(pipe)
    assert 0 < (drawn - plain).abs().max() <= apart
    rounded = {n for n, w in pipe.unet.named_parameters() if type(w) is not type(exact[n])}
    layers = {n for n in exact if "attentions." in n and n.endswith("weight") and exact[n].ndim > 1}
    assert rounded == {n for n in layers if "proj_" not in n or exact[n].ndim == 2}
    assert torch.equal(draw(pipe.arrange(Memory(quantise=how))), drawn), "nothing twice"


@needs_torchao
def test_what_cannot_be_done_with_rounded_weights_is_refused(tiny: Build, tmp_path: Path) -> None:
    pipe = LatentDiffusionPipeline(**tiny()).arrange(Memory(quantise="int8"))
    for memory in (Memory(), Memory(quantise="float8")):
        with pytest.raises(UserError, match="rounded to int8; open the model anew"):
            pipe.arrange(memory)
    with pytest.raises(UserError, match="rounded to int8, and are not saved"):
        pipe.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="the weights were rounded"):
        Fused(pipe)


@needs_torchao
def test_adapters_stand_beside_rounded_weights(tiny: Build, style: Path) -> None:
    """Attached before or after the rounding, or for a few steps; their own weights stay exact."""
    bare = draw(LatentDiffusionPipeline(**tiny()).arrange(Memory(quantise="int8")))
    before = LatentDiffusionPipeline(**tiny())
    attach(before, [(style, 1.0)])
    with_style = draw(before)
    before.arrange(Memory(quantise="int8"))
    after = LatentDiffusionPipeline(**tiny()).arrange(Memory(quantise="int8"))
    few = draw(after, lcm=style)
    attach(after, [(style, 1.0)])
    assert torch.equal(draw(before), draw(after))
    assert (draw(after) - with_style).abs().max() <= 0.02
    assert (draw(after) - bare).abs().max() > 0.02
    assert few.isfinite().all()


@needs_torchao
@pytest.mark.parametrize("how", ["parts", "layers"])
def test_rounded_weights_come_and_go(
    tiny: Build, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offloading, "check", lambda how, device: None)
    pipe = LatentDiffusionPipeline(**tiny()).arrange(Memory(quantise="int8"))
    drawn = draw(pipe)
    assert torch.equal(draw(pipe.arrange(Memory(quantise="int8", offload=how))), drawn)


def test_without_torchao_one_line_says_what_to_install(
    tiny: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantising, "find_spec", lambda name: None)
    pipe = LatentDiffusionPipeline(**tiny())
    with pytest.raises(UserError, match=r"quantise='int8' needs torchao.*ldm-pipeline\[quantise\]"):
        pipe.arrange(Memory(quantise="int8", attention="sliced"))
    assert quantised(pipe.unet) == "none"
    pipe.arrange(Memory())
