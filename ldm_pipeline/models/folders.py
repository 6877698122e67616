"""What lies in a model folder, read without loading it: is it whole, and is it safe to open?

A model folder has Diffusers' layout: `model_index.json` names the components, each in a folder of
its own with its config and weights. What it must not do stands in `trust.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm_pipeline.errors import UserError
from ldm_pipeline.models.config_values import check_values
from ldm_pipeline.models.headers import read_header
from ldm_pipeline.models.trust import (
    SAFE,
    check_classes,
    check_component,
    check_links,
    components,
    read_json,
)

INDEX = "model_index.json"
BODY = "text_model."
"""Under this name transformers keeps all but the projection, or without it, by its version."""
CONFIGS = {
    **dict.fromkeys(("vae", "unet", "text_encoder", "text_encoder_2"), "config.json"),
    **dict.fromkeys(("safety_checker", "image_encoder"), "config.json"),
    "scheduler": "scheduler_config.json",
}
"""The config that a component's folder has; beside a `config.json` lie weights."""
MAKE_WEIGHTS = (
    "block_out_channels",
    "layers_per_block",
    "transformer_layers_per_block",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "vocab_size",
)
"""Numbers in a config of which each makes so many weights, or tensors."""
SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
"""In the name of one of several files of weights."""


def index(folder: Path) -> dict[str, Any]:
    """The contents of `model_index.json`; `UserError` where the folder is no pipeline, or would
    run code of its own or of elsewhere."""
    file = folder / INDEX
    if not file.exists() and not file.is_symlink():
        raise UserError(f"{folder} has no {INDEX}; pass a folder that save_pretrained wrote")
    if not file.resolve().is_relative_to(folder.resolve()):
        check_links(folder)
    contents = read_json(file)
    check_classes(folder, contents)
    return contents


def is_xl(contents: dict[str, Any]) -> bool:
    """Whether the contents of a `model_index.json` are those of an SDXL pipeline."""
    named = str(contents.get("_class_name")).startswith("StableDiffusionXL")
    return named or "text_encoder_2" in components(contents)


def check(folder: Path, known: Collection[str], given: Collection[str] = ()) -> None:
    """Raise `UserError` for a folder that cannot be opened, or not safely.

    `known` are the names of the components that the pipeline has; those in `given` are brought by
    the caller and not looked for. Refused are components that the pipeline does not know, that
    have no folder, or whose weights are no safetensors; links out of the folder; and folders that
    want to run their own code. See `trust.py`.
    """
    contents = index(folder)
    check_links(folder)
    if "_class_name" not in contents:
        raise UserError(f"{folder / INDEX} is no index of a pipeline: it names no _class_name")
    kind = contents["_class_name"]
    parts = components(contents)
    for name in sorted(parts.keys() - set(known)):
        raise UserError(
            f"{folder} holds a {kind} with a component {name!r}, which this pipeline has not;"
            " ldm_pipeline.load opens models shaped like Stable Diffusion 1.x, 2.x and SDXL"
        )
    for name in sorted(parts.keys() - set(given)):
        if not (folder / name).is_dir():
            raise UserError(f"{folder} names a component {name!r} but has no such folder")
        check_component(folder / name)
        _check_whole(folder / name)
    if "unet" in parts and "unet" not in given:
        told = read_json(folder / "unet" / "config.json").get("addition_embed_type")
        check_family(folder, contents, {*parts, *given}, told)


def check_family(
    place: object, contents: dict[str, Any], parts: Collection[str], told: object
) -> None:
    """Refuse a model whose UNet and text encoders are of different families.

    `contents` are its index's, `parts` its components, and `told` is what its UNet says that it is
    told besides the texts.
    """
    xl = told == "text_time"
    if xl != is_xl(contents):
        raise UserError(
            f"{place} holds a UNet that is {'' if xl else 'not '}SDXL's, and the rest of it is"
            f" {'not' if xl else 'that of SDXL'}; take the whole of one model"
        )
    if xl and "text_encoder_2" not in parts:
        raise UserError(f"{place} lacks SDXL's text_encoder_2; take the whole model")


def _check_whole(component: Path) -> None:
    """Refuse a component's folder in which its config, weights or vocabulary are missing."""
    words = any(component.glob("tokenizer.json")) or any(component.glob("vocab.json"))
    if component.name.startswith("tokenizer") and not words:
        raise UserError(f"{component} holds no vocabulary (tokenizer.json); take the whole model")
    config = CONFIGS.get(component.name)
    if config is not None and not (component / config).is_file():
        raise UserError(f"{component} has no {config}; take the whole model")
    if config is not None:
        check_values(component / config, component.name, read_json(component / config))
    if config != "config.json":
        return
    found = weight_files(component)
    if not found:
        raise UserError(f"{component} holds no weights in a {SAFE} file; take the whole model")
    shards = all(SHARD.search(file.name) for file in found)
    if shards and not any(component.glob(f"*{SAFE}.index*.json")):
        raise UserError(f"{component} holds shards of weights and no index of them (a .json file)")
    shapes = [shape for file in found for shape in read_header(file).shapes.values()]
    check_numbers(component / config, read_json(component / config), shapes)


def check_numbers(
    place: object, config: Mapping[str, Any], shapes: Sequence[tuple[int, ...]]
) -> None:
    """Refuse a config at `place` that asks for more than weights of these shapes can be: what it
    describes would be built first, and take all of the memory, or for ever."""
    most = max((side for shape in shapes for side in shape), default=0)
    for name in MAKE_WEIGHTS:
        asked = config.get(name)
        for number in asked if isinstance(asked, list) else [asked]:
            if isinstance(number, int) and number > max(most, len(shapes)):
                raise UserError(
                    f"{place} says {name}={number}, and no tensor of its weights is so large; take"
                    " the whole model"
                )


def check_filled(folder: Path, parts: Mapping[str, Any], given: Collection[str] = ()) -> None:
    """Refuse networks of the opened `folder` that its files had not all tensors of.

    Diffusers leaves those without memory, and transformers fills them with random numbers.
    """
    for name, part in parts.items():
        if name in given or not hasattr(part, "state_dict"):
            continue
        missing = [key for key, tensor in part.state_dict().items() if tensor.is_meta]
        if name.startswith("text_encoder"):
            headers = [read_header(file) for file in weight_files(folder / name)]
            there = {key.removeprefix(BODY) for header in headers for key in header.shapes}
            own = [key for key in part.state_dict() if not key.endswith("position_ids")]
            missing = [key for key in own if key.removeprefix(BODY) not in there]
        if missing:
            raise UserError(
                f"{folder / name} has not all tensors of its network: {len(missing)} are missing,"
                f" {missing[0]} among them; take the whole model"
            )


def only_variant(folder: Path) -> str | None:
    """The one variant ("fp16") of all weights of `folder` that there are no plain ones of; None
    where there are plain ones of each, or no such variant."""
    parts: dict[Path, set[str]] = {}
    for file in folder.glob(f"*/*{SAFE}"):
        parts.setdefault(file.parent, set()).add(variant_of(file))
    lacking = [found for found in parts.values() if "" not in found]
    common = set[str].intersection(*lacking) if lacking else set()
    return common.pop() if len(common) == 1 else None


def weight_files(component: Path) -> list[Path]:
    """The safetensors files of one component's folder, in one variant: the plain ones if there are
    any."""
    found = sorted(component.glob(f"*{SAFE}"))
    first = min(map(variant_of, found), default="")
    return [file for file in found if variant_of(file) == first]


def variant_of(file: Path) -> str:
    """The variant of a file of weights, whole or a shard; "" of a plain one."""
    return file.name.removesuffix(SAFE).partition(".")[2].partition("-")[0]
