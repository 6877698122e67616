"""Putting a LoRA into networks to train it, and taking it out again.

The base is frozen; what is learnt are float32 master weights whatever the base's precision,
because a step of 1e-4 on a bfloat16 number rounds away (PEFT creates adapters in the base's).

Legend
    A, B        what is learnt beside a frozen weight W: W + scale * B A; B begins at zero
    magnitude   DoRA's length of each row of W + scale * B A (2402.09353)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.arithmetic import fuse
from ldm_pipeline.lora.targets import TEXT_MODEL, Layout, LoraSettings, resolve
from ldm_pipeline.lora.weights import LORA_A, LORA_B, MAGNITUDE, LoraWeights
from ldm_pipeline.models.text import has_adapters

NAME = "default"
"""What PEFT calls the adapter that is being trained."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA inside networks.

    `models` are the networks by component, `layouts` what is adapted in each. `parameters` are
    all that is trained, under the names that `LoraWeights` uses; `was_trainable` are the base's
    parameters (by component) that `inject` froze.
    """

    models: Mapping[str, nn.Module]
    layouts: Mapping[str, Layout]
    parameters: Mapping[str, nn.Parameter]
    was_trainable: Mapping[str, frozenset[str]]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block the networks are those of the base."""
        networks: list[Any] = list(self.models.values())
        for network in networks:
            network.disable_adapters()
        try:
            yield
        finally:
            for network in networks:
                network.enable_adapters()

    def weights(self, values: Mapping[str, Tensor] | None = None) -> LoraWeights:
        """What a file holds of it: its parameters, or other `values` of them, as an average."""
        tensors = {name: value.detach() for name, value in (values or self.parameters).items()}
        assert tensors.keys() == self.parameters.keys()
        return LoraWeights(tensors, self.layouts)


def inject(
    models: Mapping[str, nn.Module],
    settings: LoraSettings,
    *,
    seed: int,
    unread: Sequence[str] = (),
    fused: bool = True,
) -> Adapter:
    """Put a new LoRA into `models` (by component: unet, text_encoder, text_encoder_2).

    It changes nothing yet: B is zero. A is drawn from `seed` alone; torch's own generator is
    left as it was. Every other parameter of `models` is frozen. `unread` are patterns of modules
    that are left alone, see `resolve`; `fused` layers compute as `lora.arithmetic` says, the same
    numbers up to rounding. Raises `UserError`, before anything is changed, where `settings` do not
    fit the models or adapters are already in one.
    """
    for component, model in models.items():
        if has_adapters(model):
            raise UserError(
                f"the {component} already has an adapter; take it out first (unload_lora_weights)"
            )
    layouts = resolve(models, settings, unread)
    was_trainable = {
        component: frozenset(n for n, p in model.named_parameters() if p.requires_grad)
        for component, model in models.items()
    }
    generator = torch.Generator().manual_seed(seed)
    parameters: dict[str, nn.Parameter] = {}
    with torch.random.fork_rng(devices=[]):
        for component, model in models.items():
            model.requires_grad_(False)
            config = LoraConfig(**layouts[component].peft_fields())
            network: Any = model
            network.add_adapter(config, adapter_name=NAME)
            for path, layer in _layers(model).items():
                _begin(layer, generator)
                if fused:
                    fuse(layer)
                name = f"{component}.{path.removeprefix(TEXT_MODEL)}"
                parameters |= {f"{name}.{part}": p for part, p in _parts(layer).items()}
    adapter = Adapter(dict(models), layouts, parameters, was_trainable)
    _verify(adapter)
    return adapter


def eject(adapter: Adapter) -> None:
    """Take the adapter out: the same modules, weights and trainable parameters as before."""
    for component, model in adapter.models.items():
        remove(model, NAME)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in adapter.was_trainable[component])


def remove(model: Any, name: str) -> None:
    """Take the adapter called `name` out of `model`; other adapters stay as they are."""
    for path, layer in _layers(model).items():
        layer.set_adapter([other for other in layer.active_adapters if other != name])
        layer.delete_adapter(name)
        if not layer.lora_A:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    configs = getattr(model, "peft_config", {})
    configs.pop(name, None)
    if not configs and hasattr(model, "peft_config"):
        del model.peft_config
        model._hf_peft_config_loaded = False


@contextmanager
def without_input_casts(adapter: Adapter) -> Iterator[None]:
    """Within the block, forward passes must run under autocast; they are then a little cheaper.

    PEFT casts the input of every adapted layer to float32, and autocast casts it back at once:
    the same numbers, and a copy of every input kept for the backward pass. DoRA measures row
    lengths in the input's precision, so for it the casts stay. Without autocast, a base in half
    precision raises in the block (`RuntimeError` of torch: dtypes differ).
    """
    with ExitStack() as stack:
        for component, model in adapter.models.items():
            sound = not adapter.layouts[component].dora
            stack.enter_context(disable_input_dtype_casting(model, active=sound))
        yield


def _layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The adapted layers of `model` by path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, LoraLayer)}


def _parts(layer: LoraLayer) -> dict[str, nn.Parameter]:
    """What is learnt in one adapted layer."""
    parts = {LORA_A: layer.lora_A[NAME].weight, LORA_B: layer.lora_B[NAME].weight}
    if NAME in layer.lora_magnitude_vector:
        parts[MAGNITUDE] = layer.lora_magnitude_vector[NAME].weight
    return parts


@torch.no_grad()
def _begin(layer: LoraLayer, generator: torch.Generator) -> None:
    """Set a layer to its beginning, in float32: A drawn as `nn.Linear` draws, B zero."""
    a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    drawn = torch.empty(a.shape)
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
    a.data = drawn.to(a.device)
    b.data = torch.zeros(b.shape, device=b.device)
    if NAME in layer.lora_magnitude_vector:
        # Made anew: PEFT measured the rows in the base's precision.
        layer.lora_magnitude_vector[NAME].update_layer(
            base_layer=layer.get_base_layer(), lora_A=a, lora_B=b, scaling=layer.scaling[NAME]
        )


def _verify(adapter: Adapter) -> None:
    """Assert that PEFT adapted what the layouts say, and that nothing else is trainable."""
    for component, model in adapter.models.items():
        found = {
            path.removeprefix(TEXT_MODEL): (layer.r[NAME], layer.lora_alpha[NAME])
            for path, layer in _layers(model).items()
        }
        slots = adapter.layouts[component].slots
        assert found == {name: (slot.rank, slot.alpha) for name, slot in slots.items()}
    trainable = [
        p for model in adapter.models.values() for p in model.parameters() if p.requires_grad
    ]
    assert {id(p) for p in trainable} == {id(p) for p in adapter.parameters.values()}
    assert all(p.dtype == torch.float32 for p in trainable)
