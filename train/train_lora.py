"""Train a LoRA on a folder of captioned pictures.

On one process or on as many as accelerate is told:

    accelerate launch train/train_lora.py --config configs/lora_tiny.yaml
"""

from functools import partial

from ldm_pipeline.training.launch import launch
from ldm_pipeline.training.lora import LoraConfig, LoraObjective
from ldm_pipeline.training.opening import open_model

if __name__ == "__main__":
    launch(LoraConfig, partial(LoraObjective, open_model=open_model))
