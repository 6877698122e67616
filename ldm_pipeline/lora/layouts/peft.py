"""PEFT's layout: for each component a folder with `adapter_model.safetensors` and its config.

A LoRA is the folder of one component, or a folder with one folder for each, named after it.
`PeftModel.from_pretrained(pipe.unet, "style/unet")` loads what is written here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.layouts import diffusers
from ldm_pipeline.lora.layouts.reading import PEFT_PREFIX, check_dtypes, key_in_header
from ldm_pipeline.lora.targets import COMPONENTS
from ldm_pipeline.lora.weights import Header, LoraWeights, split
from ldm_pipeline.models.headers import FileHeader, read_header

if TYPE_CHECKING:
    from torch import Tensor

MODEL, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TEXT_LAYER = f"{PEFT_PREFIX}text_model.", f"{PEFT_PREFIX}encoder.layers."

FURTHER = ("modules_to_save", "layer_replication", "trainable_token_indices", "megatron_config")
"""Fields that ask for more than A, B and magnitudes."""


def is_folder(place: Path) -> bool:
    """Whether `place` is the folder of a PEFT adapter, or has one for a component."""
    return any((folder / CONFIG).is_file() for folder in (place, *(place / c for c in COMPONENTS)))


def inspect(place: Path) -> Header:
    """The header of the adapters in the folder `place`.

    Raises `UserError` for damaged files, adapters that are no LoRA, and configurations that ask
    for changes to the model's own weights.
    """
    folders = {c: place / c for c in COMPONENTS if (place / c / CONFIG).is_file()}
    if (place / CONFIG).is_file():
        if folders:
            raise UserError(f"{place} holds one adapter beside those of {', '.join(folders)}")
        folders = {_component(place): place}
    shapes: dict[str, tuple[int, ...]] = {}
    metadata = {}
    texts: dict[str, Any] = {}
    for component, folder in folders.items():
        found = _header(folder / MODEL)
        texts |= {name: text for name, text in found.texts.items() if name != "format"}
        for key, shape in found.shapes.items():
            named = key_in_header(component, key)
            if not key.startswith(PEFT_PREFIX) or diffusers.parse(named) is None:
                raise UserError(f"{folder / MODEL} is no LoRA of PEFT's: it holds {key!r}")
            shapes[named] = shape
        metadata[component] = _config(folder / CONFIG)
    files = {component: folder / MODEL for component, folder in folders.items()}
    return diffusers.checked(Header(place, "peft", shapes, metadata, texts, files))


def spelled(weights: LoraWeights, component: str) -> dict[str, Tensor]:
    """The tensors of one component by PEFT's keys, as its modules are called in transformers 5."""
    second = component == "text_encoder_2"
    tensors = {}
    for key, tensor in weights.tensors.items():
        owner, name, part = split(key)
        if owner == component:
            deep = second and not name.startswith("text_projection")
            tensors[f"{PEFT_PREFIX}{'text_model.' if deep else ''}{name}.{part}"] = tensor
    return tensors


def config(weights: LoraWeights, component: str, base: str | None) -> str:
    """The contents of `adapter_config.json`."""
    fields = {
        **weights.layouts[component].peft_fields(),
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "task_type": None,
    }
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def _header(file: Path) -> FileHeader:
    if not file.is_file():
        raise UserError(f"{file.parent} has no {MODEL}; only safetensors are opened")
    found = read_header(file)
    check_dtypes(file, found)
    return found


def _component(place: Path) -> str:
    """The component that the adapter in `place` is for: by the folder's name, or by its keys."""
    if place.name in COMPONENTS:
        return place.name
    texts = all(key.startswith(TEXT_LAYER) for key in _header(place / MODEL).shapes)
    return "text_encoder" if texts else "unet"


def _config(file: Path) -> dict[str, Any]:
    """The fields of a configuration; `UserError` where it is damaged or for no plain LoRA."""
    try:
        fields = json.loads(file.read_text("utf-8"))
        kind = fields.get("peft_type")
        further = [name for name in FURTHER if fields.get(name)]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if kind != "LORA":
        raise UserError(f"{file} is refused: peft_type={kind!r}; read is LORA")
    if further:
        raise UserError(f"{file} is refused: {further[0]} asks for more than a LoRA")
    return dict(fields)
