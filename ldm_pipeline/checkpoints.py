"""Which pipeline a model is for: `load` picks the class from what it finds, and diffusers' own
pickers can be taught our classes.

A model is the bundled one, a folder in Diffusers layout, one `.safetensors` file in the original
layout, or an id of the Hugging Face hub.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ldm_pipeline.errors import UserError
from ldm_pipeline.loading import Dtypes, dtypes, single_file
from ldm_pipeline.models import bundled, folders, small_decoder
from ldm_pipeline.models.hub import fetched_index
from ldm_pipeline.models.precision import of_component
from ldm_pipeline.pipeline import LatentDiffusionPipeline
from ldm_pipeline.pipeline_xl import LatentDiffusionXLPipeline
from ldm_pipeline.stock_arguments import check_no_code
from ldm_pipeline.values import check_path


def load(
    source: str | os.PathLike[str] = "bundled",
    *,
    dtype: Dtypes | None = None,
    torch_dtype: Dtypes | None = None,
    variant: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    prediction_type: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    decoder: str | os.PathLike[str] | None = None,
    custom_pipeline: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
) -> LatentDiffusionPipeline:
    """The pipeline for the model that `source` names: Stable Diffusion 1.x, 2.x or SDXL.

    `dtype` (`torch_dtype` is its older name), torch's or its name, is float32 unless given; a
    dictionary says it by component. `variant`, `revision`, `cache_dir`, `token` and
    `local_files_only` are for folders and the hub, as they are in `from_pretrained`;
    HF_HUB_OFFLINE is honoured. `prediction_type` and `tokenizer`
    are for single files: what the UNet predicts ("epsilon" or "v_prediction"), and a folder with
    CLIP's vocabulary, where the file and this machine do not tell. `decoder` is the folder of a
    small autoencoder (`AutoencoderTiny`) to take in place of the model's own; "small" is the
    bundled model's, where it has one. Raises `UserError`, one line, for what cannot be opened, or
    not safely, and where `custom_pipeline` or `trust_remote_code` ask for code of others.
    """
    check_no_code(custom_pipeline, trust_remote_code)
    check_path("source", source)
    place = bundled.folder() if source == "bundled" else Path(source).expanduser()
    wanted = dtypes(dtype, torch_dtype)
    parts: dict[str, Any] = {}
    if decoder is not None:
        small = small_decoder.find(decoder, of_bundled=source == "bundled")
        parts["vae"] = small_decoder.opened(small, of_component(wanted, "vae"))
    if place.is_file():
        for name, value in {"variant": variant, "revision": revision}.items():
            if value is not None:
                raise UserError(f"{name} is for folders and hub ids, and {source} is a file")
        checkpoint = single_file(
            place, prediction_type=prediction_type, tokenizer=tokenizer, given=parts
        )
        cls = _class(checkpoint.family.is_xl)
        made = cls.from_checkpoint(checkpoint, wanted, parts)
        return _fitting(made, parts)
    asked = {"prediction_type": prediction_type, "tokenizer": tokenizer}
    for name, given in asked.items():
        if given is not None:
            raise UserError(f"{name} is for single files; {source} tells it by itself")
    hub: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token}
    hub["local_files_only"] = local_files_only
    contents = folders.index(place) if place.is_dir() else fetched_index(str(source), **hub)
    pipeline = _class(folders.is_xl(contents)).from_pretrained(
        place if place.is_dir() else source,
        dtype=wanted,
        variant=variant,
        **hub,
        **parts,
    )
    return _fitting(pipeline, parts)


def _fitting(pipeline: LatentDiffusionPipeline, parts: dict[str, Any]) -> LatentDiffusionPipeline:
    """`pipeline`, whose `parts` were not its own; `UserError` where they do not fit."""
    if "vae" in parts:
        small_decoder.check_fits(parts["vae"], pipeline.unet)
    return pipeline


def _class(xl: bool) -> type[LatentDiffusionPipeline]:
    return LatentDiffusionXLPipeline if xl else LatentDiffusionPipeline


def teach_auto_pipelines() -> None:
    """Let `AutoPipelineForText2Image`, `…Image2Image` and `…Inpainting` know our classes, so that
    their `from_pipe` turns one of our pipelines into one of ours, instead of refusing it."""
    from diffusers.pipelines import auto_pipeline as auto  # it imports every pipeline there is

    for classes in (
        auto.AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
        auto.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
        auto.AUTO_INPAINT_PIPELINES_MAPPING,
    ):
        classes["ldm-pipeline"] = LatentDiffusionPipeline
        classes["ldm-pipeline-xl"] = LatentDiffusionXLPipeline
