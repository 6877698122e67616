"""Laws of the fused layer: PEFT's numbers, in fewer operations, and PEFT's own way elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ldm_pipeline import LatentDiffusionPipeline
from ldm_pipeline.lora import arithmetic
from ldm_pipeline.lora.arithmetic import FusedLinear, LowRankLinear
from ldm_pipeline.lora.inject import Adapter, inject
from ldm_pipeline.lora.targets import LoraSettings
from tests.lora.conftest import KINDS
from tests.lora.test_inject import answer

Make = Callable[[], Any]

STEPS = 50


def adapted(pipe: Any, fused: bool, **settings: Any) -> Adapter:
    """An adapter with something to say."""
    chosen = LoraSettings(rank=3, alpha=2.0, **settings)
    adapter = inject({"unet": pipe.unet}, chosen, seed=0, fused=fused)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapter


def trained(pipe: Any, fused: bool, steps: int) -> dict[str, torch.Tensor]:
    """The adapter after so many steps."""
    adapter = adapted(pipe, fused)
    optimiser = torch.optim.AdamW(adapter.parameters.values(), lr=1e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        (answer(pipe.unet) - 1).square().mean().backward()
        optimiser.step()
    return {name: p.detach().clone() for name, p in adapter.parameters.items()}


@pytest.fixture
def make_pipe(tiny: Callable[..., dict[str, Any]]) -> Callable[[], Any]:
    """Makes the same tiny pipeline each time."""
    return lambda: LatentDiffusionPipeline(**tiny())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every fused layer that was computed."""
    found: list[int] = []
    apply = LowRankLinear.apply

    def counted(*args: Any) -> Any:
        found.append(1)
        return apply(*args)

    monkeypatch.setattr(arithmetic.LowRankLinear, "apply", staticmethod(counted))
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("wanted", [True, False])
def test_its_gradients_are_those_of_what_it_computes(bias: bool, wanted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 5), (4, 5), (4,), (2, 5), (4, 2))
    x, w, c, a, b = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    x.requires_grad_(wanted)
    a.requires_grad_(), b.requires_grad_()
    shift = c if bias else None
    said = nn.functional.linear(x, w, shift) + 0.7 * (x @ a.T) @ b.T

    def fused(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        answered: torch.Tensor = LowRankLinear.apply(x, w, shift, a, b, 0.7)
        return answered

    assert torch.allclose(fused(x, a, b), said, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(fused, (x, a, b))


def test_fifty_steps_end_where_the_plain_way_ends(make_pipe: Make, calls: list[int]) -> None:
    plain = trained(make_pipe(), False, STEPS)
    assert not calls
    fused = trained(make_pipe(), True, STEPS)
    assert calls
    began = adapted(make_pipe(), False).parameters
    for name, value in plain.items():
        moved = (value - began[name]).abs().max()
        assert moved > 1e-3, name
        assert (fused[name] - value).abs().max() <= 1e-3 * moved, name


def test_under_autocast_the_loss_is_the_plain_ways(make_pipe: Make, calls: list[int]) -> None:
    said = []
    for fused in (False, True):
        pipe = make_pipe()
        pipe.unet.to(torch.bfloat16)
        adapted(pipe, fused)
        with torch.autocast("cpu", torch.bfloat16):
            said.append(answer(pipe.unet, torch.bfloat16).float())
    assert calls
    assert (said[0] - said[1]).abs().max() <= 0.02 * said[0].abs().max()


def test_what_draws_is_not_touched(make_pipe: Make, calls: list[int]) -> None:
    said = []
    for fused in (False, True):
        pipe = make_pipe()
        adapted(pipe, fused)
        with torch.no_grad():
            said.append(answer(pipe.unet))
    assert torch.equal(*said)
    assert not calls


def test_other_kinds_go_pefts_way(make_pipe: Make, calls: list[int]) -> None:
    pipe = make_pipe()
    adapter = adapted(pipe, True, **KINDS["dora"])
    answer(pipe.unet).sum().backward()
    with adapter.disabled():
        answer(pipe.unet)
    assert not calls
    pipe = make_pipe()
    adapted(pipe, True)
    layers = [m for m in pipe.unet.modules() if isinstance(m, FusedLinear)]
    for layer in layers:
        layer.lora_dropout["default"] = nn.Dropout(0.5)
    answer(pipe.unet)
    assert layers
    assert not calls
