"""Train the autoencoder.

On one process or on as many as accelerate is told:

    accelerate launch train/train_autoencoder.py --config configs/autoencoder_tiny.yaml
"""

from ldm_pipeline.training.autoencoder import AutoencoderConfig, AutoencoderObjective
from ldm_pipeline.training.launch import launch

if __name__ == "__main__":
    launch(AutoencoderConfig, AutoencoderObjective)
