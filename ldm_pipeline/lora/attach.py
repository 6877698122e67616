"""Drawing with LoRA files: several at once, each with its weight, or none and nothing changed.

The loading itself is diffusers'; before it, every file is read and compared with the pipeline, so
that a file that does not fit is refused while nothing has been touched.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers.utils.peft_utils import set_weights_and_activate_adapters
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.deltas import Base, completed
from ldm_pipeline.lora.files import check_weight, load
from ldm_pipeline.lora.fitting import fit
from ldm_pipeline.lora.inject import remove
from ldm_pipeline.lora.layouts.diffusers import spell
from ldm_pipeline.lora.targets import COMPONENTS, TEXT_MODEL, adaptable
from ldm_pipeline.lora.weights import LoraWeights, split
from ldm_pipeline.models.text import has_adapters
from ldm_pipeline.values import check_path

Pipeline = Any
"""A diffusers pipeline of the Stable Diffusion family: ours, or a stock one."""


def attach(
    pipe: Pipeline, files: Sequence[tuple[str | os.PathLike[str], float]]
) -> tuple[str, ...]:
    """Load the LoRA files of (path, weight) pairs and draw with them from now on.

    They become the active adapters; others stay loaded. A file of weight 0 is loaded and not
    used, so pictures are the base's to the last bit (DoRA at scale 0 would not be that). Returns
    the adapters' names, in order, for `pipe.set_adapters`; `pipe.unload_lora_weights()` takes all
    out. Raises `UserError` for what are no pairs, a weight that is not finite, a file that cannot
    be read and one that does not fit, with counts of its keys; the pipeline is then exactly as it
    was.
    """
    pairs = isinstance(files, Sequence) and all(
        isinstance(entry, list | tuple) and len(entry) == 2 for entry in files
    )
    if not pairs:
        raise UserError(
            f"files={files!r} must be a list of (path, weight) pairs, such as"
            " [('words.safetensors', 0.8)]"
        )
    models = networks(pipe)
    for path, weight in files:
        check_path("path", path)
        check_weight(path, weight)
    names = put(pipe, models, [path for path, _ in files])
    strengths = {name: weight for name, (_, weight) in zip(names, files, strict=True) if weight}
    for model in models.values():
        if has_adapters(model):
            set_weights_and_activate_adapters(model, list(strengths), list(strengths.values()))
    return names


def put(
    pipe: Pipeline,
    models: Mapping[str, nn.Module],
    files: Sequence[str | os.PathLike[str]],
    refusal: str | None = None,
) -> tuple[str, ...]:
    """Load LoRA files into `models` (by component); which are active is left to the caller.

    Returns the adapters' names. Raises `UserError`, nothing changed, for a file that cannot be read
    and for one that does not fit, in the words of `refusal` where there is one.
    """
    loaded = []
    base = base_of(models)
    for path in files:
        weights = completed(load(path), base)
        found = fit(weights, models)
        if not found:
            raise UserError(refusal or found.refusal(path))
        loaded.append(weights)
    names = _free_names(models, len(files))
    active = _active(models)
    try:
        for name, weights in zip(names, loaded, strict=True):
            _put(pipe, models, weights, name)
    except BaseException:
        for model in models.values():
            for name in names:
                remove(model, name)
        for layer, before in active.items():
            layer.set_adapter(before)
        raise
    return names


def base_of(models: Mapping[str, nn.Module]) -> Base:
    """The weights under the adapters of `models`."""
    modules = {component: adaptable(model) for component, model in models.items()}

    def base(component: str, name: str) -> Tensor | None:
        module = modules.get(component, {}).get(name)
        return None if module is None else module.get_parameter("weight").detach()

    return base


def networks(pipe: Pipeline) -> dict[str, nn.Module]:
    """The networks of `pipe` that a LoRA can adapt, by component."""
    found = {component: getattr(pipe, component, None) for component in COMPONENTS}
    return {component: model for component, model in found.items() if model is not None}


def _put(pipe: Pipeline, models: Mapping[str, nn.Module], weights: LoraWeights, name: str) -> None:
    """Have diffusers load `weights`, which fit, under `name`."""
    for component, layout in weights.layouts.items():
        model = models[component]
        paths = {path.removeprefix(TEXT_MODEL): path for path, _ in model.named_modules()}
        state = {}
        for key, tensor in weights.tensors.items():
            owner, module, part = split(key)
            if owner == component:
                state[spell(component, paths[module], part)] = tensor
        options = {
            "network_alphas": None,
            "adapter_name": name,
            "metadata": {f"{component}.{k}": v for k, v in layout.peft_fields().items()},
            "low_cpu_mem_usage": True,
            "_pipeline": pipe,
        }
        with warnings.catch_warnings():
            # That several adapters are loaded is what was asked for.
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
            if component == "unet":
                pipe.load_lora_into_unet(state, unet=model, **options)
            else:
                pipe.load_lora_into_text_encoder(
                    state, text_encoder=model, prefix=component, **options
                )


def _free_names(models: Mapping[str, nn.Module], count: int) -> tuple[str, ...]:
    """Names for new adapters, after those that are taken. Files' own names will not do: PEFT
    confuses an adapter called `lora`, or like a module, with the model's own parts."""
    taken = {name for model in models.values() for name in getattr(model, "peft_config", {})}
    free = (name for k in range(len(taken) + count) if (name := f"attached_{k}") not in taken)
    return tuple(name for name, _ in zip(free, range(count), strict=False))


def _active(models: Mapping[str, nn.Module]) -> dict[BaseTunerLayer, list[str]]:
    """The adapters that each adapted layer draws with."""
    return {
        layer: list(layer.active_adapters)
        for model in models.values()
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
    }
