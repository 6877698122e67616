"""What a training step is told to take is what it takes; nothing is computed to tell it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.inject import inject, without_input_casts
from ldm_pipeline.lora.targets import LoraSettings
from ldm_pipeline.training.footprint import Footprint, footprint
from ldm_pipeline.training.start import attend_quickly
from tests.conftest import build, build_xl

SETTINGS = LoraSettings("all", 4)
SIZE, BATCH = (64, 48), 2
CONFIGS = {"sd": lambda: build()["unet"].config, "xl": lambda: build_xl()["unet"].config}


def told(kind: str, precision: str, recomputed: bool = False) -> Footprint:
    """What is told of a tiny UNet."""
    return footprint(
        CONFIGS[kind](), SETTINGS, SIZE, BATCH, precision=precision, recomputed=recomputed
    )


def taken(kind: str, precision: str, recomputed: bool) -> Footprint:
    """What a real UNet of the same config holds after a real forward pass."""
    unet: Any = UNet2DConditionModel.from_config(dict(CONFIGS[kind]()))
    half = torch.bfloat16 if precision == "bf16" else torch.float32
    torch.nn.Module.to(unet, dtype=half)
    attend_quickly(unet, precision, "cpu")
    kept: dict[int, Any] = {}
    most = 0

    def noted(storages: dict[int, Any]) -> saved_tensors_hooks:
        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage
            return tensor

        return saved_tensors_hooks(keep, lambda tensor: tensor)

    def layer_by_layer(layer: torch.nn.Module, *given: Any) -> Any:
        """Diffusers' own way, and beside it what this layer keeps where nothing is recomputed."""
        nonlocal most
        answer = checkpoint(layer, *given, use_reentrant=False)
        rest: dict[int, Any] = {}
        with noted(rest):
            layer(*given)
        most = max(most, sum(storage.nbytes() for storage in {**kept, **rest}.values()))
        return answer

    if recomputed:
        unet.enable_gradient_checkpointing(layer_by_layer)
    adapter = inject({"unet": unet}, SETTINGS, seed=0)
    unet.train()
    weights = {p.data_ptr() for p in unet.parameters()}
    added = None
    if kind == "xl":
        pooled = unet.config.projection_class_embeddings_input_dim
        pooled -= 6 * unet.config.addition_time_embed_dim
        added = {"text_embeds": torch.zeros(BATCH, pooled), "time_ids": torch.zeros(BATCH, 6)}
    embeds = torch.zeros(BATCH, 77, unet.config.cross_attention_dim, dtype=half)
    bf16 = torch.autocast("cpu", half, enabled=precision == "bf16")
    with noted(kept), bf16, without_input_casts(adapter):
        unet(
            torch.zeros(BATCH, 4, SIZE[1] // 8, SIZE[0] // 8),
            torch.zeros(BATCH, dtype=torch.long),
            embeds,
            added_cond_kwargs=added,
        )
    trained = sum(p.numel() for p in adapter.parameters.values())
    base = sum(p.numel() * p.element_size() for p in unet.parameters() if not p.requires_grad)
    held = sum(storage.nbytes() for storage in kept.values())
    return Footprint(base, trained * 20, max(most, held))


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_it_is_what_a_real_step_keeps(kind: str, precision: str, recomputed: bool) -> None:
    assert told(kind, precision, recomputed) == taken(kind, precision, recomputed)


def test_half_the_bits_and_computing_again_take_less() -> None:
    plain, half, again = told("sd", "no"), told("sd", "bf16"), told("sd", "bf16", True)
    assert plain.base == 2 * half.base
    assert plain.adapter == half.adapter == again.adapter
    assert plain.kept > half.kept > again.kept
    assert plain.total == plain.base + plain.adapter + plain.kept


def test_stable_diffusion_is_told_without_its_memory() -> None:
    """Of the published config: 860 M parameters, in a batch that no machine holds."""
    config = {"cross_attention_dim": 768, "sample_size": 64}
    found = footprint(config, LoraSettings(), (2048, 2048), 64, precision="bf16")
    assert found.base == 859_520_964 * 2
    assert found.kept > 500e9


def test_what_is_no_config_is_refused_in_one_line() -> None:
    config = {"block_out_channels": [32, 64], "down_block_types": ["DownBlock2D"]}
    with pytest.raises(UserError, match=r"config\.json describes none") as caught:
        footprint(config, SETTINGS, SIZE, BATCH, precision="no")
    assert "\n" not in str(caught.value)
