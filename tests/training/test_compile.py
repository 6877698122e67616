"""What torch.compile makes of a training step has the gradients of the step."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ldm_pipeline import LatentDiffusionPipeline
from ldm_pipeline.lora.files import FILE_NAME, load
from ldm_pipeline.training import adapting
from ldm_pipeline.training.engine import fit
from ldm_pipeline.training.lora import LoraConfig, LoraObjective
from ldm_pipeline.training.start import compiled
from tests.training.conftest import captioned

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"
)


class Mean(nn.Module):
    """The mean square of a UNet's answer, as the engine's modules give losses."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        answer = self.unet(batch["x"], batch["t"], batch["embeds"], return_dict=False)[0]
        return {"loss": answer.square().mean()}


@pytest.mark.slow
@needs_compiler
def test_every_parameter_has_its_gradient() -> None:
    """Two levels, with an upsampling between them; 1e-4 of the greatest entry is float32's order
    of summing."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        mid_block_type=None,
        layers_per_block=1,
        cross_attention_dim=8,
        norm_num_groups=4,
    )
    batch = {
        "x": torch.randn(2, 4, 8, 8),
        "t": torch.tensor([1, 700]),
        "embeds": torch.randn(2, 3, 8),
    }
    grads = []
    module = Mean(unet)
    for forward in (module, compiled(module)):
        module.zero_grad()
        forward(batch)["loss"].backward()
        told = {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}
        grads.append({name: grad.clone() for name, grad in told.items()})
    plain, fast = grads
    assert plain.keys() == fast.keys()
    for name, grad in plain.items():
        assert (fast[name] - grad).abs().max() <= 1e-4 * grad.abs().max() + 1e-8, name


def trained(tiny: Any, folder: Path, steps: int, *, quick: bool) -> dict[str, Tensor]:
    """The adapter after some steps on four pictures; validated at the end."""

    def opened(source: str, dtype: torch.dtype) -> LatentDiffusionPipeline:
        return LatentDiffusionPipeline(**copy.deepcopy(tiny())).to(dtype)

    out = folder / f"run {steps} {quick}"
    values = {
        "run": {
            "out": out, "batch_size": 4, "steps": steps, "workers": 0, "mixed_precision": "no",
            "compile": quick, "log_with": "none",
        },
        "optimiser": {"lr": 1e-2, "warmup_steps": 0, "ema_decay": 0.0},
        "data": {"source": str(folder / "pictures"), "resolution": 64, "fixed": True,
                 "cache": folder / "cache", "held_out": 0.2},
        "lora": {"rank": 2},
    }  # fmt: skip
    config = LoraConfig.model_validate(values)
    return dict(load(fit(LoraObjective(config, opened), config) / FILE_NAME).tensors)


class Called:
    """In the place of a compiled network: counts its calls and passes all else on."""

    def __init__(self, network: Any) -> None:
        self.network, self.calls, self.learning = network, 0, True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        self.learning &= torch.is_grad_enabled()
        return self.network(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)


def test_of_an_adapter_only_what_learns_is_compiled(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step calls the compiled UNet once, validations call the plain one."""
    captioned(tmp_path / "pictures", [(64, 64)] * 5)
    made: list[Called] = []

    def compile_it(network: Any, shapes: int) -> Called:
        made.append(Called(network))
        return made[-1]

    plain = trained(tiny, tmp_path, 3, quick=False)
    monkeypatch.setattr(adapting, "compiled", compile_it)
    fast = trained(tiny, tmp_path, 3, quick=True)
    (called,) = made
    assert (called.calls, called.learning) == (3, True)
    assert all(torch.equal(plain[name], fast[name]) for name in plain)
