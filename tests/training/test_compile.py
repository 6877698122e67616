"""What torch.compile makes of a training step has the gradients of the step."""

from __future__ import annotations

import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ldm_pipeline.training.start import compiled


class Mean(nn.Module):
    """The mean square of a UNet's answer, as the engine's modules give losses."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        answer = self.unet(batch["x"], batch["t"], batch["embeds"], return_dict=False)[0]
        return {"loss": answer.square().mean()}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
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
