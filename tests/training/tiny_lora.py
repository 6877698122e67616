"""A LoRA run over the tests' tiny components, as a module: what several processes are started with.

python -m tests.training.tiny_lora [--model xl] --data.source DIR --run.out DIR ...
"""

from __future__ import annotations

from functools import partial

import torch

from ldm_pipeline import LatentDiffusionPipeline, LatentDiffusionXLPipeline
from ldm_pipeline.training.launch import launch
from ldm_pipeline.training.lora import LoraConfig, LoraObjective
from tests.conftest import build, build_xl


def open_model(source: str, dtype: torch.dtype) -> LatentDiffusionPipeline:
    """The tiny pipeline of SDXL's shape for "xl", else that of Stable Diffusion."""
    if source == "xl":
        return LatentDiffusionXLPipeline(**build_xl(), add_watermarker=False).to(dtype)
    return LatentDiffusionPipeline(**build()).to(dtype)


if __name__ == "__main__":
    torch.set_num_threads(1)
    launch(LoraConfig, partial(LoraObjective, open_model=open_model))
