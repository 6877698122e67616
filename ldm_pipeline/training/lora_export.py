"""A trained adapter in the layouts that were asked for, each beside the others in one folder.

pytorch_lora_weights.safetensors    diffusers' layout, which is always there
kohya.safetensors                   kohya's, with the run's record in its header
peft/                               PEFT's, a folder for each component
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm_pipeline.errors import UserError
from ldm_pipeline.lora import files
from ldm_pipeline.lora.layouts import kohya
from ldm_pipeline.lora.layouts.families import FAMILIES, Family
from ldm_pipeline.lora.layouts.sgm_names import LAYERS
from ldm_pipeline.lora.weights import LoraWeights
from ldm_pipeline.training.adapter_config import AdapterConfig

PLACES = {"diffusers": files.FILE_NAME, "kohya": "kohya.safetensors", "peft": "peft"}


def check_formats(config: AdapterConfig, weights: LoraWeights, family: Family, unet: Any) -> None:
    """Raise `UserError` where a layout that is asked for cannot say what will be trained.

    `unet` is the UNet's config.
    """
    if "kohya" not in config.lora.formats:
        return
    if family.sgm and unet.layers_per_block != LAYERS:
        raise UserError(
            f"lora.formats: kohya's layout has names for SDXL's UNet, of {LAYERS} layers in each"
            f" block; this one has {unet.layers_per_block}"
        )
    kohya.spelled(weights, family)


def write_formats(
    folder: Path,
    config: AdapterConfig,
    weights: LoraWeights,
    notes: Mapping[str, str],
    family: Family,
    samples: int,
    updates: int,
) -> None:
    """Write `weights` into `folder`; `notes` are what the header says besides."""
    for layout in dict.fromkeys(("diffusers", *config.lora.formats)):
        told = {**record(config, samples, updates), **notes} if layout == "kohya" else notes
        files.save(folder / PLACES[layout], weights, told, layout, family)


def family_of_unet(config: Any, prediction: str) -> Family:
    """The family of a UNet, by its config, and by what it predicts."""
    if config.addition_embed_type == "text_time":
        return FAMILIES["sdxl"]
    if not config.use_linear_projection:
        return FAMILIES["sd1"]
    return FAMILIES["sd2-v" if prediction == "v_prediction" else "sd2"]


def record(config: AdapterConfig, samples: int, updates: int) -> dict[str, str]:
    """What kohya's header says of a run: ss_*, each a text. `steps` were made, of `max_train_steps`
    that were asked for (or were made, where fewer are asked for now)."""
    run, optimiser = config.run, config.optimiser
    told = {
        "output_name": run.out.name,
        "sd_model_name": config.model,
        "seed": run.seed,
        "steps": updates,
        "max_train_steps": max(run.steps, updates),
        "total_batch_size": run.batch_size,
        "num_train_images": samples,
        "learning_rate": optimiser.lr,
        "optimizer": optimiser.kind,
        "lr_warmup_steps": optimiser.warmup_steps,
        "max_grad_norm": optimiser.max_grad_norm,
        "gradient_checkpointing": config.gradient_checkpointing,
        "mixed_precision": run.mixed_precision,
    }
    return {f"ss_{name}": str(value) for name, value in told.items()}
