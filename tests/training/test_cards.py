"""The model cards tell both ways to draw, for every family of models."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ldm_pipeline.diffusion import Schedule
from ldm_pipeline.models.conditioning import OneEncoder, TwoEncoders
from ldm_pipeline.training.lcm import LcmConfig, LcmObjective
from ldm_pipeline.training.lora import LoraConfig
from ldm_pipeline.training.lora_card import model_card

TOLD = {"run": {"out": "runs/a"}, "model": "a/model", "data": {"source": "pictures"}}


@pytest.mark.parametrize("kind", [OneEncoder, TwoEncoders])
def test_a_card_says_how_to_draw_here_and_in_stock(kind: type) -> None:
    config = LoraConfig.model_validate(TOLD)
    card = model_card(config, "a/model", 5, 7, False, kind.tag)  # type: ignore[attr-defined]
    assert "Trained on 5 captioned pictures: 7 updates of 64 samples each." in card
    assert 'ldm generate "…" --model a/model --lora pytorch_lora_weights.safetensors' in card
    assert 'pipeline.load_lora_weights("pytorch_lora_weights.safetensors")' in card
    few = LcmConfig.model_validate(TOLD)
    told = SimpleNamespace(config=few, conditioning=kind, schedule=Schedule.linear())
    use = LcmObjective._use(told)  # type: ignore[arg-type]
    assert 'ldm generate "…" --model a/model --lcm pytorch_lora_weights.safetensors' in use
    assert 'pipeline.load_lora_weights("pytorch_lora_weights.safetensors")' in use
