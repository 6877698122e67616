"""What the LoRA tests share.

pipe     our pipeline over tiny components of its own, which a test may change
adapt    adapt(pipe, kind, seed=0, **settings): a LoRA in the UNet and text encoder of a pipeline,
         with random values in all that is trained, so that it changes every picture
draw     draw(pipe, **arguments): one picture [1, H, W, 3] of one step
FEW      targets of every sort, few of each, because each costs milliseconds; BLOCKS, the UNet's
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ldm_pipeline import LatentDiffusionPipeline
from ldm_pipeline.lora.inject import Adapter, inject
from ldm_pipeline.lora.targets import LoraSettings, Override

Adapt = Callable[..., Adapter]
Draw = Callable[..., torch.Tensor]

BLOCKS = ("mid_block.*.attn2", "mid_block.*.proj_in", "downsamplers")
FEW = (*BLOCKS, "v_proj")

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"dora": True},
    "rslora": {"rslora": True},
}


@pytest.fixture(autouse=True)
def _patient_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for the disk: what is flushed, and when, is looked at by name."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """LoRA, DoRA and rsLoRA."""
    return str(request.param)


@pytest.fixture
def pipe(tiny: Callable[..., dict[str, Any]]) -> LatentDiffusionPipeline:
    """Our pipeline over tiny components of its own."""
    return LatentDiffusionPipeline(**tiny())


@pytest.fixture(scope="session")
def adapt() -> Adapt:
    """Puts a LoRA with random values into a pipeline's UNet and text encoder."""

    def adapt(pipe: Any, kind: str = "lora", seed: int = 0, **settings: Any) -> Adapter:
        chosen: dict[str, Any] = {
            "targets": FEW,
            "rank": 4,
            "alpha": 3,
            "overrides": {"mid_block": Override(rank=2, alpha=7), "v_proj": Override(rank=3)},
        }
        models = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
        settings = {**chosen, **KINDS[kind], **settings}
        adapter = inject(models, LoraSettings(**settings), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter.parameters.values():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        return adapter

    return adapt


@pytest.fixture(scope="session")
def draw() -> Draw:
    """Draws one picture of one step."""

    def draw(pipe: Any, **arguments: Any) -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        chosen = {"num_inference_steps": 1, "output_type": "np", **arguments}
        generator = torch.Generator().manual_seed(5)
        return torch.from_numpy(pipe("a red star", generator=generator, **chosen).images)

    return draw
