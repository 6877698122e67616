"""Kohya's layout: one file, modules' names with underscores, alpha as a tensor beside A and B.

ComfyUI, A1111, Forge and SD.Next read it. A module is `lora_unet_down_blocks_0_…` with
`lora_down.weight`, `lora_up.weight`, `alpha`, and in DoRA's case `dora_scale`; SDXL's UNet has the
names of its first release. LyCORIS writes its products into the same layout.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.layouts import lycoris
from ldm_pipeline.lora.layouts.families import Family
from ldm_pipeline.lora.layouts.names import dotted, flat
from ldm_pipeline.lora.layouts.reading import tensors_of
from ldm_pipeline.lora.layouts.sgm_names import from_sgm, to_sgm
from ldm_pipeline.lora.targets import TEXT_MODEL, Layout, Slot
from ldm_pipeline.lora.weights import COLUMNS, LORA_A, LORA_B, MAGNITUDE, Header, LoraWeights
from ldm_pipeline.models.headers import FileHeader

if TYPE_CHECKING:
    from torch import Tensor

DOWN, UP, ALPHA, DORA = "lora_down.weight", "lora_up.weight", "alpha", "dora_scale"
ATTENTION = re.compile(r"\.attn[12]\.")
PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}


# Reading ----------------------------------------------------------------------------------------


def parse(key: str) -> tuple[str, str, str] | None:
    """(component, name, part) of a key, the part as LyCORIS calls it; None for other keys."""
    module, _, part = key.partition(".")
    for prefix, component in PREFIXES.items():
        if module.startswith(prefix) and part:
            name = dotted(module.removeprefix(prefix))
            name = from_sgm(name) if component == "unet" else name.removeprefix(TEXT_MODEL)
            return component, name, part
    return None


def inspect(file: Path, found: FileHeader) -> Header:
    """The header of a file whose keys all `parse`; `UserError` for parts of no known form."""
    modules = _modules(file, found.shapes)
    for (component, name), parts in modules.items():
        if _form(parts) is None:
            raise UserError(
                f"{file}: {component}.{name} has {', '.join(sorted(parts))}, which is no whole"
                f" LoRA, {', '.join(lycoris.FORMS)}"
            )
    return Header(file, "kohya", found.shapes, {}, found.texts, {"": file})


def read(header: Header) -> LoraWeights:
    """The weights behind a header, LyCORIS' products as A and B."""
    raw = tensors_of(header)
    tensors: dict[str, Tensor] = {}
    slots: dict[str, dict[str, Slot]] = {}
    magnitudes: dict[str, set[str]] = {}
    for (component, name), keys in _modules(header.path, header.shapes).items():
        parts = {part: raw[key] for part, key in keys.items()}
        where = f"{header.path}: {component}.{name}"
        alpha = _number(where, parts.pop(ALPHA)) if ALPHA in parts else None
        dora = parts.pop(DORA, None)
        form = _form(keys)
        if form == "LoRA":
            a, b = parts[DOWN], parts[UP]
            rank = a.shape[0] if a.ndim in (2, 4) else 0
            slot = Slot(rank, rank if alpha is None else alpha)
        else:
            assert form is not None
            a, b, scale = lycoris.low_rank(where, form, parts, alpha)
            rank = a.shape[0]
            slot = Slot(rank, rank * scale)
        if rank < 1 or b.ndim != a.ndim or b.shape[1] != rank:
            raise UserError(
                f"{where} has A {list(a.shape)} and B {list(b.shape)}, which do not fit"
            )
        slots.setdefault(component, {})[name] = slot
        found = {LORA_A: a, LORA_B: b}
        if dora is not None:
            part, value = _magnitude(where, dora, a, b)
            found[part] = value
            if part == MAGNITUDE:
                magnitudes.setdefault(component, set()).add(name)
        tensors |= {f"{component}.{name}.{part}": tensor for part, tensor in found.items()}
    layouts = {}
    for component, own in slots.items():
        rows = magnitudes.get(component, set())
        plain = frozenset(own.keys() - rows) if rows else frozenset()
        layouts[component] = Layout(own, dora=bool(rows), plain=plain)
    return LoraWeights(tensors, layouts)


def _modules(file: Path, keys: Iterable[str]) -> dict[tuple[str, str], dict[str, str]]:
    """The keys of each module by part; `UserError` for what is there twice."""
    modules: dict[tuple[str, str], dict[str, str]] = {}
    for key in keys:
        parsed = parse(key)
        assert parsed is not None, key
        component, name, part = parsed
        parts = modules.setdefault((component, name), {})
        if part in parts:
            raise UserError(f"{file} holds {component}.{name} twice, as {parts[part]} and {key}")
        parts[part] = key
    return modules


def _form(parts: Iterable[str]) -> str | None:
    """Which form a module has; None for parts that are missing, too many or unknown."""
    own = frozenset(parts) - {ALPHA, DORA}
    return "LoRA" if own == {DOWN, UP} else lycoris.form_of(own)


def _number(where: str, tensor: Tensor) -> float:
    """An alpha; 0 stands for the rank in no tool, so it is what it says."""
    if tensor.numel() != 1:
        raise UserError(f"{where} has an alpha of shape {list(tensor.shape)}; it is one number")
    return float(tensor)


def _magnitude(where: str, dora: Tensor, a: Tensor, b: Tensor) -> tuple[str, Tensor]:
    """DoRA's magnitude as PEFT shapes it, or LyCORIS' of columns, by its shape.

    [out, 1(, 1, 1)] measures rows; [1, in(, 1, 1)] columns. The few files that were written from
    PEFT's own magnitudes, [out] and [1, out, 1, 1], are told by their lengths.
    """
    outs, ins, kernel = b.shape[0], a.shape[1], a.shape[2:]
    sides = [side for side in dora.shape if side != 1]
    if len(sides) <= 1 and dora.numel() in (outs, ins):
        rows = dora.numel() == outs and (dora.ndim == 1 or dora.shape[0] == outs or outs != ins)
        if rows:
            return MAGNITUDE, dora.reshape(1, outs, 1, 1) if kernel else dora.reshape(outs)
        return COLUMNS, dora.reshape(1, ins, *[1] * len(kernel))
    raise UserError(
        f"{where} has a dora_scale {list(dora.shape)}; it needs [{outs}, 1] or [1, {ins}]"
    )


# Writing ----------------------------------------------------------------------------------------


def spelled(weights: LoraWeights, family: Family) -> dict[str, Tensor]:
    """The tensors by kohya's keys, an alpha for each module.

    Raises `UserError` for components and modules that the family has not.
    """
    import torch

    tensors: dict[str, Tensor] = {}
    alphas = _alphas(weights)
    for component, name in weights.modules():
        if component not in family.prefixes:
            raise UserError(f"{family.title} has no {component}; another --base?")
        parts = weights.parts(component, name)
        a, b = parts[LORA_A], parts[LORA_B]
        rank = a.shape[0]
        own, alpha = rank * weights.layouts[component].scale(name), alphas[component, name]
        if own != alpha:
            b = b.float() * (own / alpha)
        module = f"{family.prefixes[component]}_{flat(_path(component, name, family))}"
        tensors[f"{module}.{DOWN}"] = a
        tensors[f"{module}.{UP}"] = b
        tensors[f"{module}.{ALPHA}"] = torch.tensor(float(alpha))
        if MAGNITUDE in parts:
            tensors[f"{module}.{DORA}"] = parts[MAGNITUDE].reshape(-1, *[1] * (a.ndim - 1))
        elif COLUMNS in parts:
            tensors[f"{module}.{DORA}"] = parts[COLUMNS]
    return tensors


def _path(component: str, name: str, family: Family) -> str:
    """The dotted name that a family's file has for a module."""
    if component == "unet":
        return to_sgm(name) if family.sgm else name
    return name if name.startswith("text_projection") else TEXT_MODEL + name


def _alphas(weights: LoraWeights) -> dict[tuple[str, str], float]:
    """The alpha that each module is written with, by (component, name).

    Stock diffusers, reading this layout, loses the alphas of a UNet's attention and of a text
    encoder where they are not the commonest of their component. There they are written with the
    commonest, and B takes up the difference.
    """
    alphas: dict[tuple[str, str], float] = {}
    for component, layout in weights.layouts.items():
        own = {name: slot.rank * layout.scale(name) for name, slot in layout.slots.items()}
        common = next((a for a, _ in Counter(own.values()).most_common() if a), 1.0)
        lost = {name for name in own if component != "unet" or ATTENTION.search(name)}
        written = {name: common if name in lost else alpha for name, alpha in own.items()}
        first, *others = Counter(written.values()).most_common(2)
        tied = written != own and (
            first[0] != common or any(count == first[1] for _, count in others)
        )
        alphas |= {(component, name): common if tied else a for name, a in written.items()}
    return alphas
