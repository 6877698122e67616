"""What a LoRA adds to a weight, and LoRAs made anew from that: the arithmetic of one module.

Legend
    W       the base's weight, [out, in] or [out, in, k, k]
    D       scale * B A, of W's shape
    m       DoRA's magnitudes: of rows, W + D becomes m * (W + D) / |W + D|, row by row
            (2402.09353, eq. 5); of columns the same, column by column

All is computed in float32, whatever the tensors have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.layouts.lycoris import beside_identity
from ldm_pipeline.lora.targets import Layout, Slot
from ldm_pipeline.lora.weights import COLUMNS, LORA_A, LORA_B, MAGNITUDE, LoraWeights

if TYPE_CHECKING:
    from torch import Tensor

Base = Callable[[str, str], "Tensor | None"]
"""The base's W by component and name; None for a module that it has not."""


def product(weights: LoraWeights, component: str, name: str) -> Tensor:
    """D, float32."""
    parts = weights.parts(component, name)
    a, b = parts[LORA_A].float(), parts[LORA_B].float()
    d = b.flatten(1) @ a.flatten(1)
    return (weights.layouts[component].scale(name) * d).reshape(b.shape[0], *a.shape[1:])


def delta(
    weights: LoraWeights, component: str, name: str, base: Tensor | None, weight: float = 1.0
) -> Tensor:
    """What is added to W of one module at this weight, float32.

    DoRA needs W as `base`; the weight counts inside of it, as PEFT has it.
    """
    parts = weights.parts(component, name)
    d = weight * product(weights, component, name)
    if MAGNITUDE not in parts and COLUMNS not in parts:
        return d
    if base is None:
        raise UserError(
            f"{component}.{name} is DoRA, which means something beside its base's weights only;"
            " name the base with --model"
        )
    w = base.float().to(d.device)
    m = (parts[MAGNITUDE] if MAGNITUDE in parts else parts[COLUMNS]).float().flatten()
    axis = 0 if MAGNITUDE in parts else 1
    lengths = (w + d).transpose(0, axis).flatten(1).norm(dim=1)
    shape = [-1 if side == axis else 1 for side in range(w.ndim)]
    return (m / lengths).reshape(shape) * (w + d) - w


def full_rank(d: Tensor) -> tuple[Tensor, Tensor]:
    """(A, B) whose product is D, exactly: one of them is an identity."""
    out, into, *kernel = d.shape
    up, down = beside_identity(d.flatten(1))
    a = down.reshape(down.shape[0], into, *kernel)
    return a, up.reshape(out, up.shape[1], *[1] * len(kernel))


def completed(weights: LoraWeights, base: Base) -> LoraWeights:
    """The same LoRA in the terms that PEFT has, for the model whose weights `base` tells.

    Some files leave to the model what diffusers' and PEFT's layouts have to say:
    - whether a 1 x 1 convolution is one: A and B get the dimensions that W has;
    - DoRA by columns becomes a LoRA of full rank, equal at weight 1;
    - modules without a magnitude among others with one get the one that changes nothing at
      weight 1.
    Modules that the model has not stay as they are, for `fit` to name.
    """
    tensors, layouts = dict(weights.tensors), {}
    for component, layout in weights.layouts.items():
        slots = dict(layout.slots)
        plain = set(layout.plain)
        for name in layout.slots:
            parts = weights.parts(component, name)
            w = base(component, name)
            if w is None or LORA_A not in parts or LORA_B not in parts:
                continue
            a, b = _shaped(parts[LORA_A], w), _shaped(parts[LORA_B], w)
            if a.shape[1:] != w.shape[1:] or b.shape[0] != w.shape[0] or a.shape[0] != b.shape[1]:
                continue
            key = f"{component}.{name}."
            tensors |= {key + LORA_A: a, key + LORA_B: b}
            if COLUMNS in parts:
                a, b = full_rank(delta(_with(weights, tensors), component, name, w))
                tensors |= {key + LORA_A: a, key + LORA_B: b}
                del tensors[key + COLUMNS]
                rank = a.shape[0]
                slots[name] = Slot(rank, rank**0.5 if layout.rslora else rank)
            if name in plain:
                d = product(
                    _with(weights, tensors, component, replace(layout, slots=slots)),
                    component,
                    name,
                )
                lengths = (w.float().to(d.device) + d).flatten(1).norm(dim=1)
                tensors[key + MAGNITUDE] = lengths.reshape(1, -1, 1, 1) if w.ndim == 4 else lengths
                plain.discard(name)
            elif MAGNITUDE in parts:
                m = parts[MAGNITUDE]
                tensors[key + MAGNITUDE] = m.reshape(1, -1, 1, 1) if w.ndim == 4 else m.flatten()
        layouts[component] = replace(layout, slots=slots, plain=frozenset(plain))
    return replace(weights, tensors=tensors, layouts=layouts)


def without_dora(weights: LoraWeights, base: Base) -> LoraWeights:
    """A plain LoRA that is equal at weight 1: DoRA's modules at full rank, the others as they are.

    Raises `UserError` where the base lacks a module that is DoRA.
    """
    tensors: dict[str, Tensor] = {}
    layouts = {}
    for component, layout in weights.layouts.items():
        slots = dict(layout.slots)
        for name, slot in layout.slots.items():
            parts = weights.parts(component, name)
            if MAGNITUDE in parts or COLUMNS in parts:
                d = delta(weights, component, name, base(component, name))
                a, b = full_rank(d)
                slots[name] = Slot(a.shape[0], a.shape[0])
                parts = {LORA_A: a, LORA_B: b}
            else:
                slots[name] = Slot(slot.rank, slot.rank * layout.scale(name))
            tensors |= {f"{component}.{name}.{part}": tensor for part, tensor in parts.items()}
        layouts[component] = Layout(slots)
    return replace(weights, tensors=tensors, layouts=layouts)


def is_dora(weights: LoraWeights) -> bool:
    """Whether any module has magnitudes."""
    return any(key.endswith((f".{MAGNITUDE}", f".{COLUMNS}")) for key in weights.tensors)


def _shaped(tensor: Tensor, w: Tensor) -> Tensor:
    """A matrix as a 1 x 1 convolution or the other way round, where W is so."""
    if tensor.ndim == 2 and w.ndim == 4:
        return tensor[:, :, None, None]
    if tensor.ndim == 4 and w.ndim == 2 and tensor.shape[2:] == (1, 1):
        return tensor[:, :, 0, 0]
    return tensor


def _with(
    weights: LoraWeights,
    tensors: dict[str, Tensor],
    component: str = "",
    layout: Layout | None = None,
) -> LoraWeights:
    layouts = {**weights.layouts, component: layout} if layout else weights.layouts
    return replace(weights, tensors=tensors, layouts=layouts)
