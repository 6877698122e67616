"""Muon: momentum whose matrices are made orthogonal, so that all directions are learnt alike.

Legend
    m        momentum of a matrix; a filter [out, in, k, k] counts as the matrix [out, in k k]
    u v'     m = u s v' is its singular value decomposition; the update is u v' (nearly)
    open     a 0-d tensor, 1.0 where an update counts; 0.0 where it is left out, on the device
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ldm_pipeline.models.precision import quick_in_bfloat16

MOMENTUM = 0.95
RMS = 0.2
"""Root mean square of an update, times the rate: about AdamW's, so its rates can be used."""


class Muon(torch.optim.Optimizer):
    """Muon for matrices and filters, AdamW for all else (K. Jordan 2024; scaling of 2502.16982).

    `tables` are the ids of matrices that are none: embeddings, whose rows are used one by one.
    An update while `found_inf`, a 0-d tensor, is 1 changes nothing, whatever the gradients are; the
    host does not wait to know (the attribute is that of torch's fused optimisers).
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        tables: Collection[int] = (),
    ) -> None:
        self._tables = tables
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        for group in self.param_groups:
            group["momentum"] = MOMENTUM

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure
        """One update of all parameters; those without a gradient stay."""
        for group in self.param_groups:
            counts = self._open(group["params"][0].device)
            matrices: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad = torch.where(counts > 0, p.grad, 0.0)  # times zero, nan would stay
                if p.ndim > 1 and id(p) not in self._tables:
                    matrices[p.shape].append((p, grad))
                else:
                    self._adam(p, grad, group, counts)
            for alike in matrices.values():
                self._muon(alike, group, counts)

    def _open(self, device: torch.device) -> Tensor:
        """Whether this update counts, see the legend."""
        if self.found_inf is None:
            return torch.ones((), device=device)
        return 1.0 - self.found_inf

    def _muon(
        self, alike: list[tuple[Tensor, Tensor]], group: dict[str, Any], counts: Tensor
    ) -> None:
        """Update parameters of one shape, each with its gradient, together."""
        kept = torch.where(counts > 0, group["momentum"], 1.0)
        moved = []
        for p, grad in alike:
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            m = state["momentum"].mul_(kept).add_(grad)
            moved.append(grad.add(m, alpha=group["momentum"]).flatten(1))  # Nesterov's
        updates = orthogonal(torch.stack(moved))
        rate = counts * (group["lr"] * RMS * max(updates.shape[-2:]) ** 0.5)
        for (p, _), update in zip(alike, updates, strict=True):
            p.mul_(1 - counts * (group["lr"] * group["weight_decay"]))
            p.addcmul_(update.view_as(p), rate, value=-1)

    def _adam(self, p: Tensor, grad: Tensor, group: dict[str, Any], counts: Tensor) -> None:
        """Adam (1412.6980, algorithm 1) with decoupled weight decay (1711.05101)."""
        state = self.state[p]
        if "step" not in state:
            state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state["step"] = k = state["step"] + counts
        b1, b2 = group["betas"]
        state["exp_avg"].lerp_(grad, counts * (1 - b1))
        state["exp_avg_sq"].lerp_(grad.square(), counts * (1 - b2))
        spread = (state["exp_avg_sq"] / (1 - b2**k)).sqrt_().add_(group["eps"])
        p.mul_(1 - counts * (group["lr"] * group["weight_decay"]))
        p.addcdiv_(state["exp_avg"] * counts / (1 - b1**k), spread, value=-group["lr"])


def orthogonal(m: Tensor, steps: int = 5) -> Tensor:
    """Matrices [N, r, c] with nearly the singular vectors of `m` and singular values near 1.

    The Newton-Schulz iteration with Jordan's quintic: values end within 0.7 to 1.2. It computes in
    bfloat16 where the hardware is quicker in it, else in float32: emulated, it took four fifths of
    a training step.
    """
    x = m.to(_precision(m.device.type))
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).to(m.dtype)


@cache
def _precision(device: str) -> torch.dtype:
    return torch.bfloat16 if quick_in_bfloat16(device) else torch.float32
