"""A Diffusers folder as a single file and back, without loading a model: bytes are moved.

The round trip is exact both ways. What one layout has no place for travels beside: the folder's
configs and tokenizers as a note in the file's header (`note.py`), the file's surplus tensors in
`original.safetensors` in the folder, which Diffusers does not look at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm_pipeline.errors import UserError
from ldm_pipeline.models import folders
from ldm_pipeline.models.headers import read_header
from ldm_pipeline.models.original import build, note
from ldm_pipeline.models.original.autoencoder import modern
from ldm_pipeline.models.original.checkpoint import SingleFile
from ldm_pipeline.models.original.clip import BODY, with_body
from ldm_pipeline.models.original.families import Family, family_for
from ldm_pipeline.models.original.names import Tensors
from ldm_pipeline.models.original.tensors import Stored, stored, write
from ldm_pipeline.models.reading import reading
from ldm_pipeline.models.trust import CLASSES, components, read_json
from ldm_pipeline.replacing import replacing

SURPLUS = "original.safetensors"
TORCH = {"format": "pt"}
"""How the files of a folder say that torch may read them."""


def to_file(folder: Path, file: Path) -> tuple[str, ...]:
    """Write the model in `folder` to `file`; the names of the components that it has no place for.

    Raises `UserError` for a folder that is not safe or whole, and for networks that have tensors
    the original layout does not know.
    """
    folders.check(folder, CLASSES)
    contents = folders.index(folder)
    encoders = sorted(name for name in components(contents) if name.startswith("text_encoder"))
    if not encoders:
        raise UserError(f"{folder} has no text_encoder: it is a part of a model; keep the folder")
    family = family_for(components(contents), read_json(folder / encoders[0] / "config.json"))
    parts = components(contents)
    for name in family.components:
        if name not in parts:
            raise UserError(f"{folder} names no {name}: it is a part of a model; keep the folder")
    if (kind := parts["vae"][1]) != "AutoencoderKL":
        raise UserError(
            f"{folder / 'vae'} is an {kind}, which the original layout has no place for; convert"
            " the model with its own autoencoder"
        )
    tensors: dict[str, Stored] = {}
    whole: dict[str, Tensors] = {}
    bare = []
    for component in family.components:
        here = _weights(folder, component)
        if component == "vae":
            here = {modern(key): tensor for key, tensor in here.items()}
        if component.startswith("text_encoder"):
            if not any(key.startswith(BODY) for key in here):
                bare.append(component)
            here = {with_body(key): tensor for key, tensor in here.items()}
        config = read_json(folder / component / "config.json")
        with reading(f"{folder}: no {component} can have this config"):
            layout = family.layout(component, config)
            there = layout.to_original(here)
        lost = sorted(here.keys() - layout.to_diffusers(there).keys())
        if lost:
            raise UserError(
                f"{folder / component} has {len(lost)} tensors that the original layout has no"
                f" place for, {lost[0]} among them; keep this model as a folder"
            )
        whole[component] = here
        tensors |= {family.prefix(component) + key: tensor for key, tensor in there.items()}
    texts: dict[str, str] = dict(TORCH)
    if (folder / SURPLUS).is_file():
        surplus = stored(folder / SURPLUS)
        if common := sorted(surplus.keys() & tensors.keys()):
            raise UserError(f"{folder / SURPLUS} has {common[0]}, which the model has too")
        tensors |= surplus
        texts |= {key: str(text) for key, text in read_header(folder / SURPLUS).texts.items()}
    dropped = sorted(components(contents).keys() - set(family.components) - _small(family))
    contents |= {name: [None, None] for name in dropped}
    files = _small_files(folder, contents)
    build.check(SingleFile(folder, family, files, whole, tuple(bare), {}))
    texts |= {note.KEY: note.Note(files, tuple(bare)).packed()}
    write(file, tensors, _specification(family, folder) | texts)
    return tuple(dropped)


def to_folder(checkpoint: SingleFile, folder: Path) -> int:
    """Write the checkpoint to `folder`, complete or not at all; how many tensors are surplus."""
    with replacing(folder) as temporary:
        for name, text in checkpoint.files.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_text(text, encoding="utf-8")
        for component, tensors in checkpoint.parts.items():
            if component in checkpoint.bare:
                tensors = {key.removeprefix(f"{BODY}."): t for key, t in tensors.items()}
            write(temporary / component / f"{_stem(component)}.safetensors", tensors, TORCH)
        if checkpoint.rest:
            texts = read_header(checkpoint.file).texts
            kept = {key: str(text) for key, text in texts.items() if key != note.KEY}
            write(temporary / SURPLUS, checkpoint.rest, kept)
        folders.check(temporary, CLASSES)
    return len(checkpoint.rest)


def _stem(component: str) -> str:
    """What the weights' file of a component is called."""
    return "model" if component.startswith("text_encoder") else "diffusion_pytorch_model"


def _weights(folder: Path, component: str) -> dict[str, Stored]:
    """The tensors of a component, in one file or in shards."""
    place = folder / component
    variant = next(map(folders.variant_of, folders.weight_files(place)), "")
    stem, infix = _stem(component), f".{variant}" if variant else ""
    whole = place / f"{stem}{infix}.safetensors"
    shards = place / f"{stem}.safetensors.index{infix}.json"
    if whole.is_file():
        return stored(whole)
    if not shards.is_file():
        raise UserError(f"{place} holds no {whole.name}, and no shards of it")
    names = sorted(set(read_json(shards)["weight_map"].values()))
    return {key: tensor for name in names for key, tensor in stored(place / name).items()}


def _small(family: Family) -> set[str]:
    """The components that have no weights."""
    return {"scheduler", *(part.tokenizer for part in family.texts)}


def _small_files(folder: Path, contents: Mapping[str, Any]) -> dict[str, str]:
    """The files of `folder` that a note keeps, with `contents` for its `model_index.json`."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*"))
    files = {
        name: (folder / name).read_text(encoding="utf-8")
        for name in names
        if note.KEPT.fullmatch(name)
    }
    original = (folder / folders.INDEX).read_text(encoding="utf-8")
    same = json.loads(original) == contents
    files[folders.INDEX] = original if same else json.dumps(contents, indent=2) + "\n"
    return files


def _specification(family: Family, folder: Path) -> dict[str, str]:
    """What other tools read in a header, by Stability's model specification 1.0.0."""
    told = read_json(folder / "scheduler" / "scheduler_config.json").get("prediction_type")
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": family.specification(str(told)),
        "modelspec.prediction_type": "v" if told == "v_prediction" else "epsilon",
    }
