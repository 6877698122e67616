"""LoRA files in diffusers' layout: written whole or not at all, read with suspicion.

A file is `pytorch_lora_weights.safetensors`: one tensor for each learnt matrix, and in the header,
as JSON under `lora_adapter_metadata`, the fields of PEFT's configuration that decide what they
mean. Without them a reader has to assume alpha = rank. Nothing here imports torch until tensors
are touched, so that a command can refuse a file at once.

Legend
    key     a tensor's name in a file: unet.mid_block.attentions.0.to_q.lora_A.weight
    part    its end, after the component and the module's name; see `targets` for those, and for
            A, B, rank and alpha
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.targets import COMPONENTS, TEXT_MODEL, Layout, Slot, adaptable
from ldm_pipeline.models.headers import read_header

if TYPE_CHECKING:
    from torch import Tensor, nn

FILE_NAME = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"

LORA_A, LORA_B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
SPELLINGS = {
    LORA_A: (LORA_A, "lora.down.weight", "lora_linear_layer.down.weight"),
    LORA_B: (LORA_B, "lora.up.weight", "lora_linear_layer.up.weight"),
    MAGNITUDE: (MAGNITUDE, f"{MAGNITUDE}.weight"),
}
"""How releases of diffusers have spelled the parts. For a text encoder only the last spellings
are read whatever is adapted: the first fail for `fc1` alone, and transformers 5 loses DoRA's."""

HARMLESS_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of PEFT's `init_lora_weights` that leave the model's own weights alone."""


@dataclass(frozen=True)
class LoraWeights:
    """What a LoRA file holds: `component.name.part` -> tensor, and each component's layout.

    `promised` has, by component, what the header says is adapted, as PEFT's `target_modules`.
    """

    tensors: Mapping[str, Tensor]
    layouts: Mapping[str, Layout]
    promised: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Header:
    """A LoRA file's header: the keys with their shapes, the metadata of each component, and all
    texts as they stand."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, Mapping[str, Any]]
    texts: Mapping[str, Any]


@dataclass(frozen=True)
class Fit:
    """How a file's keys compare with a pipeline's modules.

    `missing` are keys that the modules need and the file lacks, `unexpected` those that no module
    takes, `misshapen` says which have another shape than the module needs.
    """

    matched: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[str, ...]

    def __bool__(self) -> bool:
        """Whether the file fits."""
        return self.matched > 0 and not (self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        counts = [f"{self.matched} keys matched"]
        kinds = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape": self.misshapen,
        }
        for kind, keys in kinds.items():
            examples = f" ({', '.join(keys[:2])}{', …' if len(keys) > 2 else ''})" if keys else ""
            counts.append(f"{len(keys)} {kind}{examples}")
        return ", ".join(counts)


# Reading ----------------------------------------------------------------------------------------


def check_weight(path: str | os.PathLike[str], weight: float) -> None:
    """Raise `UserError` for a weight that is no finite number."""
    if not math.isfinite(weight):
        raise UserError(f"the weight of {path} is {weight}; it must be a finite number, as 0.8")


def locate(path: str | os.PathLike[str]) -> Path:
    """The file that `path` means: itself, or in a folder the file that a training writes."""
    place = Path(path).expanduser()
    place = place / FILE_NAME if place.is_dir() else place
    if not place.is_file():
        raise UserError(f"there is no LoRA file {place}")
    return place


def inspect(path: str | os.PathLike[str]) -> Header:
    """The header of the LoRA file at `path`, read without torch.

    Raises `UserError` where there is none, it is no whole safetensors file, it holds other things
    than a LoRA in diffusers' layout, or its header asks for changes to the model's own weights.
    """
    file = locate(path)
    found = read_header(file)
    entries = found.shapes
    strange = [key for key in entries if parse(key) is None]
    if strange or not entries:
        example = f", as {strange[0]!r}" if strange else ""
        raise UserError(
            f"{file} is no LoRA in diffusers' layout: {len(strange)} of its {len(entries)} tensors"
            f" are something else{example}"
        )
    if len({parse(key) for key in entries}) < len(entries):
        raise UserError(f"{file} holds some of its tensors twice, in two spellings")
    header = Header(file, entries, _metadata(file, found.texts), found.texts)
    for component, fields in header.metadata.items():
        start = fields.get("init_lora_weights")
        if start not in HARMLESS_STARTS:
            raise UserError(
                f"{file} is refused: init_lora_weights={start!r} in its header changes the"
                f" {component}'s own weights"
            )
    return header


def load(path: str | os.PathLike[str]) -> LoraWeights:
    """The LoRA file at `path`, on the CPU.

    Raises `UserError` for what `inspect` refuses, for numbers that are not finite, and where the
    header and the tensors disagree on a rank.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    header = inspect(path)
    try:
        raw = load_file(header.path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{header.path} cannot be read: {error}") from error
    tensors = {}
    for key, tensor in raw.items():
        if not (tensor.is_floating_point() and bool(torch.isfinite(tensor.float()).all())):
            raise UserError(f"{header.path}: {key} holds values that are not finite numbers")
        tensors[".".join(split(key))] = tensor
    layouts = {
        component: _layout(header.path, component, tensors, header.metadata.get(component))
        for component in COMPONENTS
        if any(key.startswith(f"{component}.") for key in tensors)
    }
    promised = {
        component: tuple(fields["target_modules"])
        for component, fields in header.metadata.items()
        if isinstance(fields.get("target_modules"), list)
    }
    return LoraWeights(tensors, layouts, promised)


def parse(key: str) -> tuple[str, str, str] | None:
    """(component, name, part) of a key in any of diffusers' spellings; None for other keys."""
    component, _, rest = key.partition(".")
    for part, spellings in SPELLINGS.items():
        for spelling in spellings:
            name = rest.removesuffix(f".{spelling}")
            if component in COMPONENTS and name not in ("", rest):
                return component, name.removeprefix(TEXT_MODEL), part
    return None


def split(key: str) -> tuple[str, str, str]:
    """`parse` for keys that have been looked at."""
    parsed = parse(key)
    assert parsed is not None, key
    return parsed


def spell(component: str, path: str, part: str) -> str:
    """The key under which diffusers reads a part of the module at `path`."""
    spelling = part if component == "unet" else SPELLINGS[part][-1]
    return f"{component}.{path}.{spelling}"


def fit(weights: LoraWeights, models: Mapping[str, nn.Module]) -> Fit:
    """How `weights` compare with the modules of `models` (by component); changes nothing."""
    matched = 0
    missing, unexpected, misshapen = [], [], []
    expected: dict[str, tuple[int, ...]] = {}
    for component, layout in weights.layouts.items():
        modules = adaptable(models[component]) if component in models else {}
        for name, slot in layout.slots.items():
            if name in modules:
                shapes = _shapes(modules[name], slot.rank, layout.dora)
                expected |= {f"{component}.{name}.{part}": s for part, s in shapes.items()}
        promised = _targeted(modules, weights.promised.get(component, ()))
        missing += [f"{component}.{n}.{LORA_A}" for n in promised if n not in layout.slots]
    missing += [key for key in expected if key not in weights.tensors]
    for key, tensor in weights.tensors.items():
        shape = tuple(tensor.shape)
        if key not in expected:
            unexpected.append(key)
        elif shape != expected[key]:
            misshapen.append(f"{key} is {list(shape)}, here {list(expected[key])}")
        else:
            matched += 1
    return Fit(matched, tuple(missing), tuple(unexpected), tuple(misshapen))


# Writing ----------------------------------------------------------------------------------------


def save(place: Path, weights: LoraWeights, notes: Mapping[str, str] | None = None) -> Path:
    """Write a LoRA file that stock diffusers loads, and return its path.

    `notes` go into the header beside what decides the weights' meaning; `inspect` reads them.

    `place` is a folder, made if need be, or a path that ends in .safetensors. The file appears
    whole or not at all, also where the process is killed or the power fails. Raises `UserError`,
    and writes nothing, for values that are not finite and where the place cannot be written.
    """
    import torch
    from safetensors.torch import save as serialise

    bad = [name for name, tensor in weights.tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise UserError(
            f"the LoRA is not written: {len(bad)} of its {len(weights.tensors)} tensors hold values"
            f" that are not finite, as {bad[0]}"
        )
    tensors = {}
    for key, tensor in weights.tensors.items():
        component, name, part = split(key)
        text = component != "unet" and not name.startswith("text_projection")
        path = f"{TEXT_MODEL}{name}" if text else name
        tensors[spell(component, path, part)] = tensor.detach().cpu().contiguous()
    fields = {
        f"{component}.{name}": value
        for component, layout in weights.layouts.items()
        for name, value in layout.peft_fields().items()
    }
    metadata = {
        **(notes or {}),
        "format": "pt",
        METADATA: json.dumps(fields, indent=2, sort_keys=True),
    }
    file = place if place.suffix == ".safetensors" else place / FILE_NAME
    _write_whole(file, _in_order(serialise(tensors, metadata)))
    return file


def _in_order(contents: bytes) -> bytes:
    """The same safetensors file with its header in a fixed order: equal weights, equal bytes."""
    (length,) = struct.unpack("<Q", contents[:8])
    header = json.loads(contents[8 : 8 + length])
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8
    return struct.pack("<Q", len(text)) + text + contents[8 + length :]


def _write_whole(file: Path, contents: bytes) -> None:
    """Write `contents` to `file`, flushed to the disk under another name that is then changed."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(contents)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


# What lies in a header --------------------------------------------------------------------------


def _metadata(file: Path, texts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """PEFT's fields of each component, from the header's texts; empty where there are none."""
    text = texts.get(METADATA)
    if not text:
        return {}
    try:
        flat = json.loads(text).items()
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: {METADATA} in its header is no JSON object") from error
    found: dict[str, dict[str, Any]] = {}
    for key, value in flat:
        component, _, name = key.partition(".")
        found.setdefault(component, {})[name] = value
    return found


def _layout(
    file: Path, component: str, tensors: Mapping[str, Tensor], fields: Mapping[str, Any] | None
) -> Layout:
    """How a file adapts a component: ranks from the shapes, the rest from PEFT's `fields`.

    Without fields alpha = rank, as diffusers assumes.
    """
    ranks: dict[str, int] = {}
    dora = False
    for key, tensor in tensors.items():
        owner, name, part = split(key)
        if owner == component and part == LORA_A and tensor.ndim > 1:
            ranks[name] = tensor.shape[0]
        elif owner == component and part == LORA_B and tensor.ndim > 1:
            ranks.setdefault(name, tensor.shape[1])
        dora |= owner == component and part == MAGNITUDE
    if fields is None:
        return Layout({name: Slot(rank, rank) for name, rank in ranks.items()}, dora)
    try:
        slots = {}
        for name, rank in ranks.items():
            told = _value(fields.get("rank_pattern"), name, fields.get("r", 8))
            if told != rank:
                raise UserError(f"{file}: its header says rank {told} for {name}, which has {rank}")
            alpha = _value(fields.get("alpha_pattern"), name, fields.get("lora_alpha", 8))
            if not math.isfinite(alpha):
                raise UserError(f"{file}: its header says alpha {alpha} for {name}")
            slots[name] = Slot(rank, alpha)
    except (TypeError, AttributeError, re.error) as error:
        raise UserError(f"{file}: the metadata of {component} cannot be read: {error}") from error
    return Layout(slots, dora or bool(fields.get("use_dora")), bool(fields.get("use_rslora")))


def _value(patterns: Mapping[str, Any] | None, name: str, otherwise: Any) -> Any:
    """What PEFT's rank_pattern or alpha_pattern has for a module, by PEFT's rule."""
    for pattern, value in (patterns or {}).items():
        if any(re.match(rf"(.*\.)?({pattern})$", path) for path in (name, TEXT_MODEL + name)):
            return value
    return otherwise


def _targeted(names: Iterable[str], targets: tuple[str, ...]) -> list[str]:
    """Those of `names` that PEFT's `target_modules` mean: equal, or ending so after a dot."""
    exact = set(targets)
    ends = tuple(f".{target}" for target in targets)
    return [
        name
        for name in names
        if any(path in exact or path.endswith(ends) for path in (name, TEXT_MODEL + name))
    ]


def _shapes(module: nn.Module, rank: int, dora: bool) -> dict[str, tuple[int, ...]]:
    """The shapes of the parts beside a linear module [out, in] or a convolution [out, in, k, k]."""
    out, into, *kernel = module.get_parameter("weight").shape
    ones = [1] * len(kernel)
    shapes = {LORA_A: (rank, into, *kernel), LORA_B: (out, rank, *ones)}
    if dora:
        shapes[MAGNITUDE] = (1, out, *ones) if kernel else (out,)
    return shapes
