"""Laws of the targets: patterns name whole words, sets name what the literature adapts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.targets import (
    SETS,
    LoraSettings,
    Override,
    Slot,
    adaptable,
    matches,
    resolve,
)

ATTENTIONS = [
    f"{place}.transformer_blocks.0.{attention}.{matrix}"
    for place in (
        "down_blocks.1.attentions.0",
        "mid_block.attentions.0",
        "up_blocks.0.attentions.0",
        "up_blocks.0.attentions.1",
    )
    for attention in ("attn1", "attn2")
    for matrix in ("to_q", "to_k", "to_v", "to_out.0")
]
"""The attention matrices of the tiny UNet, by hand."""

TEXT = [
    f"encoder.layers.{layer}.self_attn.{matrix}"
    for layer in range(3)
    for matrix in ("q_proj", "k_proj", "v_proj", "out_proj")
]
"""Those of the tiny text encoder."""


@pytest.fixture(scope="module")
def models(tiny: Callable[..., Any]) -> dict[str, nn.Module]:
    parts = tiny()
    return {"unet": parts["unet"], "text_encoder": parts["text_encoder"]}


def names(models: dict[str, nn.Module], targets: Any) -> dict[str, set[str]]:
    layouts = resolve(models, LoraSettings(targets=targets))
    return {component: set(layout.slots) for component, layout in layouts.items()}


def test_attention_is_every_matrix_of_the_attention_and_nothing_else(
    models: dict[str, nn.Module],
) -> None:
    assert names(models, "attention") == {"unet": set(ATTENTIONS), "text_encoder": set(TEXT)}


def test_feedforward_adds_both_its_layers(models: dict[str, nn.Module]) -> None:
    both = names(models, "attention+feedforward")
    blocks = {name.split(".attn")[0] for name in ATTENTIONS}
    layers = {f"{block}.ff.net.{layer}" for block in blocks for layer in ("0.proj", "2")}
    assert both["unet"] == {*ATTENTIONS, *layers}
    texts = {f"encoder.layers.{k}.mlp.{layer}" for k in range(3) for layer in ("fc1", "fc2")}
    assert both["text_encoder"] == {*TEXT, *texts}


def test_all_is_everything_but_the_ends_and_the_time(models: dict[str, nn.Module]) -> None:
    layers = {
        name
        for name, module in models["unet"].named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    left_out = {n for n in layers if n.startswith(("conv_", "time_")) or "time_emb_proj" in n}
    assert "down_blocks.0.downsamplers.0.conv" in layers - left_out
    assert names(models, "all")["unet"] == layers - left_out
    assert names(models, ["conv_in", "q_proj"])["unet"] == {"conv_in"}


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("to_q", "unet.mid_block.attn1.to_q", True),
        ("mid_block", "unet.mid_block.attn1.to_q", True),
        ("unet", "unet.mid_block.attn1.to_q", True),
        ("unet.mid_block.attn1.to_q", "unet.mid_block.attn1.to_q", True),
        ("attn1.to_q", "unet.mid_block.attn1.to_q", True),
        ("mid_block.*.to_q", "unet.mid_block.attn1.to_q", True),
        ("up_blocks.1*", "unet.up_blocks.10.to_q", True),
        ("to", "unet.mid_block.attn1.to_q", False),
        ("up_blocks.1", "unet.up_blocks.10.to_q", False),
        ("conv1", "unet.conv11.conv", False),
        ("text_encoder", "text_encoder_2.encoder.q_proj", False),
        ("", "unet.mid_block.attn1.to_q", False),
    ],
)
def test_a_pattern_names_whole_words(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


def test_a_list_of_patterns_names_what_they_match(models: dict[str, nn.Module]) -> None:
    chosen = names({"unet": models["unet"]}, ["up_blocks.*.attn2.to_k", "mid_block.*.to_out"])
    expected = {n for n in ATTENTIONS if n.startswith("up_") and n.endswith("attn2.to_k")}
    expected |= {n for n in ATTENTIONS if n.startswith("mid_") and n.endswith("to_out.0")}
    assert chosen == {"unet": expected}


def test_overrides_set_rank_and_alpha_block_by_block(models: dict[str, nn.Module]) -> None:
    settings = LoraSettings(
        rank=8,
        alpha=2,
        overrides={
            "mid_block": Override(rank=16),
            "mid_block.*.attn2": Override(alpha=5),
            "text_encoder": Override(rank=4, alpha=4),
        },
    )
    layouts = resolve(models, settings)
    assert set(layouts["text_encoder"].slots.values()) == {Slot(4, 4)}
    for name, slot in layouts["unet"].slots.items():
        if not name.startswith("mid_block"):
            assert slot == Slot(8, 2)
        elif ".attn2." in name:
            assert slot == Slot(16, 5), "each override says only what differs"
        else:
            assert slot == Slot(16, 4), "alpha keeps its ratio to the rank"


def test_without_an_alpha_the_scale_is_1_at_every_rank(models: dict[str, nn.Module]) -> None:
    settings = LoraSettings(rank=6, overrides={"mid_block": Override(rank=5)})
    slots = resolve(models, settings)["unet"].slots.values()
    assert {(slot.rank, slot.alpha) for slot in slots} == {(6, 6), (5, 5)}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"targets": ["to_qq"]}, "to_q"),
        ({"targets": ["to_q", "mid_blok.attentions"]}, "mid_block.attentions"),
        ({"targets": ["zzzzzzzzzzz"]}, "some are unet."),
        ({"targets": ["to_q"]}, "leave the text_encoder out"),
        ({"overrides": {"conv1": Override(rank=2)}}, "overrides: 'conv1'"),
    ],
)
def test_what_matches_nothing_is_refused_with_what_is_near(
    models: dict[str, nn.Module], settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError) as refusal:
        resolve(models, LoraSettings(**settings))
    assert told in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"targets": "atention"}, "did you mean 'attention'"),
        ({"targets": []}, "targets is empty"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 2.0}, "rank=2.0"),
        ({"rank": True}, "rank=True"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"overrides": {"mid_block": Override(rank=-1)}}, "overrides.mid_block.rank=-1"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        LoraSettings(**settings)


def test_names_are_those_of_any_release_of_transformers() -> None:
    class Old(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text_model = nn.ModuleDict({"encoder": nn.Linear(2, 2)})
            self.text_projection = nn.Linear(2, 2)

    assert set(adaptable(Old())) == {"encoder", "text_projection"}


def test_grouped_convolutions_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3), nn.LayerNorm(4))
    assert set(adaptable(model)) == {"1"}


def test_each_set_is_contained_in_the_next() -> None:
    small, middle, large = (set(SETS[n]) for n in ("attention", "attention+feedforward", "all"))
    assert small < middle < large
