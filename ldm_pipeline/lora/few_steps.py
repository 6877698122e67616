"""A UNet with one adapter more, for the runs that ask for it; the pipeline's own is not touched.

It is a second set of modules over the same weights, so that other threads go on drawing with the
first, and nothing has to be put back. What it costs to make is paid again only when the pipeline's
UNet or the file has changed.
"""

from __future__ import annotations

import copy
import os
import threading
from typing import Any, Literal
from weakref import WeakKeyDictionary

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.attach import Pipeline, put
from ldm_pipeline.lora.files import inspect
from ldm_pipeline.lora.notes import NO_ADAPTER, LcmNote, note_of, read_note
from ldm_pipeline.lora.published import fetched, lcm_lora
from ldm_pipeline.models import bundled, compiling, offloading
from ldm_pipeline.models.unet import adapters_at_rest

SETTINGS = (str, int, float, type(None))
"""Of plain values; a tuple is looked through quicker than a union."""

_making = threading.Lock()
_made: WeakKeyDictionary[nn.Module, tuple[object, nn.Module]] = WeakKeyDictionary()
"""For each pipeline's UNet the last one made beside it, and from what."""


def few_step_unet(
    pipe: Pipeline, lcm: Literal[True] | str | os.PathLike[str]
) -> tuple[Any, LcmNote]:
    """The UNet to draw with in few steps, and how it was distilled.

    `lcm` is the adapter's file; True is the one that comes with the bundled model or, for Stable
    Diffusion 1.x and SDXL, the published LCM-LoRA, from the hub or its cache. It acts beside the
    adapters that are active, with weight 1. A UNet that takes guidance as an input is a full LCM:
    with True it is drawn with as it is, on the levels that its scheduler names. Raises `UserError`
    where there is no adapter, for a file that cannot be read or does not fit, and under CPU
    offload.
    """
    if lcm is True and pipe.unet.config.time_cond_proj_dim is not None:
        return pipe.unet, note_of(pipe.scheduler.config)
    file: str | os.PathLike[str] | None = lcm if lcm is not True else None
    if lcm is True:
        known = lcm_lora(pipe.unet.config.cross_attention_dim)
        file = bundled.few_step_adapter() if known is None else fetched(known)
    if file is None:
        raise UserError(NO_ADAPTER)
    note, header = read_note(file), inspect(file)
    unet = getattr(pipe.unet, "_orig_mod", pipe.unet)  # torch.compile's wrapper holds it
    if offloading.moves(unet):
        raise UserError(
            "lcm does not go together with CPU offload; load the adapter with"
            " pipe.load_lora_weights and draw with sampler='lcm'"
        )
    facts = [own.stat() for own in header.files.values()]
    with _making, adapters_at_rest():
        dates = [(fact.st_mtime_ns, fact.st_size) for fact in facts]
        compiled = compiling.compiled(unet)
        key = (header.path.resolve(), *dates, _state(unet), compiled)
        made_of, made = _made.get(unet, (None, unet))
        if made_of != key:
            made = _copy(unet)
            active = _active(made)
            refusal = NO_ADAPTER if lcm is True else None
            (name,) = put(pipe, {"unet": made}, [header.path], refusal)
            for layer in _layers(made):
                layer.enable_adapters(True)
                layer.set_adapter([*active.get(layer, []), name])
            made.requires_grad_(False)
            compiling.compile_blocks(made, compiled)
            _made[unet] = key, made
        return made, note


def _copy(unet: nn.Module) -> nn.Module:
    """The same modules once more, over the same memory; plain attention processors are shared."""
    shared: dict[int, Any] = {id(buffer): buffer for buffer in unet.buffers()}
    for weight in unet.parameters():
        plain = type(weight) is nn.Parameter
        shared[id(weight)] = nn.Parameter(weight.data, requires_grad=False) if plain else weight
    processors = (getattr(module, "processor", None) for module in unet.modules())
    shared |= {id(each): each for each in processors if not isinstance(each, nn.Module)}
    return copy.deepcopy(unet, shared)


def _state(unet: nn.Module) -> object:
    """All that decides what `unet` does: its parts, their settings, and where their weights are.

    Asked for every picture, of thousands of modules: it has to be quick.
    """
    return [
        (
            name,
            type(module),
            [(k, _frozen(v)) for k, v in vars(module).items() if _is_setting(v)],
            [(k, w.data_ptr(), w.dtype, w.device) for k, w in _weights(module)],
            [id(getattr(module, "processor", None)), *module._forward_hooks],
            [*module._forward_pre_hooks],
            _adapting(module) if isinstance(module, BaseTunerLayer) else None,
        )
        for name, module in unet.named_modules()
    ]


def _is_setting(value: object) -> bool:
    """Whether a module's attribute is a plain value, or a list of them as IP-Adapters' scales."""
    if isinstance(value, SETTINGS):
        return True
    return isinstance(value, (list, tuple)) and all(map(_is_setting, value))


def _frozen(value: Any) -> object:
    """A setting as it is now, whatever becomes of the lists in it."""
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def _weights(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The module's own weights."""
    return [(name, w) for name, w in module._parameters.items() if w is not None]


def _adapting(layer: Any) -> object:
    """With which adapters a layer works, and how strongly."""
    return (
        [*layer.active_adapters],
        {**layer.scaling},
        layer.disable_adapters,
        [*layer.merged_adapters],
    )


def _layers(model: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _active(model: nn.Module) -> dict[BaseTunerLayer, list[str]]:
    """The adapters that each adapted layer draws with; none where they are turned off."""
    return {
        layer: [] if layer.disable_adapters else list(layer.active_adapters)
        for layer in _layers(model)
    }
