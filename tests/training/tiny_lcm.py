"""A distillation over the tests' tiny components, as a module: what several processes run.

python -m tests.training.tiny_lcm --data.source DIR --run.out DIR ...
"""

from __future__ import annotations

from functools import partial

import torch

from ldm_pipeline.training.launch import launch
from ldm_pipeline.training.lcm import LcmConfig, LcmObjective
from tests.training.tiny_lora import open_model

if __name__ == "__main__":
    torch.set_num_threads(1)
    launch(LcmConfig, partial(LcmObjective, open_model=open_model))
