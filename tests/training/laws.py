"""Laws that every objective keeps; each objective's tests call them."""

from __future__ import annotations

import torch
from torch import nn

from ldm_pipeline.training.objective import Batch, Objective


def batch_of(objective: nn.Module, positions: range) -> Batch:
    """The objective's batch."""
    assert isinstance(objective, Objective)
    return objective.batch(positions)


def a_batch_is_a_function_of_its_positions(objective: nn.Module) -> None:
    """The same twice, whatever torch's own generator does between; two halves are the whole;
    other positions give another batch."""
    whole = batch_of(objective, range(4, 8))
    torch.rand(3)
    again = batch_of(objective, range(4, 8))
    halves = [batch_of(objective, range(4, 6)), batch_of(objective, range(6, 8))]
    other = batch_of(objective, range(8, 12))
    for name, value in whole.items():
        assert torch.equal(value, again[name]), name
        assert torch.equal(value, torch.cat([half[name] for half in halves])), name
        assert not torch.equal(value, other[name]), name


def everything_trained_has_a_gradient(objective: nn.Module) -> None:
    """Several processes wait for each other's gradients: one that never comes would hang them."""
    objective.zero_grad()
    objective(batch_of(objective, range(2)))["loss"].backward()
    missing = [n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None]
    objective.zero_grad()
    assert missing == []


def losses_of_one_batch(objective: nn.Module, n: int, lr: float, steps: int = 20) -> list[float]:
    """The losses while AdamW learns the same `n` samples by heart."""
    torch.manual_seed(0)
    batch = batch_of(objective, range(n))
    optimiser = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = objective(batch)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses
