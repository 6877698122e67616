"""Distil a LoRA with which a model draws in few steps, or with `lcm.full` a whole UNet that does.

On one process or on as many as accelerate is told:

    accelerate launch train/train_lcm.py --config configs/lcm_tiny.yaml
"""

from functools import partial

import torch
from diffusers import DiffusionPipeline

from ldm_pipeline import load
from ldm_pipeline.training.launch import launch
from ldm_pipeline.training.lcm import LcmConfig
from ldm_pipeline.training.lcm_full import distillation
from ldm_pipeline.training.opening import is_xl, open_xl


def open_model(source: str, dtype: torch.dtype) -> DiffusionPipeline:
    """The model that `model` names in the configuration."""
    return open_xl(source, dtype) if is_xl(source) else load(source, torch_dtype=dtype)


if __name__ == "__main__":
    launch(LcmConfig, partial(distillation, open_model=open_model))
