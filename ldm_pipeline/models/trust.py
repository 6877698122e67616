"""What a model folder may not do: run code, open pickles, or lead out of itself.

Everything here is read with the standard library, before diffusers or transformers are asked to
open anything. Each refusal is a `UserError`, one line that says why and what to do. The checks go
by what those libraries are known to follow: class names in `model_index.json` are imported;
`auto_map` names code; `adapter_config.json` names another model to load; a tokenizer's settings
may name its files, and a shard index the files of weights, anywhere on the disk; an implementation
of attention may be the name of a kernel on the hub.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ldm_pipeline.errors import UserError
from ldm_pipeline.models.headers import read_header

SAFE = ".safetensors"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
LARGEST_JSON = 64_000_000
"""Bytes; the largest tokenizers have a few million."""

_CLIP_TEXT = ("transformers", r"CLIPTextModel(WithProjection)?")
_CLIP_TOKENIZER = ("transformers", r"CLIPTokenizer(Fast)?")
CLASSES: Mapping[str, tuple[str, str]] = {
    "vae": ("diffusers", r"Autoencoder(KL|Tiny)"),
    "unet": ("diffusers", r"UNet2DConditionModel"),
    "scheduler": ("diffusers", r"[A-Z][A-Za-z0-9]*Scheduler"),
    "text_encoder": _CLIP_TEXT,
    "text_encoder_2": _CLIP_TEXT,
    "tokenizer": _CLIP_TOKENIZER,
    "tokenizer_2": _CLIP_TOKENIZER,
    "safety_checker": (r"stable_diffusion", r"StableDiffusionSafetyChecker"),
    "feature_extractor": ("transformers", r"CLIP(ImageProcessor|FeatureExtractor)(Fast|Pil)?"),
    "image_encoder": ("transformers", r"CLIPVisionModelWithProjection"),
}
"""For each component the library and the classes (a pattern) that it may be of."""


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; `UserError` where there is none."""
    try:
        if not file.is_file():
            raise UserError(f"{file} is no file")
        if file.stat().st_size > LARGEST_JSON:
            raise UserError(f"{file} is too large for what it should be; it is not read")
        contents = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise UserError(f"{file} cannot be read: it is nested too deeply") from None
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    if not isinstance(contents, dict):
        raise UserError(f"{file} must hold a JSON object")
    return contents


def check_classes(place: object, contents: Mapping[str, Any]) -> None:
    """Refuse the contents of a `model_index.json` that name code, or a class of elsewhere."""
    if not isinstance(contents.get("_class_name", ""), str) or "custom_pipeline" in contents:
        raise UserError(
            f"{place} wants to run its own pipeline code; that is refused, take a model without"
        )
    _refuse_code(place, contents)
    for name in sorted(CLASSES.keys() & contents.keys()):
        if not isinstance(contents[name], list):
            raise UserError(
                f"{place} names {contents[name]!r:.80} as its {name}; an entry is a library and a"
                ' class, as in ["diffusers", "UNet2DConditionModel"]'
            )
    for name, entry in components(contents).items():
        library, pattern = CLASSES.get(name, ("", ""))
        if not library:
            continue  # whether the pipeline has such a component, its own check says
        known = len(entry) == 2 and all(isinstance(each, str) for each in entry)
        if not known or entry[0] != library or not re.fullmatch(pattern, entry[1]):
            said = ".".join(str(each) for each in entry)[:80]
            raise UserError(
                f"{place} names {said} as its {name}; only classes of diffusers and transformers"
                f" that a {name} can be are opened, and no other code is run: correct the entry in"
                " its model_index.json, or take another model"
            )


def components(contents: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The entries of a `model_index.json` that name a component, and are not left empty."""
    return {
        name: entry
        for name, entry in contents.items()
        if isinstance(entry, list)
        and not name.startswith("_")
        and any(e is not None for e in entry)
    }


def check_links(folder: Path, within: Path | None = None) -> None:
    """Refuse a folder in which anything is, by a link, outside of it, or is no file or folder.

    `within` is the model that it is a part of, which its links may then not leave. The hub's cache
    keeps files in `blobs` beside its snapshots and links them; that much is let.
    """
    home = (within or folder).resolve()
    allowed = [home]
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        allowed.append(home.parent.parent / "blobs")
    pending = [folder.resolve()]
    while pending:
        for entry in sorted(pending.pop().iterdir()):
            target = entry.resolve()
            if not any(target.is_relative_to(place) for place in allowed):
                raise UserError(
                    f"{entry} is a link that leads out of the folder; nothing outside of a model's"
                    " folder is opened: put the file itself there"
                )
            if not target.exists():
                raise UserError(f"{entry} is a link to a file that is not there")
            kind = target.stat().st_mode
            if stat.S_ISDIR(kind) and not entry.is_symlink():
                pending.append(entry)
            elif not stat.S_ISREG(kind):
                raise UserError(f"{entry} is neither a file nor a folder; it is not opened")


def check_component(folder: Path) -> None:
    """Refuse one component's folder: pickles alone, weights that are none, settings that lead out.

    Every safetensors header is read; no tensor is.
    """
    files = sorted(folder.iterdir())
    if code := [file.name for file in files if file.name.endswith((".py", ".pyc", ".so"))]:
        raise UserError(f"{folder} brings code of its own ({', '.join(code)}); take it out")
    pickles = [file.name for file in files if file.name.endswith(PICKLES)]
    weights = [file for file in files if file.name.endswith(SAFE)]
    if pickles and not weights:
        raise UserError(
            f"{folder} holds only pickled weights ({', '.join(pickles)}), which can run any program"
            " when opened; convert them to safetensors first"
        )
    for file in weights:
        read_header(file)
    for file in files:
        if file.name.endswith(".json"):
            _check_settings(folder, file)
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder} has an adapter_config.json, which names another model to load; take it out,"
            " and load adapters with --lora or load_lora_weights"
        )


def check_part(model: Path, part: str) -> None:
    """Refuse the folder of a part that `model_index.json` does not name, such as an image encoder.

    A part that the caller looks for elsewhere (by `..`, or from the root) is a model of its own.
    """
    place = model / part
    if not place.is_dir():
        raise UserError(f"{model} has no folder {part}")
    outside = Path(part).is_absolute() or ".." in Path(part).parts
    check_links(place, place if outside else model)
    check_component(place)


def check_adapter(source: object, weight_name: object = None, subfolder: object = None) -> None:
    """Refuse a file of adapters or learnt words that is no safetensors file, before stock's loaders
    see it, which open pickles too. Tensors that were passed themselves are let.

    `source` is a file, a folder or a hub id; `weight_name` names a file in it.
    """
    if not isinstance(source, str | os.PathLike):
        return
    place = Path(source, str(subfolder or ""))
    if weight_name is not None:
        found = [str(weight_name)]
    elif place.is_dir():
        found = sorted(each.name for each in place.iterdir() if each.suffix in (SAFE, *PICKLES))
    else:
        found = [os.fspath(source)] if place.is_file() else []
    if found and not any(name.endswith(SAFE) for name in found):
        raise UserError(
            f"{', '.join(found)} is refused: a pickle can run any program; name a {SAFE} file"
        )


def _check_settings(folder: Path, file: Path) -> None:
    """Refuse a JSON file whose entries would be followed to code or to files elsewhere."""
    if file.name in ("vocab.json", "tokenizer.json"):
        return  # data alone; parsed where it is used
    contents = read_json(file)
    _refuse_code(file, contents)
    if "weight_map" in contents or ".index." in file.name:
        _check_shards(folder, file, contents.get("weight_map"))
    if file.name == "tokenizer_config.json":
        for key, value in contents.items():
            # The map of special tokens is not followed; old models name their maker's disk there.
            if key.endswith("_file") and key != "special_tokens_map_file" and value is not None:
                raise UserError(
                    f"{file} names {key}={value!r}; a tokenizer's files lie beside it and are not"
                    " named: take the entry out"
                )


def _check_shards(folder: Path, file: Path, shards: Any) -> None:
    """Refuse an index of shards that are not safetensors files beside it."""
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise UserError(f"{file} is no index of shards: it has no weight_map of file names")
    if ".bin.index." in file.name:
        return  # of pickled weights, which are not opened
    for name in sorted(set(shards.values())):
        plain = name == PurePosixPath(name).name and "\\" not in name and ":" not in name
        if not plain or not name.endswith(SAFE):
            raise UserError(
                f"{file} names the shard {name!r}; shards are safetensors files in the same folder"
            )
        if not (folder / name).is_file():
            raise UserError(f"{file} names the shard {name!r}, which is not there")


def _refuse_code(place: object, contents: Mapping[str, Any]) -> None:
    """Refuse what names code, at any depth: transformers takes a text model's settings from the
    entry `text_config` of those of a whole CLIP."""
    pending: list[Any] = [contents]
    while pending:
        entry = pending.pop()
        if isinstance(entry, list):
            pending += entry
        elif isinstance(entry, Mapping):
            pending += entry.values()
            _refuse_code_here(place, entry)


def _refuse_code_here(place: object, contents: Mapping[str, Any]) -> None:
    if "auto_map" in contents:
        raise UserError(f"{place} names code of its own (auto_map); that is refused, take it out")
    for key in ("attn_implementation", "_attn_implementation"):
        if contents.get(key) not in (None, "eager", "sdpa"):
            raise UserError(
                f"{place} names a kernel to fetch ({key}={contents[key]!r}); take the entry out"
            )
    if "quantization_config" in contents:
        raise UserError(
            f"{place} asks for a quantising library (quantization_config); take a model of full"
            " weights"
        )
