"""Laws of merging, resizing, extracting and fusing: sums are sums, and what is undone is undone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline
from safetensors import SafetensorError
from torch._dynamo.utils import counters

from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.attach import attach, base_of
from ldm_pipeline.lora.checkpoints import open_model_folder
from ldm_pipeline.lora.deltas import delta, product, without_dora
from ldm_pipeline.lora.files import save
from ldm_pipeline.lora.fitting import modules_of
from ldm_pipeline.lora.fusing import Fused
from ldm_pipeline.lora.merging import into_checkpoint, stack
from ldm_pipeline.lora.resizing import Rank, extract, resize
from ldm_pipeline.lora.targets import TEXT_MODEL, adaptable
from ldm_pipeline.lora.weights import LORA_A, LoraWeights
from tests.lora.tiny_families import PIPELINES, lora, networks, picture, sd1

KINDS: dict[str, dict[str, Any]] = {"LoRA": {}, "DoRA": {"dora": True}, "rsLoRA": {"rslora": True}}


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal but for the order of sums in float32."""
    return torch.allclose(one, other, atol=2e-6, rtol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline of Stable Diffusion 1.x, saved by stock diffusers."""
    place = tmp_path_factory.mktemp("model") / "base"
    sd1().save_pretrained(place)
    return place


# Merging ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["LoRA", "rsLoRA"])
def test_a_stack_is_the_weighted_sum(kind: str) -> None:
    pipe = sd1()
    loras = [lora(pipe, seed=seed, every=3, **KINDS[kind]) for seed in range(3)]
    weights = [0.8, -0.5, 1.5]
    merged = stack(list(zip(loras, weights, strict=True)))
    everything = {place for one in loras for place in one.modules()}
    assert set(merged.modules()) == everything
    for component, name in everything:
        own = [
            (one, w)
            for one, w in zip(loras, weights, strict=True)
            if (component, name) in set(one.modules())
        ]
        wanted = sum(w * product(one, component, name) for one, w in own)
        assert close(product(merged, component, name), torch.as_tensor(wanted))
        rank = sum(one.layouts[component].slots[name].rank for one, _ in own)
        assert merged.layouts[component].slots[name].rank == rank


def test_dora_is_summed_beside_its_base_only() -> None:
    pipe = sd1()
    base = base_of(networks(pipe))
    dora = lora(pipe, every=5, dora=True)
    with pytest.raises(UserError, match="--model"):
        stack([(dora, 1.0)])
    plain = without_dora(dora, base)
    for component, name in dora.modules():
        w = base(component, name)
        assert close(product(plain, component, name), delta(dora, component, name, w))
    stack([(plain, 1.0)])


def test_loras_of_different_models_are_not_summed() -> None:
    one, other = lora(sd1()), lora(PIPELINES["sdxl"]())
    with pytest.raises(UserError, match="different models"):
        stack([(one, 1.0), (other, 1.0)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_with_loras_draws_as_the_base_with_them(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    pipe = sd1()
    files = [
        (
            save(tmp_path / f"{seed}", lora(pipe, seed=seed, every=9, size=0.1, **KINDS[kind])),
            weight,
        )
        for seed, weight in ((0, 1.0), (1, 0.5))
    ]
    from ldm_pipeline.lora.files import load

    loras = [(load(file), weight) for file, weight in files]
    out = into_checkpoint(open_model_folder(folder), loras, tmp_path / "out")
    plain = picture(pipe)
    attach(pipe, files)
    told = {"local_files_only": True, "safety_checker": None, "requires_safety_checker": False}
    merged = picture(StableDiffusionPipeline.from_pretrained(out, **told))
    assert (merged - picture(pipe)).abs().max() <= 1e-6
    assert (merged - plain).abs().max() > 1e-4
    names = {file.relative_to(out) for file in out.rglob("*")}
    assert names == {file.relative_to(folder) for file in folder.rglob("*")}


def test_a_checkpoint_keeps_its_precision_and_what_is_not_adapted(tmp_path: Path) -> None:
    sd1().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    base = open_model_folder(tmp_path / "base")
    weights = lora(sd1(), every=11)
    out = open_model_folder(into_checkpoint(base, [(weights, 1.0)], tmp_path / "out"))
    adapted = set(weights.modules())
    for component, places in base.tensors.items():
        for key in places:
            before, after = base.tensor(component, key), out.tensor(component, key)
            assert before is not None
            assert after is not None
            assert after.dtype == torch.bfloat16
            changed = (component, key.removesuffix(".weight")) in adapted
            assert torch.equal(before, after) is not changed, key


def test_a_lora_that_does_not_fit_a_checkpoint_writes_nothing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not fit"):
        into_checkpoint(
            open_model_folder(folder), [(lora(PIPELINES["sdxl"]()), 1.0)], tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("broken", ["copytree", "save_file", "overflow"])
def test_a_model_that_cannot_be_written_whole_is_not_written(
    broken: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        if broken == "copytree":
            raise shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")])
        raise SafetensorError("No space left on device")

    if broken == "copytree":
        monkeypatch.setattr(shutil, "copytree", full)
    if broken == "save_file":
        monkeypatch.setattr(safetensors.torch, "save_file", full)
    weight = 1e39 if broken == "overflow" else 1.0
    why = (
        "not finite in float32; give" if broken == "overflow" else "cannot write .*out: .*No space"
    )
    with pytest.raises(UserError, match=why):
        into_checkpoint(
            open_model_folder(folder), [(lora(PIPELINES["sd1"]()), weight)], tmp_path / "out"
        )
    assert not any(tmp_path.iterdir())


def test_a_stranger_s_links_are_not_copied(folder: Path, tmp_path: Path) -> None:
    """What a folder's links lead to outside of it comes into no copy of it."""
    shutil.copytree(folder, tmp_path / "stranger")
    (tmp_path / "secret").mkdir()
    (tmp_path / "stranger/extra").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="a link that leads out of the folder"):
        open_model_folder(tmp_path / "stranger")


def test_a_checkpoint_s_modules_are_those_that_can_be_adapted(folder: Path) -> None:
    assert open_model_folder(folder).modules == modules_of(networks(sd1()))


# Resizing and extracting ------------------------------------------------------------------------


def test_resizing_to_the_rank_that_is_there_changes_nothing() -> None:
    weights = lora(sd1(), every=4)
    made = resize(weights, Rank(most=8))
    assert made.share == pytest.approx(1)
    for place in weights.modules():
        assert close(product(made.weights, *place), product(weights, *place))


def test_a_lower_rank_keeps_the_energy_that_it_says() -> None:
    pipe = sd1()
    weights = stack([(lora(pipe, seed=s, every=4, only=("mid_block",)), 1.0) for s in (0, 4, 8)])
    made = resize(weights, Rank(most=2))
    assert 0.1 < made.share < 0.999
    kept = whole = 0.0
    for place in weights.modules():
        before, after = product(weights, *place), product(made.weights, *place)
        assert made.weights.layouts[place[0]].slots[place[1]].rank <= 2
        # The nearest of its rank leaves the rest at a right angle to itself.
        kept += float((after**2).sum())
        whole += float((before**2).sum())
        assert float(((before - after) ** 2).sum()) == pytest.approx(
            float((before**2).sum() - (after**2).sum()), rel=1e-3, abs=1e-6
        )
    assert kept / whole == pytest.approx(made.share, rel=1e-4)


def test_an_energy_asks_for_no_more_ranks_than_it_needs() -> None:
    weights = stack([(lora(sd1(), seed=s, every=4, only=("mid_block",)), 1.0) for s in (0, 4, 8)])
    made = resize(weights, Rank(energy=0.8))
    assert made.share >= 0.8
    for place in weights.modules():
        rank = made.weights.layouts[place[0]].slots[place[1]].rank
        values = torch.linalg.svdvals(product(weights, *place).flatten(1).double()) ** 2
        assert values[:rank].sum() >= 0.8 * values.sum() * (1 - 1e-6)
        assert rank == 1 or values[: rank - 1].sum() < 0.8 * values.sum()


def test_what_was_merged_is_extracted(folder: Path, tmp_path: Path) -> None:
    weights = lora(sd1(), every=7)
    base = open_model_folder(folder)
    tuned = open_model_folder(into_checkpoint(base, [(weights, 1.0)], tmp_path / "out"))
    made = extract(tuned, base, Rank(most=3))
    assert made.share > 1 - 1e-6
    assert made.left_out == 0
    assert set(made.weights.modules()) == set(weights.modules())
    for place in weights.modules():
        assert torch.allclose(product(made.weights, *place), product(weights, *place), atol=1e-5)
    with pytest.raises(UserError, match="same weights"):
        extract(base, base, Rank(most=3))


def test_what_no_lora_can_hold_is_counted(folder: Path, tmp_path: Path) -> None:
    pipe = sd1()
    with torch.no_grad():
        pipe.unet.conv_in.bias.add_(1)
        pipe.unet.conv_in.weight.add_(torch.randn(pipe.unet.conv_in.weight.shape))
    pipe.save_pretrained(tmp_path)
    made = extract(open_model_folder(tmp_path), open_model_folder(folder), Rank(most=1))
    assert made.left_out == 1
    assert set(made.weights.modules()) == {("unet", "conv_in")}
    assert made.share < 0.9


# Fusing -----------------------------------------------------------------------------------------


def weights_of(pipe: Any) -> dict[str, torch.Tensor]:
    """Every weight of a pipeline's networks."""
    return {
        f"{component}.{name}": value.clone()
        for component, model in networks(pipe).items()
        for name, value in model.state_dict().items()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Equal to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_hundred_rounds_leave_every_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    pipe = sd1().to(dtype)
    before = weights_of(pipe)
    kinds = [
        lora(pipe, seed=0, every=20),
        lora(pipe, seed=1, every=30, dora=True),
    ]
    files = [save(tmp_path / f"{k}", weights) for k, weights in enumerate(kinds)]
    fused = Fused(pipe)
    seen = []
    for number in range(100):
        fused.swap([(files[number % 2], 0.7), (files[0], 0.3)][: 1 + number % 3])
        seen.append(weights_of(pipe) if number in (0, 1, 6) else {})
        fused.swap([])
    assert same(before, weights_of(pipe))
    assert not same(before, seen[0])
    assert not same(seen[0], seen[1])
    assert same(seen[0], seen[6]), "a swap depends on nothing before it"


@pytest.mark.parametrize("kind", KINDS)
def test_fused_it_draws_as_attached(kind: str, tmp_path: Path) -> None:
    pipe, other = sd1(), sd1()
    files = [
        (
            save(tmp_path / f"{seed}", lora(pipe, seed=seed, every=9, size=0.1, **KINDS[kind])),
            weight,
        )
        for seed, weight in ((0, 0.8), (1, -0.5))
    ]
    plain = picture(pipe)
    fused = Fused(pipe)
    fused.swap(files)
    attach(other, files)
    assert (picture(pipe) - picture(other)).abs().max() <= 1e-6
    fused.swap([])
    assert torch.equal(picture(pipe), plain)


def test_what_does_not_fit_leaves_what_was_fused(tmp_path: Path) -> None:
    pipe = sd1()
    good = save(tmp_path / "good", lora(pipe, every=9))
    bad = save(tmp_path / "bad", lora(PIPELINES["sdxl"](), every=9))
    fused = Fused(pipe)
    fused.swap([(good, 1.0)])
    before = weights_of(pipe)
    for files in ([(good, 0.5), (bad, 1.0)], [(good, float("nan"))]):
        with pytest.raises(UserError):
            fused.swap(files)
        assert same(before, weights_of(pipe))
    attach(sd1(), [])
    attached = sd1()
    attach(attached, [(good, 1.0)])
    with pytest.raises(UserError, match="adapters are attached"):
        Fused(attached)


def test_a_compiled_network_is_not_compiled_again(tmp_path: Path) -> None:
    pipe = sd1()
    files = [save(tmp_path / f"{s}", lora(pipe, seed=s, every=3)) for s in range(2)]
    fused = Fused(pipe)
    block = torch.compile(pipe.text_encoder, backend="eager")
    tokens = torch.arange(10)[None]
    torch._dynamo.reset()
    counters.clear()
    said = []
    with torch.no_grad():
        for chosen in ([], [(files[0], 1.0)], [(files[1], 0.5)], []):
            fused.swap(chosen)
            said.append(block(tokens)[0].clone())
            if len(said) == 1:
                compiled = counters["stats"]["unique_graphs"]
    assert compiled > 0
    assert counters["stats"]["unique_graphs"] == compiled
    assert torch.equal(said[0], said[3])
    assert not torch.equal(said[0], said[1])
    assert not torch.equal(said[1], said[2])


def test_what_is_called_text_model_in_a_folder_is_found(tmp_path: Path) -> None:
    """Some releases of transformers have it in the names of the first text encoder, some not."""
    from safetensors.torch import load_file, save_file

    sd1().save_pretrained(tmp_path)
    file = tmp_path / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    bare = {key.removeprefix(TEXT_MODEL): tensor for key, tensor in tensors.items()}
    for prefix in ("", TEXT_MODEL):
        save_file({prefix + key: tensor for key, tensor in bare.items()}, file)
        found = open_model_folder(tmp_path)
        assert found.modules["text_encoder"].keys() == adaptable(sd1().text_encoder).keys()


def test_merged_tensors_are_float32() -> None:
    half = lora(sd1(), every=9)
    half = LoraWeights({k: t.half() for k, t in half.tensors.items()}, half.layouts)
    merged = stack([(half, 1 / 3)])
    assert {t.dtype for k, t in merged.tensors.items() if k.endswith(LORA_A)} == {torch.float32}
