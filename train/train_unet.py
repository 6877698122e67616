"""Train the latent diffusion model.

On one process or on as many as accelerate is told:

    accelerate launch train/train_unet.py --config configs/unet_tiny.yaml
"""

from ldm_pipeline.training.latent_diffusion import LatentDiffusionConfig, LatentDiffusionObjective
from ldm_pipeline.training.launch import launch

if __name__ == "__main__":
    launch(LatentDiffusionConfig, LatentDiffusionObjective)
