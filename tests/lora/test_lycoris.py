"""Laws of LyCORIS' products: read as A and B they mean what LyCORIS' own formula means.

The formulas here are the definitions, without any of the identities that the reader uses.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.attach import attach, base_of
from ldm_pipeline.lora.deltas import delta, product
from ldm_pipeline.lora.files import inspect, load
from ldm_pipeline.lora.fitting import fit
from ldm_pipeline.lora.layouts.names import flat
from tests.lora.tiny_families import PIPELINES, networks, picture

LINEAR = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"  # 16 x 64
POINT = "mid_block.attentions.0.proj_in"  # 16 x 16 x 1 x 1
KERNEL = "mid_block.resnets.0.conv1"  # 16 x 16 x 3 x 3

ALPHA = 1.5
"""No rank of a case, so that no scale is 1."""

Tensors = dict[str, torch.Tensor]
Case = tuple[str, Tensors, torch.Tensor]
"""A module's name, its parts, and the difference that they mean."""


def drawn(*shape: int) -> torch.Tensor:
    return 0.3 * torch.randn(shape)


def tucker(core: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """A core [r, s, k, k], B as [r, out], A as [s, in]: [out, in, k, k]."""
    return torch.einsum("rskl,ro,si->oikl", core, up, down).contiguous()


def loha(name: str, out: int, n: int, rank: int) -> Case:
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    parts = {n_: drawn(*((out, rank) if n_.endswith("a") else (rank, n))) for n_ in names}
    a1, b1, a2, b2 = (parts[name] for name in names)
    return name, parts, (a1 @ b1) * (a2 @ b2) * ALPHA / rank


def loha_tucker(rank: int) -> Case:
    sides = [(drawn(rank, rank, 3, 3), drawn(rank, 16), drawn(rank, 16)) for _ in range(2)]
    parts: Tensors = {}
    for side, (core, up, down) in zip("12", sides, strict=True):
        parts |= {f"hada_t{side}": core, f"hada_w{side}_a": up, f"hada_w{side}_b": down}
    return KERNEL, parts, tucker(*sides[0]) * tucker(*sides[1]) * ALPHA / rank


def lokr(
    name: str, first: tuple[int, int], second: tuple[int, ...], ranks: tuple[int, int]
) -> Case:
    """`ranks` of the two factors; 0 for a whole one."""
    parts: Tensors = {}
    whole = []
    for side, shape, rank in (("1", first, ranks[0]), ("2", second, ranks[1])):
        if rank:
            n = torch.Size(shape[1:]).numel()
            up, down = drawn(shape[0], rank), drawn(rank, n)
            parts |= {f"lokr_w{side}_a": up, f"lokr_w{side}_b": down}
            whole.append((up @ down).reshape(shape))
        else:
            parts[f"lokr_w{side}"] = drawn(*shape)
            whole.append(parts[f"lokr_w{side}"])
    w1 = whole[0].reshape(*first, *[1] * (len(second) - 2))
    rank = ranks[0] or ranks[1]
    return name, parts, torch.kron(w1, whole[1]) * (ALPHA / rank if rank else 1.0)


def lokr_tucker(rank: int) -> Case:
    w1, core, up, down = drawn(4, 4), drawn(rank, rank, 3, 3), drawn(rank, 4), drawn(rank, 4)
    parts = {"lokr_w1": w1, "lokr_t2": core, "lokr_w2_a": up, "lokr_w2_b": down}
    return KERNEL, parts, torch.kron(w1[:, :, None, None], tucker(core, up, down)) * ALPHA / rank


def locon_tucker(rank: int) -> Case:
    core, up, down = drawn(rank, rank, 3, 3), drawn(16, rank, 1, 1), drawn(rank, 16, 1, 1)
    parts = {"lora_mid.weight": core, "lora_up.weight": up, "lora_down.weight": down}
    return KERNEL, parts, tucker(core, up[:, :, 0, 0].T, down[:, :, 0, 0]) * ALPHA / rank


def whole(*shape: int) -> Case:
    parts = {"diff": drawn(*shape)}
    return (KERNEL if len(shape) == 4 else LINEAR), parts, parts["diff"]


def cases() -> dict[str, Case]:
    torch.manual_seed(0)
    return {
        "LoHa": loha(LINEAR, 16, 64, 2),
        "LoHa beyond full rank": loha(LINEAR, 16, 64, 5),
        "LoHa of a convolution": loha(KERNEL, 16, 16 * 9, 3),
        "LoHa of a 1 x 1 convolution": loha(POINT, 16, 16, 3),
        "LoHa with cores": loha_tucker(3),
        "LoKr": lokr(LINEAR, (4, 8), (4, 8), (0, 2)),
        "LoKr of two products": lokr(LINEAR, (4, 8), (4, 8), (2, 2)),
        "LoKr of whole factors": lokr(LINEAR, (4, 8), (4, 8), (0, 0)),
        "LoKr of a convolution": lokr(KERNEL, (4, 4), (4, 4, 3, 3), (0, 2)),
        "LoKr of whole kernels": lokr(KERNEL, (4, 4), (4, 4, 3, 3), (0, 0)),
        "LoKr of small factors": lokr(KERNEL, (2, 2), (8, 8, 3, 3), (1, 1)),
        "LoKr with a core": lokr_tucker(2),
        "LoCon with a core": locon_tucker(3),
        "difference": whole(16, 64),
        "difference of a kernel": whole(16, 16, 3, 3),
    }


CASES = cases()


def written(folder: Path, name: str, parts: Tensors) -> Path:
    """The parts of one UNet module as LyCORIS writes them."""
    file = folder / "lycoris.safetensors"
    key = f"lora_unet_{flat(name)}"
    tensors = {f"{key}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    save_file({**tensors, f"{key}.alpha": torch.tensor(ALPHA)}, file)
    return file


@pytest.mark.parametrize("case", CASES)
def test_a_product_is_read_as_what_it_means(case: str, tmp_path: Path) -> None:
    name, parts, wanted = CASES[case]
    weights = load(written(tmp_path, name, parts))
    found = product(weights, "unet", name)
    assert torch.allclose(found.flatten(1), wanted.flatten(1), atol=1e-6), case
    rank = weights.layouts["unet"].slots[name].rank
    assert rank <= min(found.flatten(1).shape)
    exact = {"LoHa": 4, "LoHa with cores": 9, "LoKr": 8, "LoKr of small factors": 1}
    assert rank == exact.get(case, rank)


@pytest.mark.parametrize("case", ["LoHa of a 1 x 1 convolution", "LoKr of a convolution", "LoHa"])
def test_it_draws_as_the_formula_says(case: str, tmp_path: Path) -> None:
    name, parts, wanted = CASES[case]
    pipe, other = PIPELINES["sd1"](), PIPELINES["sd1"]()
    plain = picture(pipe)
    weight = other.unet.get_submodule(name).weight
    with torch.no_grad():
        weight += wanted.reshape(weight.shape)
    attach(pipe, [(written(tmp_path, name, parts), 1.0)])
    drawn_ = picture(pipe)
    assert (drawn_ - picture(other)).abs().max() <= 1e-6
    assert (drawn_ - plain).abs().max() > 1e-5


@pytest.mark.parametrize("case", ["LoHa", "LoKr of a convolution", "LoCon with a core"])
def test_dora_beside_a_product(case: str, tmp_path: Path) -> None:
    """LyCORIS': m * (W + D) / |W + D|, row by row."""
    name, parts, d = CASES[case]
    pipe = PIPELINES["sd1"]()
    w = base_of(networks(pipe))("unet", name)
    assert w is not None
    m = (1 + torch.rand(16)).reshape(16, *[1] * (w.ndim - 1))
    weights = load(written(tmp_path, name, {**parts, "dora_scale": m}))
    assert weights.layouts["unet"].dora
    assert fit(weights, networks(pipe))
    together = w + d.reshape(w.shape)
    wanted = m * together / together.flatten(1).norm(dim=1).reshape(m.shape)
    assert torch.allclose(w + delta(weights, "unet", name, w), wanted, atol=1e-6)


FAULTS: dict[str, tuple[Tensors, str]] = {
    "half of a LoHa": ({"hada_w1_a": drawn(4, 2)}, "no whole LoRA"),
    "two forms": ({"diff": drawn(2, 2), "lora_down.weight": drawn(1, 2)}, "no whole LoRA"),
    "a bias": ({"diff": drawn(2, 2), "diff_b": drawn(2)}, "diff_b"),
    "OFT": ({"oft_blocks": drawn(2, 2)}, "oft_blocks"),
    "ranks that differ": (
        {f"hada_w{s}": drawn(2, 3) for s in ("1_a", "1_b", "2_a", "2_b")},
        "do not go together",
    ),
    "a factor twice": ({"lokr_w1": drawn(2, 2), "lokr_w1_a": drawn(2, 2)}, "do not go together"),
    "more than fits": (
        {"lokr_w1": torch.zeros(700, 700), "lokr_w2": torch.zeros(700, 700)},
        "is no LoKr of a Stable Diffusion",
    ),
    "alphas": ({"diff": drawn(2, 2), "alpha": drawn(2)}, "it is one number"),
    "a magnitude of no side": ({"diff": drawn(2, 3), "dora_scale": drawn(5, 1)}, "dora_scale"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_parts_that_make_no_product_are_one_clear_error(fault: str, tmp_path: Path) -> None:
    parts, told = FAULTS[fault]
    file = tmp_path / "a.safetensors"
    save_file({f"lora_unet_x.{part}": tensor for part, tensor in parts.items()}, file)
    with pytest.raises(UserError, match=told) as refusal:
        load(file)
    assert str(file) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_header_alone_tells_a_part_that_is_unknown(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"lora_unet_x.oft_blocks": drawn(2, 2)}, file)
    with pytest.raises(UserError, match="no whole LoRA, Tucker, LoHa, LoKr, diff"):
        inspect(file)
