"""`ldm info`: what a model folder or a weights file holds, read from headers; nothing is loaded."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm_pipeline.commands.sources import BUNDLED, find
from ldm_pipeline.errors import UserError
from ldm_pipeline.models import folders
from ldm_pipeline.models.headers import read_header
from ldm_pipeline.models.hub import cached

PURPOSE = "list a model's components, parameters, sizes and licence"


@dataclass(frozen=True)
class Weights:
    """What the headers of some safetensors files say: number of parameters, and their dtypes."""

    parameters: int
    dtypes: frozenset[str]


@dataclass(frozen=True)
class Component:
    """One row of the list: a sub-folder of a model, its class, and all its files' bytes."""

    name: str
    kind: str
    weights: Weights | None
    size: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "model",
        nargs="?",
        default=BUNDLED,
        help="a folder, a .safetensors file, or a hub id in the cache (%(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Print the list on stdout."""
    file = Path(args.model)
    if file.suffix == ".safetensors" and file.is_file():
        weights = read_weights([file])
        kinds = ", ".join(sorted(weights.dtypes))
        print(f"{file}: {weights.parameters:,} parameters, {kinds}, {size(file.stat().st_size)}")
        return
    source = find(args.model)
    folder = source.folder or cached(source.name)
    if folder is None:
        raise UserError(f"{source.name} is not in the cache; ldm generate downloads it")
    index = folders.index(folder)
    components = list_components(folder, index)
    print(f"{args.model}: {index.get('_class_name', 'unknown class')}")
    print(f"licence: {read_licence(folder)}")
    rows = [("component", "class", "parameters", "dtype", "size")]
    for part in components:
        number = f"{part.weights.parameters:,}" if part.weights else "-"
        kinds = ", ".join(sorted(part.weights.dtypes)) if part.weights else "-"
        rows.append((part.name, part.kind, number, kinds, size(part.size)))
    total = sum(part.weights.parameters for part in components if part.weights)
    rows.append(("total", "", f"{total:,}", "", size(sum(part.size for part in components))))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        cells = [
            cell.rjust(width) if column in (2, 4) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def list_components(folder: Path, index: dict[str, Any]) -> list[Component]:
    """The components that `model_index.json` names and that are there, in its order."""
    components = []
    for name, value in index.items():
        is_part = not name.startswith("_") and isinstance(value, list) and len(value) == 2
        if not is_part or value[1] is None:
            continue
        files = [path for path in (folder / name).rglob("*") if path.is_file()]
        weights = read_weights(folders.weight_files(folder / name))
        size = sum(path.stat().st_size for path in files)
        components.append(
            Component(name, str(value[1]), weights if weights.parameters else None, size)
        )
    return components


def read_weights(files: Iterable[Path]) -> Weights:
    """Parameters and dtypes in safetensors `files`, from their headers.

    Raises `UserError` for a file that is damaged or is something else.
    """
    headers = [read_header(file) for file in files]
    parameters = sum(math.prod(shape) for header in headers for shape in header.shapes.values())
    return Weights(parameters, frozenset(d for header in headers for d in header.dtypes.values()))


def read_licence(folder: Path) -> str:
    """The licence that the model card's front matter (the head of README.md) names."""
    card = folder / "README.md"
    if not card.is_file():
        return "not stated (no model card)"
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
    if lines and lines[0].strip() == "---":
        for line in lines[1:]:
            key, _, value = line.partition(":")
            if line.strip() == "---":
                break
            if key.strip() in ("license", "license_name") and value.strip() not in ("", "other"):
                return value.strip().strip("\"'")
    return "not stated in the model card"


def size(count: float) -> str:
    """Bytes for a reader: 31.5 MB (powers of 1000)."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
