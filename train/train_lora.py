"""Train a LoRA on a folder of captioned pictures.

On one process or on as many as accelerate is told:

    accelerate launch train/train_lora.py --config configs/lora_tiny.yaml
"""

from functools import partial

import torch

from ldm_pipeline import LatentDiffusionPipeline, load
from ldm_pipeline.training.launch import launch
from ldm_pipeline.training.lora import LoraConfig, LoraObjective


def open_model(source: str, dtype: torch.dtype) -> LatentDiffusionPipeline:
    """The model that `model` names in the configuration."""
    return load(source, torch_dtype=dtype)


if __name__ == "__main__":
    launch(LoraConfig, partial(LoraObjective, open_model=open_model))
