"""Train a small decoder for an autoencoder.

On one process or on as many as accelerate is told:

    accelerate launch train/train_small_decoder.py --config configs/decoder_tiny.yaml
"""

from ldm_pipeline.training.launch import launch
from ldm_pipeline.training.small_decoder import SmallDecoderConfig, SmallDecoderObjective

if __name__ == "__main__":
    launch(SmallDecoderConfig, SmallDecoderObjective)
