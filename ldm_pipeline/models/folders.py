"""What lies in a model folder, read without loading it: is it whole, and is it safe to open?

A model folder has Diffusers' layout: `model_index.json` names the components, each in a folder of
its own with its config and weights. Only safetensors weights are opened; a pickle can run any
program, so folders that hold nothing else are refused.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ldm_pipeline.errors import UserError

INDEX = "model_index.json"
SAFE = ".safetensors"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


def index(folder: Path) -> dict[str, Any]:
    """The contents of `model_index.json`; `UserError` where the folder is no pipeline."""
    try:
        contents = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no {INDEX}; pass a folder that save_pretrained wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / INDEX} cannot be read: {error}") from None
    if not isinstance(contents, dict):
        raise UserError(f"{folder / INDEX} must hold a JSON object")
    return contents


def check(folder: Path, known: Collection[str], given: Collection[str] = ()) -> None:
    """Raise `UserError` for a folder that cannot be opened, or not safely.

    `known` are the names of the components that the pipeline has; those in `given` are brought by
    the caller and not looked for. Refused are components that the pipeline does not know, that
    have no folder, or only pickled weights; and folders that want to run their own code.
    """
    contents = index(folder)
    kind = contents.get("_class_name", "pipeline")
    if not isinstance(kind, str):
        raise UserError(f"{folder} wants to run its own pipeline code; that is refused")
    parts = {
        name: entry
        for name, entry in contents.items()
        if isinstance(entry, list) and entry and entry[0] is not None
    }
    for name in sorted(parts.keys() - set(known)):
        raise UserError(
            f"{folder} holds a {kind} with a component {name!r}; only models shaped like Stable"
            " Diffusion 1.x or 2.x can be drawn with"
        )
    for name in sorted(parts.keys() - set(given)):
        if not (folder / name).is_dir():
            raise UserError(f"{folder} names a component {name!r} but has no such folder")
        files = [file.name for file in (folder / name).iterdir()]
        pickles = sorted(file for file in files if file.endswith(PICKLES))
        if pickles and not any(file.endswith(SAFE) for file in files):
            raise UserError(
                f"{folder / name} holds only pickled weights ({', '.join(pickles)}), which can"
                " run any program when opened; convert them to safetensors first"
            )


def only_variant(folder: Path) -> str | None:
    """The variant ("fp16") that all weights of `folder` come in, or None where some are plain."""
    stems = [file.name.removesuffix(SAFE) for file in folder.glob(f"*/*{SAFE}")]
    variants = {stem.partition(".")[2].partition("-")[0] for stem in stems}
    return variants.pop() if len(variants) == 1 and "" not in variants else None
