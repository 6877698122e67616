"""LyCORIS' products (LoHa, LoKr, Tucker's, whole differences) as A and B, exactly.

Each is a low-rank product in disguise, so that it needs no layer of its own, and can be drawn
with, merged, resized and written like any LoRA:

    LoHa    (B1 A1) o (B2 A2) = B A  with B's rows the products of rows of B1 and B2, and A's
            columns those of A1 and A2 (Khatri-Rao): rank r1 r2            (FedPara, 2108.06098)
    LoKr    (B1 A1) x (B2 A2) = (B1 x B2)(A1 x A2), Kronecker: rank r1 r2  (KronA, 2212.10650)
    Tucker  B and a core [r, r, k, k] and A [r, in]: the core times A is the A of a convolution
    diff    the difference itself, beside an identity

Where that rank would be more than a matrix of W's shape can have, the difference itself is kept
beside an identity. All is computed in float32; nothing is approximated.

Legend
    up, down    B as [out, r], A as [r, n]; n = in * k * k
    kernel      (k, k) of a convolution, () of a linear module
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.layouts.families import Family
from ldm_pipeline.lora.weights import LORA_A, LORA_B, LoraWeights

if TYPE_CHECKING:
    from torch import Tensor

Parts = Mapping[str, "Tensor"]
"""A module's tensors by LyCORIS' names: hada_w1_a, lokr_t2, …"""

Kernel = tuple[int, ...]

LARGEST = 2**27
"""Numbers in one product. The largest module of SDXL takes a tenth; what asks for more is damaged,
or meant to fill the memory."""

_KERNELS: Mapping[str, Kernel] = {
    **dict.fromkeys(("conv1", "conv2", "conv", "conv_in", "conv_out"), (3, 3)),
    "conv_shortcut": (1, 1),
}
"""Of the convolutions of Stable Diffusion's UNets, by the last word of their names. LyCORIS writes
their kernels flattened, so that nothing else in a file tells them."""

FORMS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "Tucker": (("lora_down.weight", "lora_up.weight", "lora_mid.weight"), ()),
    "LoHa": (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("hada_t1", "hada_t2")),
    "LoKr": (
        (),
        ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    ),
    "diff": (("diff",), ()),
}
"""The parts that each form needs, and those that it may have."""


def form_of(parts: frozenset[str]) -> str | None:
    """The form that has exactly these parts (alpha and DoRA's left out); None where none has."""
    for form, (needed, possible) in FORMS.items():
        if parts >= set(needed) and parts <= {*needed, *possible} and parts:
            return form
    return None


def low_rank(
    name: str, form: str, parts: Parts, alpha: float | None
) -> tuple[Tensor, Tensor, float]:
    """(A, B, scale) with `scale * B A` the difference that the parts of a module `name` mean.

    A is [r, in(, k, k)], B [out, r(, 1, 1)], both float32. Raises `UserError` for parts whose
    shapes do not go together, and for a product of more than `LARGEST` numbers.
    """
    fold: Callable[[Parts, Kernel], tuple[Tensor, Tensor, int | None, Kernel]]
    fold = {"Tucker": _tucker, "LoHa": _loha, "LoKr": _lokr, "diff": _diff}[form]
    floats = {part: tensor.float() for part, tensor in parts.items()}
    try:
        up, down, rank, kernel = fold(floats, _KERNELS.get(name.rpartition(".")[2], ()))
        down = down.reshape(down.shape[0], -1, *kernel)
        up = up.reshape(*up.shape, *[1] * len(kernel))
    except UserError as error:
        raise UserError(f"{name} is no {form} of a Stable Diffusion: {error}") from error
    except (RuntimeError, ValueError, IndexError, KeyError, ZeroDivisionError) as error:
        shapes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in parts.items())
        raise UserError(f"{name} is no {form}: {shapes} do not go together") from error
    return down, up, 1.0 if alpha is None or not rank else alpha / rank


def convolved(weights: LoraWeights, family: Family) -> LoraWeights:
    """The same with the projections of transformers as the family has them, linear or 1 x 1.

    Products come as matrices either way.
    """
    tensors = dict(weights.tensors)
    for component, name in weights.modules():
        if component == "unet" and name.endswith((".proj_in", ".proj_out")):
            for part in (LORA_A, LORA_B):
                key = f"{component}.{name}.{part}"
                if key in tensors and tensors[key].flatten(1).shape == tensors[key].shape[:2]:
                    flat = tensors[key].flatten(1)
                    tensors[key] = flat if family.linear else flat[:, :, None, None]
    return replace(weights, tensors=tensors)


def _tucker(parts: Parts, kernel: Kernel) -> tuple[Tensor, Tensor, int | None, Kernel]:
    down, up, core = (parts[f"lora_{part}.weight"] for part in ("down", "up", "mid"))
    up, down = up.flatten(1), down.flatten(1)
    return up, _core(core, down), down.shape[0], tuple(core.shape[2:])


def _loha(parts: Parts, kernel: Kernel) -> tuple[Tensor, Tensor, int | None, Kernel]:
    if ("hada_t1" in parts) != ("hada_t2" in parts):
        raise ValueError
    products = []
    for side in ("1", "2"):
        up, down = parts[f"hada_w{side}_a"], parts[f"hada_w{side}_b"]
        core = parts.get(f"hada_t{side}")
        if core is not None:
            kernel, up, down = tuple(core.shape[2:]), up.t(), _core(core, down)
        products.append((up, down.flatten(1)))
    (up1, down1), (up2, down2) = products
    rank = parts["hada_w1_b"].shape[0]
    outs, ins = up1.shape[0], down1.shape[1]
    if up2.shape[0] != outs or down2.shape[1] != ins:
        raise ValueError
    if _full(up1.shape[1] * up2.shape[1], outs, ins):
        return (*beside_identity((up1 @ down1) * (up2 @ down2)), rank, kernel)
    up = (up1[:, :, None] * up2[:, None, :]).flatten(1)
    down = (down1[:, None] * down2[None]).flatten(0, 1)
    return up, down, rank, kernel


def _lokr(parts: Parts, kernel: Kernel) -> tuple[Tensor, Tensor, int | None, Kernel]:
    import torch

    rank = None
    if _is_whole(parts, "lokr_w1"):
        up1, down1, _ = _as_product(parts["lokr_w1"])
    else:
        up1, down1 = parts["lokr_w1_a"], parts["lokr_w1_b"]
        rank = down1.shape[0]
    if _is_whole(parts, "lokr_w2", "lokr_t2"):
        up2, down2, kernel = _as_product(parts["lokr_w2"])
    else:
        up2, down2 = parts["lokr_w2_a"], parts["lokr_w2_b"]
        rank = rank or down2.shape[0]
        core = parts.get("lokr_t2")
        if core is not None:
            kernel, up2, down2 = tuple(core.shape[2:]), up2.t(), _core(core, down2)
        down2 = down2.flatten(1)
    outs, ins = up1.shape[0] * up2.shape[0], down1.shape[1] * down2.shape[1]
    if _full(up1.shape[1] * up2.shape[1], outs, ins):
        whole = _kron(up1 @ down1, up2 @ down2, kernel)
        return (*beside_identity(whole), rank, kernel)
    return torch.kron(up1.contiguous(), up2.contiguous()), _kron(down1, down2, kernel), rank, kernel


def _diff(parts: Parts, kernel: Kernel) -> tuple[Tensor, Tensor, int | None, Kernel]:
    difference = parts["diff"]
    if difference.ndim not in (2, 4):
        raise ValueError
    flat = difference.flatten(1)
    _check_size(min(flat.shape), *flat.shape)
    return (*beside_identity(flat), None, tuple(difference.shape[2:]))


def _core(core: Tensor, down: Tensor) -> Tensor:
    """A core [r, s, k, k] times A [s, in]: the A of a convolution, [r, in * k * k]."""
    import torch

    rank, _, *kernel = core.shape
    _check_size(rank, rank, down.shape[1] * math.prod(kernel))
    return torch.einsum("rskl,si->rikl", core, down).flatten(1)


def _kron(first: Tensor, second: Tensor, kernel: Kernel) -> Tensor:
    """Kronecker's product of [a, c] and [b, d * k * k], kernels left inside: [ab, cd * k * k]."""
    import torch

    inner = second.contiguous().reshape(second.shape[0], -1, math.prod(kernel))
    return torch.kron(first[:, :, None].contiguous(), inner).flatten(1)


def _as_product(matrix: Tensor) -> tuple[Tensor, Tensor, Kernel]:
    """A whole matrix [out, in(, k, k)] as (up, down, kernel)."""
    if matrix.ndim not in (2, 4):
        raise ValueError
    return (*beside_identity(matrix.flatten(1)), tuple(matrix.shape[2:]))


def beside_identity(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(up, down) whose product is `matrix`, of its own rank at most."""
    import torch

    outs, ins = matrix.shape
    if outs <= ins:
        return torch.eye(outs), matrix
    return matrix, torch.eye(ins)


def _is_whole(parts: Parts, factor: str, *beside: str) -> bool:
    """Whether a factor of Kronecker's product is there as one matrix, and not as a product of two;
    `ValueError` for a mixture. `beside` are further parts of products."""
    product = {f"{factor}_a", f"{factor}_b", *beside} & parts.keys()
    if (factor in parts) == bool(product):
        raise ValueError
    return factor in parts


def _full(rank: int, outs: int, ins: int) -> bool:
    """Whether a product of this rank takes as much as the matrix [outs, ins] itself does."""
    _check_size(min(rank, outs, ins), outs, ins)
    return rank >= min(outs, ins)


def _check_size(rank: int, outs: int, ins: int) -> None:
    """Raise `UserError` for a product that is empty, or larger than anybody means."""
    if min(rank, outs, ins) < 1 or max(outs * ins, rank * (outs + ins)) > LARGEST:
        raise UserError(f"it would have {outs} x {ins} numbers at rank {rank}")
