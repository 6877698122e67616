"""Distil a LoRA with which a model draws in few steps, or with `lcm.full` a whole UNet that does.

On one process or on as many as accelerate is told:

    accelerate launch train/train_lcm.py --config configs/lcm_tiny.yaml
"""

from functools import partial

from ldm_pipeline.training.launch import launch
from ldm_pipeline.training.lcm import LcmConfig
from ldm_pipeline.training.lcm_full import distillation
from ldm_pipeline.training.opening import open_model

if __name__ == "__main__":
    launch(LcmConfig, partial(distillation, open_model=open_model))
