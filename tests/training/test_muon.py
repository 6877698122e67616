"""Muon: its updates are orthogonal, and what is no matrix goes the way of AdamW."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ldm_pipeline.training import muon
from ldm_pipeline.training.config import OptimiserSettings
from ldm_pipeline.training.muon import RMS, orthogonal
from ldm_pipeline.training.updates import build_optimiser

LR = 1e-2


def settings(kind: str, weight_decay: float = 0.0) -> OptimiserSettings:
    return OptimiserSettings.model_validate({"kind": kind, "lr": LR, "weight_decay": weight_decay})


@pytest.mark.parametrize("shape", [(24, 24), (16, 80), (80, 16)])
def test_singular_values_become_alike(shape: tuple[int, int]) -> None:
    """From between 0.01 and 1 to near 1 (Jordan's quintic: 0.7 to 1.2, and bfloat16's rounding)."""
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    s = torch.logspace(-2, 0, min(shape))
    made = orthogonal(u * s @ vh)
    values = torch.linalg.svdvals(made)
    assert values.min() > 0.6
    assert values.max() < 1.3
    # The singular vectors stay: in their terms the update is diagonal.
    inside = u.mT @ made @ vh.mT
    off = inside - torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 0.1


@pytest.mark.parametrize("able", [False, True])
def test_bfloat16_where_the_hardware_multiplies_it_alone(
    able: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able})
    multiplied = set()

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.Tensor.__matmul__ or func is torch.Tensor.matmul:
                multiplied.add(args[0].dtype)
            return func(*args, **(kwargs or {}))

    muon._precision.cache_clear()
    try:
        with Watch():
            orthogonal(torch.randn(1, 8, 16))
    finally:
        muon._precision.cache_clear()
    assert multiplied == {torch.bfloat16 if able else torch.float32}


def test_updates_have_the_size_that_the_rate_says() -> None:
    """About RMS x lr for matrices and filters, whatever the size of the gradient."""
    torch.manual_seed(0)
    for scale in (1e-4, 1e4):
        layers = {
            "wide": nn.Linear(96, 32, bias=False),
            "filters": nn.Conv2d(16, 48, 3, bias=False),
        }
        trained = dict(nn.ModuleDict(layers).named_parameters())
        before = {name: p.detach().clone() for name, p in trained.items()}
        optimiser = build_optimiser(trained, settings("muon"))
        for p in trained.values():
            p.grad = scale * torch.randn_like(p)
        optimiser.step()
        for name, p in trained.items():
            size = float((p.detach() - before[name]).square().mean().sqrt())
            assert 0.6 * RMS * LR < size < 1.3 * RMS * LR, name


def test_vectors_and_embeddings_go_as_with_adamw() -> None:
    """Biases and tables of embeddings, over several steps and with weight decay."""
    ends = []
    for kind in ("muon", "adamw"):
        torch.manual_seed(0)
        model = nn.ModuleDict({"embedding": nn.Embedding(7, 4), "layer": nn.Linear(4, 3)})
        optimiser = build_optimiser(dict(model.named_parameters()), settings(kind, 0.1))
        for _ in range(4):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimiser.step()
        ends.append(model)
    for name, p in ends[0].named_parameters():
        alike = torch.allclose(p, ends[1].get_parameter(name), rtol=1e-5, atol=1e-7)
        assert alike == (name != "layer.weight"), name
