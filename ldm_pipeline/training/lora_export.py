"""A trained adapter in the layouts that were asked for, each beside the others in one folder.

pytorch_lora_weights.safetensors    diffusers' layout, which is always there
kohya.safetensors                   kohya's, with the run's record in its header
peft/                               PEFT's, a folder for each component

The headers of all of them name the base model and the words of the captions.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm_pipeline.errors import UserError
from ldm_pipeline.lora import files
from ldm_pipeline.lora.layouts import kohya
from ldm_pipeline.lora.layouts.families import FAMILIES, Family
from ldm_pipeline.lora.layouts.sgm_names import LAYERS
from ldm_pipeline.lora.weights import LoraWeights
from ldm_pipeline.training.adapter_config import AdapterConfig
from ldm_pipeline.training.captioned import Sample

PLACES = {"diffusers": files.FILE_NAME, "kohya": "kohya.safetensors", "peft": "peft"}

WORD = re.compile(r"\w[\w'-]*")

MOST_TAGS = 200
"""So many of the commonest tags are in a header."""


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
    samples: Sequence[Sample],
    updates: int,
) -> None:
    """Write `weights` into `folder`; `notes` are what the header says besides."""
    known = {**origin(config.model, family, samples), **notes}
    for layout in dict.fromkeys(("diffusers", *config.lora.formats)):
        run = record(config, len(samples), updates) if layout == "kohya" else {}
        files.save(folder / PLACES[layout], weights, {**run, **known}, layout, family)


def family_of_unet(config: Any, prediction: str) -> Family:
    """The family of a UNet, by its config, and by what it predicts."""
    if config.addition_embed_type == "text_time":
        return FAMILIES["sdxl"]
    if not config.use_linear_projection:
        return FAMILIES["sd1"]
    return FAMILIES["sd2-v" if prediction == "v_prediction" else "sd2"]


def origin(model: str, family: Family, samples: Sequence[Sample]) -> dict[str, str]:
    """What every header says of where an adapter comes from, under kohya's names: its base (of a
    folder or a file the name alone, not whose machine it is on), the words that all captions share,
    and how often each tag (what stands between commas) occurs."""
    captions = [text for sample in samples for text in sample.item.captions]
    tags = Counter(tag.strip() for text in captions for tag in text.split(",") if tag.strip())
    counts = {"captions": dict(tags.most_common(MOST_TAGS))}
    words = {
        "modelspec.trigger_phrase": shared_words(captions),
        "ss_tag_frequency": json.dumps(counts, ensure_ascii=False) if tags else "",
    }
    return {
        "ss_sd_model_name": Path(model).resolve().name if Path(model).exists() else model,
        "ss_base_model_version": family.version,
        **{name: text for name, text in words.items() if text},
    }


def shared_words(captions: Sequence[str]) -> str:
    """The words of the first caption that are in every other one, too."""
    first, *others = [WORD.findall(caption) for caption in captions] or [[]]
    return " ".join(word for word in dict.fromkeys(first) if all(word in other for other in others))


def record(config: AdapterConfig, samples: int, updates: int) -> dict[str, str]:
    """What kohya's header says of a run: ss_*, each a text. `steps` were made, of `max_train_steps`
    that were asked for (or were made, where fewer are asked for now)."""
    run, optimiser = config.run, config.optimiser
    told = {
        "output_name": run.out.name,
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
