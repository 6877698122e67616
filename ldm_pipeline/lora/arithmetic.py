"""A layer with an adapter as one operation: fewer passes over large tensors, fewer launches.

PEFT computes W x, then A x, then B (A x), its product with the scale, and the sum: the last two go
over everything that the layer puts out, again in the backward pass, and each is a launch on a GPU.
Here the scale multiplies the low-rank tensors alone, and both sums happen inside the matrix
products.

Legend
    x    input [..., in];  h = A x its low-rank part [..., r];  y = W x + bias + scale * B h
    dy   gradient of y;  dh = scale * B' dy
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn


class LowRankLinear(torch.autograd.Function):
    """y = W x + bias + scale * B A x, all of one precision; W and bias have no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float
    ) -> Tensor:
        """x [..., in], w [out, in], bias [out], a [r, in], b [out, r] to y [..., out]."""
        rows = x.reshape(-1, x.shape[-1])
        y = rows @ w.T if bias is None else torch.addmm(bias, rows, w.T)
        h = rows @ a.T
        y.addmm_(h, b.T, alpha=s)
        ctx.save_for_backward(rows, w, a, b, h)
        ctx.s = s
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, a and b."""
        rows, w, a, b, h = ctx.saved_tensors
        places = dy.shape[:-1]
        dy = dy.reshape(-1, dy.shape[-1])
        dh = (dy @ b).mul_(ctx.s)
        da, db = dh.T @ rows, (dy.T @ h).mul_(ctx.s)
        if not ctx.needs_input_grad[0]:
            return None, None, None, da, db, None
        dx = (dy @ w).addmm_(dh, a)
        return dx.view(*places, -1), None, None, da, db, None


class FusedLinear(Linear):
    """PEFT's adapted `nn.Linear`, computed by `LowRankLinear` wherever that says the same.

    Everything else is PEFT's own way: without gradients, with several adapters or none, merged,
    DoRA, dropout, a base that is quantised or of another precision than the adapter.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`peft.tuners.lora.Linear.forward`."""
        device = x.device.type
        casting = torch.is_autocast_enabled(device)
        if args or kwargs or not torch.is_grad_enabled() or not self._plain(x, casting):
            return cast(Tensor, super().forward(x, *args, **kwargs))
        (name,) = self.active_adapters
        base: Any = self.base_layer
        tensors = (x, base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight)
        dtype = torch.get_autocast_dtype(device) if casting else x.dtype
        cast_to = [t if t is None else t.to(dtype) for t in tensors]
        with torch.autocast(device, enabled=False):
            return cast(Tensor, LowRankLinear.apply(*cast_to, self.scaling[name]))

    def _plain(self, x: Tensor, casting: bool) -> bool:
        """Whether this is one plain adapter on a frozen `nn.Linear`, all of one precision."""
        active, base = self.active_adapters, self.base_layer
        if self.disable_adapters or self.merged or len(active) != 1:
            return False
        name = active[0]
        if type(base) is not nn.Linear or base.weight.requires_grad or name not in self.lora_A:
            return False
        a, b = self.lora_A[name], self.lora_B[name]
        varied = name in self.lora_variant or b.bias is not None
        if varied or not isinstance(self.lora_dropout[name], nn.Identity):
            return False
        return casting or x.dtype == base.weight.dtype == a.weight.dtype


def fuse(layer: nn.Module) -> None:
    """Let an adapted layer compute as `FusedLinear`; layers of other kinds stay as they are."""
    if type(layer) is Linear:
        layer.__class__ = FusedLinear
