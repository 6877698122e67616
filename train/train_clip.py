"""Train the text encoder.

On one process or on as many as accelerate is told:

    accelerate launch train/train_clip.py --config configs/clip_tiny.yaml
"""

from ldm_pipeline.training.clip import ClipConfig, ClipObjective
from ldm_pipeline.training.launch import launch

if __name__ == "__main__":
    launch(ClipConfig, ClipObjective)
