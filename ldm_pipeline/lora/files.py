"""LoRA files: written whole or not at all, read with suspicion, in any layout that tools have.

    layout      what it is                                          for
    diffusers   one file, alphas in the header                      diffusers, `ldm generate --lora`
    kohya       one file, alphas as tensors, and in the header      ComfyUI, A1111, Forge
    peft        a folder for each component, with a configuration   PEFT

Which one a file has, its keys tell. Nothing here imports torch until tensors are touched, so that
a command can refuse a file at once.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_pipeline.errors import UserError, choose
from ldm_pipeline.lora.layouts import diffusers, kohya, peft, stamp
from ldm_pipeline.lora.layouts.families import Family, family_of, required
from ldm_pipeline.lora.layouts.reading import check_dtypes
from ldm_pipeline.lora.weights import COLUMNS, LORA_A, LORA_B, MAGNITUDE, Header, LoraWeights
from ldm_pipeline.models.headers import read_header
from ldm_pipeline.replacing import replacing

if TYPE_CHECKING:
    from torch import Tensor

FILE_NAME = "pytorch_lora_weights.safetensors"

LAYOUTS = ("diffusers", "kohya", "peft")


# Reading ----------------------------------------------------------------------------------------


def check_weight(path: str | os.PathLike[str], weight: float) -> None:
    """Raise `UserError` for a weight that is no finite number."""
    try:
        finite = math.isfinite(weight)
    except TypeError:
        finite = False
    if not finite:
        raise UserError(f"the weight of {path} is {weight!r}; it must be a finite number, as 0.8")


def locate(path: str | os.PathLike[str]) -> Path:
    """What `path` means: a file, in a folder the file that a training writes, or PEFT's folder."""
    place = Path(path).expanduser()
    if place.name == peft.MODEL and peft.is_folder(place.parent):
        return place.parent
    if place.is_dir() and not (place / FILE_NAME).is_file() and peft.is_folder(place):
        return place
    place = place / FILE_NAME if place.is_dir() else place
    if not place.is_file():
        raise UserError(f"there is no LoRA file {place}")
    return place


def inspect(path: str | os.PathLike[str]) -> Header:
    """The header of the LoRA at `path`, read without torch.

    Raises `UserError` where there is none, it is no whole safetensors file, it holds other things
    than a LoRA in a layout that is known, or asks for changes to the model's own weights.
    """
    place = locate(path)
    if place.is_dir():
        return peft.inspect(place)
    found = read_header(place)
    layout = (
        kohya if any(key.startswith(tuple(kohya.PREFIXES)) for key in found.shapes) else diffusers
    )
    if not found.shapes:
        raise UserError(f"{place} is no LoRA: it holds no tensors")
    strange = [key for key in found.shapes if layout.parse(key) is None]
    if strange:
        raise UserError(
            f"{place} is no LoRA in a layout that is known ({', '.join(LAYOUTS)}): {len(strange)}"
            f" of its {len(found.shapes)} tensors are something else, as {strange[0]!r}"
        )
    check_dtypes(place, found)
    return layout.inspect(place, found)


def load(path: str | os.PathLike[str]) -> LoraWeights:
    """The LoRA at `path`, on the CPU.

    Raises `UserError` for what `inspect` refuses, for numbers that are not finite, and where the
    header and the tensors, or tensors among themselves, disagree.
    """
    header = inspect(path)
    return kohya.read(header) if header.layout == "kohya" else diffusers.read(header)


def load_whole(path: str | os.PathLike[str]) -> LoraWeights:
    """The LoRA at `path`, for whoever has no model to compare it with.

    Raises `UserError` as `load` does, and for modules that lack A, B or a magnitude, or have them
    in shapes that do not go together.
    """
    weights = load(path)
    wanted = set()
    for component, name in weights.modules():
        layout, parts = weights.layouts[component], weights.parts(component, name)
        dora = layout.dora and name not in layout.plain
        a, b = parts.get(LORA_A), parts.get(LORA_B)
        if a is None or b is None or (dora and MAGNITUDE not in parts):
            raise UserError(f"{path}: {component}.{name} has {', '.join(sorted(parts))} alone")
        m = parts.get(MAGNITUDE)
        if (
            a.ndim not in (2, 4)
            or a.ndim != b.ndim
            or b[0].numel() != a.shape[0]
            or (m is not None and m.numel() != b.shape[0])
            or min(*a.shape, *b.shape) < 1
        ):
            shapes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in parts.items())
            raise UserError(f"{path}: {component}.{name} has {shapes}, which do not go together")
        wanted |= {f"{component}.{name}.{part}" for part in parts}
    further = weights.tensors.keys() - wanted
    if further or not wanted:
        raise UserError(
            f"{path} holds {', '.join(sorted(further)[:2]) or 'no module'}, and no LoRA"
        )
    return weights


# Writing ----------------------------------------------------------------------------------------


def save(
    place: Path,
    weights: LoraWeights,
    notes: Mapping[str, str] | None = None,
    layout: str = "diffusers",
    family: Family | None = None,
) -> Path:
    """Write a LoRA in a layout, and return the file's path, or the folder's in PEFT's.

    `notes` go into the header beside what decides the weights' meaning; `inspect` reads them.
    `family` is the model's, which kohya's layout has to know where the weights do not tell it.

    `place` is a folder, made if need be, or a path that ends in .safetensors; PEFT's layout has a
    folder. A file appears whole or not at all, also where the process is killed or the power
    fails. Raises `UserError`, and writes nothing, for values that are not finite, for what the
    layout cannot say, and where the place cannot be written.
    """
    import torch

    choose("layout", layout, LAYOUTS)
    bad = [name for name, tensor in weights.tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise UserError(
            f"the LoRA is not written: {len(bad)} of its {len(weights.tensors)} tensors hold values"
            f" that are not finite, as {bad[0]}"
        )
    notes = notes or {}
    if layout == "kohya":
        own = required(family or family_of(shapes_of(weights), notes))
        file = _kohya_file(weights, own, notes)
    else:
        _must_be_peft(weights)
        if layout == "peft":
            return _save_peft(place, weights, notes)
        file = serialised(diffusers.spelled(weights), {**notes, **diffusers.texts(weights)})
    path = place if place.suffix == ".safetensors" else place / FILE_NAME
    _write_whole(path, file)
    return path


def shapes_of(weights: LoraWeights) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor."""
    return {key: tuple(tensor.shape) for key, tensor in weights.tensors.items()}


def serialised(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> bytes:
    """A safetensors file, its header in a fixed order: equal weights, equal bytes."""
    from safetensors.torch import save as serialise

    whole = {key: _own(tensor.detach().cpu().contiguous()) for key, tensor in tensors.items()}
    return _in_order(serialise(whole, dict(texts)))


def _own(tensor: Tensor) -> Tensor:
    """`tensor`, in memory of its own: safetensors refuses what shares its memory."""
    alone = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if alone else tensor.clone()


def _kohya_file(weights: LoraWeights, family: Family, notes: Mapping[str, str]) -> bytes:
    tensors = kohya.spelled(weights, family)
    texts = stamp.record(weights, family, notes)
    trainers = {name: text for name, text in texts.items() if name.startswith("ss_")}
    contents = serialised(tensors, trainers)
    (length,) = struct.unpack("<Q", contents[:8])
    return serialised(tensors, {**texts, **stamp.hashes(contents[8 + length :], contents)})


def _save_peft(place: Path, weights: LoraWeights, notes: Mapping[str, str]) -> Path:
    if place.suffix == ".safetensors":
        raise UserError(f"PEFT's layout is a folder; {place} is the name of a file")
    for component in weights.layouts:
        folder = place / component
        tensors = peft.spelled(weights, component)
        _write_whole(
            folder / peft.MODEL, serialised(tensors, {**stamp.carried(notes), "format": "pt"})
        )
        config = peft.config(weights, component, notes.get("ss_sd_model_name"))
        _write_whole(folder / peft.CONFIG, config.encode())
    return place


def _must_be_peft(weights: LoraWeights) -> None:
    """Refuse what only kohya's layout can say."""
    mixed = [c for c, layout in weights.layouts.items() if layout.plain]
    columns = [key for key in weights.tensors if key.endswith(COLUMNS)]
    if mixed or columns:
        what = f"DoRA by columns ({columns[0]})" if columns else f"DoRA in parts of the {mixed[0]}"
        raise UserError(
            f"only kohya's layout can say {what}; with the base's weights at hand it can be turned"
            " into what the others say: name its folder with --model"
        )


def _in_order(contents: bytes) -> bytes:
    """The same safetensors file with its header in a fixed order: equal weights, equal bytes."""
    (length,) = struct.unpack("<Q", contents[:8])
    header = json.loads(contents[8 : 8 + length])
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8
    return struct.pack("<Q", len(text)) + text + contents[8 + length :]


def _write_whole(file: Path, contents: bytes) -> None:
    """Write `contents` to `file`, and the folders that it lies in."""
    with replacing(file) as temporary:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(contents)
