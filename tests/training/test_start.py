"""Where a run starts: weights trained before, and the precision that the hardware has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.files import save
from ldm_pipeline.lora.inject import Adapter, inject
from ldm_pipeline.lora.targets import LoraSettings, Override
from ldm_pipeline.lora.weights import LORA_A, LORA_B, LoraWeights, split
from ldm_pipeline.training.block_attention import BlockAttention
from ldm_pipeline.training.config import TrainingConfig
from ldm_pipeline.training.engine import fit
from ldm_pipeline.training.start import (
    NAMES,
    attend_quickly,
    precision,
    take_adapter,
    take_weights,
)
from tests.conftest import build
from tests.training.toy import Toy, settings


def saved(folder: Path, name: str = NAMES[0], dtype: torch.dtype = torch.float16) -> nn.Linear:
    """A layer whose weights lie in `folder`."""
    layer = nn.Linear(3, 2)
    save_file({k: v.to(dtype) for k, v in layer.state_dict().items()}, folder / name)
    return layer


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_taken_in_the_precision_of_the_module(tmp_path: Path, name: str) -> None:
    layer, other = saved(tmp_path, name), nn.Linear(3, 2)
    take_weights(other, tmp_path)
    assert other.weight.dtype == torch.float32
    assert torch.equal(other.weight, layer.weight.half().float())
    assert torch.equal(other.bias, layer.bias.half().float())


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds none of"):
        take_weights(nn.Linear(3, 2), tmp_path / "missing")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / NAMES[1]).write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot be read"):
        take_weights(nn.Linear(3, 2), tmp_path)


@pytest.mark.parametrize(
    "other", [nn.Linear(3, 4), nn.Linear(3, 2, bias=False), nn.Conv2d(3, 2, 1)]
)
def test_another_shape_is_refused_in_one_line(tmp_path: Path, other: nn.Module) -> None:
    saved(tmp_path)
    with pytest.raises(UserError, match="another shape") as refusal:
        take_weights(other, tmp_path)
    assert "\n" not in str(refusal.value)


def adapter_of(dora: bool, **told: Any) -> Adapter:
    """A LoRA in all modules of a tiny UNet."""
    return inject({"unet": build()["unet"]}, LoraSettings("all", dora=dora, **told), seed=0)


@torch.no_grad()
def deltas(adapter: Adapter) -> dict[str, Tensor]:
    """What is added to each weight, and DoRA's lengths."""
    found: dict[str, Tensor] = {}
    parameters = adapter.parameters
    for name, b in parameters.items():
        component, module, part = split(name)
        if part == LORA_B:
            a = parameters[f"{component}.{module}.{LORA_A}"]
            found[name] = adapter.layouts[component].scale(module) * b.flatten(1) @ a.flatten(1)
        elif part != LORA_A:
            found[name] = b
    return found


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_of_a_lower_rank_is_taken_as_it_is(tmp_path: Path, dora: bool) -> None:
    """Convolutions and single modules' ranks included; of a file in 16 bits, numbers stay that are
    too small for them under the new alpha. A refusal leaves the adapter as it was."""
    first = adapter_of(dora, rank=4, alpha=4 / 1024, overrides={"to_q": Override(rank=2)})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for learnt in first.parameters.values():
            noise = 1e-3 * torch.randn(learnt.shape, generator=generator)
            learnt.copy_((learnt + noise).half())  # as the file has it
    halves = {name: value.half() for name, value in first.weights().tensors.items()}
    file = save(tmp_path, LoraWeights(halves, first.layouts))
    grown = adapter_of(dora, rank=8, overrides={"conv1": Override(rank=5)})
    take_adapter(grown, file)
    wanted, got = deltas(first), deltas(grown)
    assert wanted.keys() == got.keys()
    for name, value in wanted.items():
        assert (got[name] - value).abs().max() <= 1e-4 * value.abs().max(), name
    for other in (adapter_of(dora, rank=3), adapter_of(dora, overrides={"to_k": Override(rank=1)})):
        before = {name: value.clone() for name, value in other.parameters.items()}
        with pytest.raises(UserError, match="higher rank"):
            take_adapter(other, file)
        assert all(torch.equal(value, before[name]) for name, value in other.parameters.items())


def test_auto_is_bf16_where_the_processor_is_quicker_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intel's are with AMX alone."""
    for able, expected in (
        ({"avx512_bf16": True, "amx_bf16": False}, "bf16"),
        ({"avx512_bf16": True, "amx_bf16": False, "cpu_name": "AMD EPYC 9B45"}, "bf16"),
        ({"avx512_bf16": True, "amx_bf16": False, "cpu_name": "Intel Xeon"}, "no"),
        ({"avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel Xeon"}, "bf16"),
        ({"avx512_bf16": False, "amx_bf16": True}, "bf16"),
        ({"avx512_bf16": False, "amx_bf16": False}, "no"),
        ({"architecture": "aarch64"}, "no"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able)
        assert precision("auto", "cpu") == expected
    assert precision("auto", "mps") == "no"
    for has in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has, **_: has)
        assert precision("auto", "cuda") == ("bf16" if has else "no")


@pytest.mark.parametrize("asked", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_asked_for_is_taken_at_its_word(asked: str, device: str) -> None:
    assert precision(asked, device) == asked


def test_runs_begin_from_nothing_in_auto_unless_told() -> None:
    config = TrainingConfig.model_validate({"run": {"out": "x"}})
    assert config.begin_from is None
    assert config.run.mixed_precision == "auto"


@pytest.mark.parametrize(
    ("precision", "device", "side", "kind"),
    [("bf16", "cpu", 8, AttnProcessor), ("bf16", "cpu", 64, BlockAttention),
     ("no", "cpu", 8, AttnProcessor2_0), ("bf16", "cuda", 8, AttnProcessor2_0)],
)  # fmt: skip
def test_attention_is_done_as_is_quicker_and_says_the_same(
    precision: str, device: str, side: int, kind: type
) -> None:
    unet = build()["unet"]
    unet.register_to_config(sample_size=side)
    words = torch.randn(2, 5, unet.config.cross_attention_dim)
    told = torch.randn(2, 4, 8, 8), torch.tensor(3), words
    with torch.no_grad():
        before = unet(*told).sample
        attend_quickly(unet, precision, device)
        after = unet(*told).sample
    assert {type(processor) for processor in unet.attn_processors.values()} == {kind}
    assert torch.allclose(before, after, atol=1e-5)


@pytest.mark.parametrize(
    ("asked", "accumulation", "said"),
    [
        ({}, 1, None),
        ({"MIXED_PRECISION": "no", "GRADIENT_ACCUMULATION_STEPS": "1"}, 2, None),
        ({"MIXED_PRECISION": "no", "GRADIENT_ACCUMULATION_STEPS": "2"}, 2, None),
        (
            {"MIXED_PRECISION": "bf16", "GRADIENT_ACCUMULATION_STEPS": "4"},
            2,
            "accelerate's --mixed_precision bf16 has no effect, run.mixed_precision counts: no; "
            "--gradient_accumulation_steps 4 has no effect, run.accumulation counts: 2",
        ),
    ],
)
def test_what_accelerate_is_asked_for_in_vain_is_said_once(
    asked: dict[str, str],
    accumulation: int,
    said: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its launcher says "no" and 1 where nobody asks: that is no wish."""
    for name, value in asked.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    config = settings(tmp_path, steps=1, accumulation=accumulation)
    fit(Toy(config), config)
    lines = [m for m in caplog.messages if m.startswith("accelerate's")]
    assert lines == ([] if said is None else [said])
