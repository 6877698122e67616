"""LoRAs inside a pipeline's weights: as fast as the base, and out again to the last bit.

Stock `fuse_lora` adds, and `unfuse_lora` subtracts; in half precision the rest of each rounding
stays behind. Here the weights that are changed are kept as they were, on the CPU.

The numbers in the weights change and nothing else, so that a compiled pipeline stays compiled,
whichever adapters it draws with.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.attach import Pipeline, networks
from ldm_pipeline.lora.deltas import completed
from ldm_pipeline.lora.files import check_weight, load
from ldm_pipeline.lora.fitting import fit
from ldm_pipeline.lora.merging import added
from ldm_pipeline.lora.targets import adaptable
from ldm_pipeline.models.quantising import quantised
from ldm_pipeline.models.text import has_adapters

if TYPE_CHECKING:
    from torch import Tensor, nn


class Fused:
    """A pipeline's networks with LoRAs in their weights, or with none.

    `swap` puts other files in; `swap([])` leaves the base's weights, bit for bit. Meanwhile nobody
    else may change them, and no adapters may be attached.
    """

    def __init__(self, pipe: Pipeline) -> None:
        self._models: dict[str, nn.Module] = {
            component: getattr(model, "_orig_mod", model)
            for component, model in networks(pipe).items()
        }
        if any(has_adapters(model) for model in self._models.values()):
            raise UserError("adapters are attached; take them out first (unload_lora_weights)")
        if any(quantised(model) != "none" for model in self._models.values()):
            raise UserError("the weights were rounded; attach adapters beside them (lora.attach)")
        self._kept: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def swap(self, files: Sequence[tuple[str | os.PathLike[str], float]]) -> None:
        """Draw with the LoRAs of (path, weight) pairs from now on, and with no others.

        Raises `UserError`, nothing changed, for a file that cannot be read or does not fit.
        """
        modules = {component: adaptable(model) for component, model in self._models.items()}
        loras = []
        for path, weight in files:
            check_weight(path, weight)
            weights = completed(load(path), lambda c, n: self._base(modules, c, n))
            found = fit(weights, self._models)
            if not found:
                raise UserError(found.refusal(path))
            loras.append((weights, weight))
        wanted = {place for weights, weight in loras if weight for place in weights.modules()}
        for place in self._kept.keys() | wanted:
            w = modules[place[0]][place[1]].get_parameter("weight")
            if place not in self._kept:
                self._kept[place] = w.detach().to("cpu", copy=True)
            base = self._kept[place].to(w.device)
            changed = place in wanted
            w.copy_(base.float() + added(loras, *place, base) if changed else base)

    def _base(
        self, modules: Mapping[str, Mapping[str, nn.Module]], component: str, name: str
    ) -> Tensor | None:
        """W as the base has it."""
        if (component, name) in self._kept:
            return self._kept[component, name]
        module = modules.get(component, {}).get(name)
        return None if module is None else module.get_parameter("weight").detach()
