"""The components of a single file, loaded: networks of the real classes with the file's tensors."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from ldm_pipeline.errors import UserError
from ldm_pipeline.models.original.checkpoint import SingleFile
from ldm_pipeline.models.original.clip import BODY
from ldm_pipeline.models.original.names import Tensors
from ldm_pipeline.models.original.tensors import to_torch
from ldm_pipeline.models.precision import of_component
from ldm_pipeline.models.reading import reading
from ldm_pipeline.models.schedulers import scheduler_class
from ldm_pipeline.models.trust import check_component

_BUFFER = "position_ids"
"""Which older versions of transformers kept in files; it only counts."""


def components(
    checkpoint: SingleFile,
    dtype: torch.dtype | Mapping[str, torch.dtype],
    given: Collection[str] = (),
) -> dict[str, Any]:
    """Every component of the checkpoint's pipeline but those in `given`, on the CPU in `dtype`.

    A dictionary says it by component (`models.precision.of_component`).
    Raises `UserError` where the file's tensors are not those of its networks.
    """
    found: dict[str, Any] = {}
    for name, tensors in checkpoint.parts.items():
        model = empty(checkpoint, name)
        state = fitting(checkpoint, name, model, tensors)
        loaded = {key: to_torch(state[key]).to(of_component(dtype, name)) for key in state}
        model.load_state_dict(loaded, strict=True, assign=True)
        found[name] = model.eval().requires_grad_(False)
    for part in checkpoint.family.texts:
        if part.tokenizer not in given:
            with reading(f"{checkpoint.file}: its {part.tokenizer} cannot be read"):
                found[part.tokenizer] = _tokenizer(checkpoint.files, part.tokenizer)
    if "scheduler" not in given:
        config = checkpoint.config("scheduler")
        kind = scheduler_class(config.get("_class_name"), checkpoint.file)
        with reading(f"{checkpoint.file}: no scheduler can have this config"):
            found["scheduler"] = kind.from_config(config)
    return found


def check(checkpoint: SingleFile) -> None:
    """Raise `UserError` where the file's tensors are not those of its networks; none is read."""
    for name, tensors in checkpoint.parts.items():
        fitting(checkpoint, name, empty(checkpoint, name), tensors)


def empty(checkpoint: SingleFile, component: str) -> nn.Module:
    """The component's network without memory for its weights."""
    config = checkpoint.config(component)
    projects = any(
        part.component == component and part.projects for part in checkpoint.family.texts
    )
    with (
        reading(f"{checkpoint.file}: no {component} can have this config"),
        init_empty_weights(include_buffers=False),
    ):
        if component == "unet":
            return UNet2DConditionModel.from_config(config)
        if component == "vae":
            return AutoencoderKL.from_config(config)
        kind = CLIPTextModelWithProjection if projects else CLIPTextModel
        return kind(CLIPTextConfig.from_dict(config))


def fitting(checkpoint: SingleFile, component: str, model: nn.Module, tensors: Tensors) -> Tensors:
    """The tensors under the names that `model` has in memory; `UserError` where they differ."""
    whole = {key: tensor for key, tensor in tensors.items() if not key.endswith(_BUFFER)}
    if component.startswith("text_encoder") and not hasattr(model, BODY):
        whole = {key.removeprefix(f"{BODY}."): tensor for key, tensor in whole.items()}
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    wrong = sorted(
        key
        for key in wanted.keys() | whole.keys()
        if key not in whole or wanted.get(key) != whole[key].shape
    )
    if wrong:
        raise UserError(
            f"{checkpoint.file}: {len(wrong)} of the {len(wanted)} tensors of its {component} are"
            f" missing, too many or of another shape, {wrong[0]} among them; take a whole model of"
            f" {checkpoint.family.name}"
        )
    return whole


def _tokenizer(files: Mapping[str, str], component: str) -> CLIPTokenizer:
    """The tokenizer in the files of `component`."""
    with tempfile.TemporaryDirectory() as place:
        for name, text in files.items():
            folder, _, short = name.partition("/")
            if folder == component:
                (Path(place) / short).write_text(text, encoding="utf-8")
        check_component(Path(place))
        return CLIPTokenizer.from_pretrained(place, local_files_only=True)
