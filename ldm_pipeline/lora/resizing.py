"""LoRAs of a lower rank, and LoRAs from the difference of two checkpoints: both are a SVD.

The best matrix of rank r, in the sum of squares, has the r largest singular values of the whole
(Eckart and Young, 1936); the share of their squares is the energy that is kept.

Legend
    D       what a LoRA adds to W, as a matrix [out, n]; n = in * k * k
    S       its singular values, falling
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.checkpoints import ModelFolder
from ldm_pipeline.lora.ranks import check_rank
from ldm_pipeline.lora.targets import Layout, Slot
from ldm_pipeline.lora.weights import LORA_A, LORA_B, LoraWeights

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rank:
    """How many singular values are kept: at most `most`, or so many that their squares make up the
    share `energy` of all, whichever are fewer. Raises `UserError` for values that make no sense."""

    most: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        check_rank(self.most, self.energy)

    def of(self, values: Tensor) -> int:
        """The number kept of singular values S; at least 1, and none that is zero otherwise."""
        squares = values.double() ** 2
        count = int((values > values.max() * torch.finfo(torch.float64).eps * 8).sum())
        if self.energy is not None:
            reached = squares.cumsum(0) >= self.energy * squares.sum()
            count = min(count, int((~reached).sum()) + 1)
        if self.most is not None:
            count = min(count, self.most)
        return max(count, 1)


@dataclass(frozen=True)
class Made:
    """A LoRA that was made by a SVD: `kept` of the energy `whole`, a sum of squares.

    `left_out` counts tensors that changed and that no LoRA can hold, as biases.
    """

    weights: LoraWeights
    kept: float
    whole: float
    left_out: int = 0

    @property
    def share(self) -> float:
        """The share of the energy that was kept; 1 where there was none."""
        return self.kept / self.whole if self.whole else 1.0


def resize(weights: LoraWeights, rank: Rank) -> Made:
    """The LoRA nearest to `weights` that has the rank; DoRA's magnitudes stay as they are.

    No matrix of W's size is decomposed: with B = Q R and A' = P T, B A = Q (R T') P'.
    """
    tensors, slots = dict(weights.tensors), {}
    kept = whole = 0.0
    for component, name in weights.modules():
        layout = weights.layouts[component]
        parts = weights.parts(component, name)
        a, b = parts[LORA_A], parts[LORA_B]
        q, r = torch.linalg.qr(b.flatten(1).double())
        p, t = torch.linalg.qr(a.flatten(1).double().T)
        u, values, v = torch.linalg.svd(layout.scale(name) * r @ t.T, full_matrices=False)
        count = rank.of(values)
        made = _balanced(q @ u, values, v @ p.T, count)
        shapes = (count, *a.shape[1:]), (b.shape[0], count, *b.shape[2:])
        key = f"{component}.{name}."
        for part, value, shape in zip((LORA_A, LORA_B), made, shapes, strict=True):
            tensors[key + part] = value.reshape(shape)
        slots[component, name] = Slot(count, count)
        kept += float((values[:count] ** 2).sum())
        whole += float((values**2).sum())
    layouts = {
        component: Layout(
            {name: slots[component, name] for name in layout.slots},
            layout.dora,
            False,
            layout.plain,
        )
        for component, layout in weights.layouts.items()
    }
    return Made(LoraWeights(tensors, layouts), kept, whole)


def extract(tuned: ModelFolder, base: ModelFolder, rank: Rank) -> Made:
    """The difference of two checkpoints as a LoRA, of every module whose weight differs.

    Raises `UserError` where their modules are not the same, and where nothing differs.
    """
    for component, modules in tuned.modules.items():
        if modules != base.modules.get(component):
            raise UserError(
                f"{tuned.folder} and {base.folder} are models of different shape: their"
                f" {component} has other modules"
            )
    tensors: dict[str, Tensor] = {}
    layouts = {}
    kept = whole = 0.0
    left_out = 0
    for component, places in tuned.tensors.items():
        slots = {}
        for key in places:
            one, other = tuned.tensor(component, key), base.tensor(component, key)
            if one is None or other is None or torch.equal(one, other):
                continue
            name = key.removesuffix(".weight")
            if name not in tuned.modules[component]:
                left_out += 1
                continue
            d = one.double() - other.double()
            u, values, v = torch.linalg.svd(d.flatten(1), full_matrices=False)
            count = rank.of(values)
            a, b = _balanced(u, values, v, count)
            ones = [1] * (d.ndim - 2)
            tensors[f"{component}.{name}.{LORA_A}"] = a.reshape(count, *d.shape[1:])
            tensors[f"{component}.{name}.{LORA_B}"] = b.reshape(-1, count, *ones)
            slots[name] = Slot(count, count)
            kept += float((values[:count] ** 2).sum())
            whole += float((values**2).sum())
        if slots:
            layouts[component] = Layout(slots)
    if not layouts:
        raise UserError(f"{tuned.folder} and {base.folder} have the same weights")
    return Made(LoraWeights(tensors, layouts), kept, whole, left_out)


def _balanced(u: Tensor, values: Tensor, v: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(A [count, n], B [out, count]) of the largest singular values, which both share evenly."""
    root = values[:count].sqrt()
    return (root[:, None] * v[:count]).float(), (u[:, :count] * root).float()
