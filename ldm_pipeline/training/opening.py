"""Opening models to train on: SDXL as stock diffusers' pipeline, with our rules of safety.

Whoever trains is given a function that opens models; the training scripts give `open_model`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download

from ldm_pipeline.errors import UserError
from ldm_pipeline.models import folders
from ldm_pipeline.models.quiet import quiet_transformers

with quiet_transformers():
    from diffusers import StableDiffusionXLPipeline


def open_model(source: str, dtype: torch.dtype) -> DiffusionPipeline:
    """The model that `model` names in a configuration: a folder, a file, a hub id or bundled."""
    from ldm_pipeline import load

    return open_xl(source, dtype) if is_xl(source) else load(source, torch_dtype=dtype)


def is_xl(source: str) -> bool:
    """Whether the model folder or hub id `source` says that it is an SDXL pipeline.

    False also where nothing can be read: whoever opens it then says why.
    """
    if source == "bundled":
        return False
    folder = Path(source).expanduser()
    try:
        if not folder.is_dir():
            folder = Path(hf_hub_download(source, folders.INDEX)).parent
        return folders.is_xl(folders.index(folder))
    except (OSError, ValueError):  # the hub's own errors are of these kinds, as ours are
        return False


def open_xl(source: str, dtype: torch.dtype) -> StableDiffusionXLPipeline:
    """The SDXL pipeline in a Diffusers folder or of a hub id, in `dtype`.

    The autoencoder comes in float32: it speaks once for each picture, and the original one
    overflows in float16. Raises `UserError` as `LatentDiffusionPipeline.from_pretrained` does.
    """
    try:
        folder = Path(source).expanduser()
        if not folder.is_dir():
            folder = Path(StableDiffusionXLPipeline.download(source, use_safetensors=True))
        folders.check(folder, StableDiffusionXLPipeline._get_signature_types())
        return StableDiffusionXLPipeline.from_pretrained(
            str(folder),
            torch_dtype={"default": dtype, "vae": torch.float32},
            variant=folders.only_variant(folder),
            use_safetensors=True,
            add_watermarker=False,
        )
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{source} cannot be loaded: {reason}") from error
