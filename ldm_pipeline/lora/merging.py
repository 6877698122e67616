"""Several LoRAs as one, exactly; and LoRAs inside a checkpoint's weights.

    sum of w_i s_i B_i A_i = [w_1 s_1 B_1, w_2 s_2 B_2, …] [A_1; A_2; …]

so that the ranks of a module add up, and nothing is approximated. DoRA is no sum: beside the
base's weights it is first turned into what is (`deltas.without_dora`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.checkpoints import ModelFolder, rewritten
from ldm_pipeline.lora.deltas import completed, delta, is_dora
from ldm_pipeline.lora.fitting import fit_modules
from ldm_pipeline.lora.targets import Layout, Slot
from ldm_pipeline.lora.weights import LORA_A, LORA_B, LoraWeights

if TYPE_CHECKING:
    from torch import Tensor


def stack(loras: Sequence[tuple[LoraWeights, float]]) -> LoraWeights:
    """The sum of LoRAs, each times its weight, as one LoRA of scale 1, float32.

    Raises `UserError` for DoRA, and where two have another shape for one module.
    """
    if any(is_dora(weights) for weights, _ in loras):
        raise UserError(
            "DoRA means something beside its base's weights only, and cannot be summed without"
            " them; name the base with --model, or merge into it with --into"
        )
    tensors: dict[str, Tensor] = {}
    layouts = {}
    components = dict.fromkeys(component for weights, _ in loras for component in weights.layouts)
    for component in components:
        slots = {}
        names = {
            name: None
            for weights, _ in loras
            if component in weights.layouts
            for name in weights.layouts[component].slots
        }
        for name in names:
            downs, ups = [], []
            for weights, weight in loras:
                layout = weights.layouts.get(component)
                if layout is None or name not in layout.slots:
                    continue
                parts = weights.parts(component, name)
                downs.append(parts[LORA_A].float())
                ups.append(parts[LORA_B].float() * (weight * layout.scale(name)))
            same = {(*a.shape[1:], "x", *b.shape[:1]) for a, b in zip(downs, ups, strict=True)}
            if len(same) > 1:
                raise UserError(f"the LoRAs are for different models: {component}.{name} differs")
            key = f"{component}.{name}."
            tensors[key + LORA_A], tensors[key + LORA_B] = torch.cat(downs), torch.cat(ups, dim=1)
            rank = tensors[key + LORA_A].shape[0]
            slots[name] = Slot(rank, rank)
        layouts[component] = Layout(slots)
    return LoraWeights(tensors, layouts)


def into_checkpoint(
    checkpoint: ModelFolder, loras: Sequence[tuple[LoraWeights, float]], out: Path
) -> Path:
    """A copy of the model folder at `out` with the LoRAs, each times its weight, in its weights.

    Sums are made in float32 and stored in the precision that each weight had. Raises `UserError`,
    and writes nothing, for a LoRA that does not fit.
    """
    settled = []
    for weights, weight in loras:
        own = completed(weights, checkpoint.weight)
        found = fit_modules(own, checkpoint.modules)
        if not found:
            raise UserError(f"a LoRA does not fit {checkpoint.folder}: {found}")
        settled.append((own, weight))

    def change(component: str, name: str, w: Tensor) -> Tensor:
        return w.float() + added(settled, component, name, w)

    return rewritten(checkpoint, out, change)


def added(
    loras: Sequence[tuple[LoraWeights, float]], component: str, name: str, w: Tensor
) -> Tensor:
    """What LoRAs together add to W of one module, float32."""
    total = torch.zeros(w.shape, device=w.device)
    for weights, weight in loras:
        layout = weights.layouts.get(component)
        if layout is not None and name in layout.slots and weight:
            total += delta(weights, component, name, w, weight).to(w.device)
    return total
