"""Opening models to train on.

Whoever trains is given a function that opens models; the training scripts give `open_model`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ldm_pipeline import LatentDiffusionPipeline


def open_model(source: str, dtype: torch.dtype) -> LatentDiffusionPipeline:
    """The model that `model` names in a configuration: a folder, a file, a hub id or bundled.

    Its autoencoder comes in float32: it speaks once for each picture, and SDXL's original one
    overflows in float16. Its pictures have no watermark. Raises `UserError` for what cannot be
    opened, as `ldm_pipeline.load`.
    """
    from ldm_pipeline import load

    pipe = load(source, dtype={"default": dtype, "vae": torch.float32})
    if hasattr(pipe, "watermark"):
        pipe.watermark = None
    return pipe
