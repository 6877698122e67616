"""Laws of drawing with LoRA files: as stock diffusers does it, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

from ldm_pipeline import LatentDiffusionPipeline
from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.attach import attach, networks
from ldm_pipeline.lora.files import inspect, save
from ldm_pipeline.lora.inject import inject
from ldm_pipeline.lora.targets import LoraSettings
from tests.lora.conftest import KINDS

Build = Callable[..., dict[str, Any]]

OTHERS = ("mid_block.*.proj_in", "mid_block.*.attn1", "q_proj")
"""Targets of which some are FEW's."""


@pytest.fixture
def make(tiny: Build, adapt: Any, tmp_path: Path) -> Callable[..., Path]:
    """make(name, kind, seed=…): the path of a LoRA file for the tiny pipeline."""

    def make(name: str, kind: str = "lora", **settings: Any) -> Path:
        weights = adapt(LatentDiffusionPipeline(**tiny()), kind, **settings).weights()
        return save(tmp_path / f"{name}.safetensors", weights)

    return make


def changed(unet: Any, **settings: Any) -> Any:
    """A UNet like `unet` but for `settings`."""
    torch.manual_seed(0)
    own = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    return UNet2DConditionModel(**{**own, **settings}).eval()


def snapshot(pipe: Any) -> dict[str, Any]:
    """Every module's name and identity, every weight, what is active."""
    return {
        component: (
            [(name, id(module)) for name, module in model.named_modules()],
            {name: value.clone() for name, value in model.state_dict().items()},
            [list(m.active_adapters) for m in model.modules() if isinstance(m, BaseTunerLayer)],
            sorted(getattr(model, "peft_config", {})),
        )
        for component, model in networks(pipe).items()
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether two snapshots agree to the last bit."""
    return before.keys() == after.keys() and all(
        (b[0], b[2], b[3]) == (a[0], a[2], a[3])
        and b[1].keys() == a[1].keys()
        and all(torch.equal(b[1][name], a[1][name]) for name in b[1])
        for b, a in zip(before.values(), after.values(), strict=True)
    )


def test_attached_it_draws_what_was_trained(
    pipe: Any, tiny: Build, adapt: Any, draw: Any, kind: str, tmp_path: Path
) -> None:
    trainer = LatentDiffusionPipeline(**tiny())
    plain = draw(pipe)
    file = save(tmp_path, adapt(trainer, kind).weights())
    attach(pipe, [(file, 1.0)])
    attached = draw(pipe)
    # The same operations in float32; at most the order of a sum may differ.
    assert (attached - draw(trainer)).abs().max() <= 1e-6
    assert (attached - plain).abs().max() > 1e-3
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), plain)


@pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute")
def test_two_with_weights_are_stock_s_set_adapters(
    pipe: Any, tiny: Build, make: Any, draw: Any, kind: str
) -> None:
    one, two = make("one", kind, seed=1), make("two", kind, seed=2, targets=OTHERS, overrides={})
    stock = StableDiffusionPipeline(**tiny(), requires_safety_checker=False)
    stock.load_lora_weights(one, adapter_name="one")
    stock.load_lora_weights(two, adapter_name="two")
    stock.set_adapters(["one", "two"], [0.8, -0.3])
    names = attach(pipe, [(one, 0.8), (two, -0.3)])
    both = draw(pipe)
    assert torch.equal(both, draw(stock))
    stock.set_adapters(["two"], [0.5])
    pipe.set_adapters([names[1]], [0.5])
    assert torch.equal(draw(pipe), draw(stock))
    assert not torch.equal(draw(pipe), both)


def test_at_weight_0_pictures_are_the_base_s_to_the_last_bit(
    pipe: Any, make: Any, draw: Any, kind: str
) -> None:
    plain = draw(pipe)
    names = attach(pipe, [(make("one", kind), 0.0), (make("two", kind, seed=1), 0)])
    assert torch.equal(draw(pipe), plain)
    pipe.set_adapters(list(names), [1.0, 1.0])
    assert not torch.equal(draw(pipe), plain), "they were loaded"


def test_what_is_attached_later_takes_over(pipe: Any, make: Any, draw: Any) -> None:
    one, two = make("one", seed=1), make("two", seed=2)
    first = attach(pipe, [(one, 1.0)])
    alone = draw(pipe)
    second = attach(pipe, [(two, 1.0)])
    assert set(first).isdisjoint(second)
    pipe.set_adapters(list(first))
    assert torch.equal(draw(pipe), alone)


def test_no_files_change_nothing(pipe: Any, draw: Any) -> None:
    before = snapshot(pipe)
    assert attach(pipe, []) == ()
    assert same(before, snapshot(pipe))


@pytest.fixture
def other(tiny: Build, adapt: Any, tmp_path: Path) -> Path:
    """A LoRA of a wider model."""
    parts = tiny()
    parts["unet"] = changed(parts["unet"], block_out_channels=(8, 24))
    return save(tmp_path / "other.safetensors", adapt(LatentDiffusionPipeline(**parts)).weights())


@pytest.mark.parametrize("before_it", [False, True])
def test_a_file_that_does_not_fit_changes_nothing(
    pipe: Any, make: Any, other: Path, before_it: bool
) -> None:
    good = make("good")
    if before_it:
        attach(pipe, [(good, 0.7)])
    before = snapshot(pipe)
    with pytest.raises(UserError) as refusal:
        attach(pipe, [(good, 1.0), (other, 1.0)])
    assert same(before, snapshot(pipe))
    told = str(refusal.value)
    assert str(other) in told
    assert "unet." in told
    assert "matched" in told
    assert "0 missing, 0 unexpected" in told
    # A and B of proj_in and of attn2, but for the two A that words come in at.
    assert f"{2 + 8 - 2} of another shape" in told
    assert told.endswith("another model's LoRA?")
    assert "\n" not in told


def test_a_file_with_one_tensor_cut_is_called_damaged(pipe: Any, make: Any, tmp_path: Path) -> None:
    good = make("good")
    tensors = load_file(good)
    key = min(tensors)
    tensors[key] = tensors[key][:, :-1].contiguous()
    save_file(tensors, tmp_path / "cut.safetensors", metadata=dict(inspect(good).texts))
    with pytest.raises(UserError, match=r"cut\.safetensors does not fit.*; a damaged file\?$"):
        attach(pipe, [(tmp_path / "cut.safetensors", 1.0)])


def test_a_pipeline_without_a_text_encoder_refuses_its_keys(tiny: Build, make: Any) -> None:
    parts = {**tiny(), "text_encoder": None, "tokenizer": None}
    pipe = LatentDiffusionPipeline(**parts)
    with pytest.raises(UserError, match=r"unexpected .*text_encoder"):
        attach(pipe, [(make("both"), 1.0)])


@pytest.mark.parametrize("before_it", [False, True])
def test_a_failure_half_way_is_undone(
    pipe: Any, make: Any, draw: Any, before_it: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = make("good")
    if before_it:
        attach(pipe, [(good, 0.7)])
    before, picture = snapshot(pipe), draw(pipe)

    def fails(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(type(pipe), "load_lora_into_text_encoder", fails)
    with pytest.raises(MemoryError):
        attach(pipe, [(make("late", targets=("mid_block", "v_proj")), 1.0)])
    assert same(before, snapshot(pipe))
    assert torch.equal(draw(pipe), picture)


@pytest.mark.parametrize("files", ["a.safetensors", ["a.safetensors"], 5, [("a", 1.0, 2)]], ids=str)
def test_what_are_no_pairs_is_refused(pipe: Any, files: Any) -> None:
    with pytest.raises(UserError, match=r"must be a list of \(path, weight\) pairs"):
        attach(pipe, files)
    with pytest.raises(UserError, match="path=5 must be a name or a path"):
        attach(pipe, [(5, 1.0)])  # type: ignore[list-item]  # the point of the test


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "much", None])
def test_a_weight_that_is_no_number_is_refused(pipe: Any, make: Any, weight: Any) -> None:
    before = snapshot(pipe)
    with pytest.raises(UserError, match="finite"):
        attach(pipe, [(make("one"), weight)])
    assert same(before, snapshot(pipe))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_half_precision_pipelines_draw_too(pipe: Any, make: Any, draw: Any, kind: str) -> None:
    pipe.to(torch.bfloat16)
    plain = draw(pipe)
    attach(pipe, [(make("one", kind), 1.0)])
    adapted = draw(pipe)
    assert adapted.isfinite().all()
    assert not torch.equal(adapted, plain)


@pytest.fixture
def large(tiny_xl: Build) -> Callable[[], Any]:
    """Builds a tiny pipeline of SDXL's shape."""
    return lambda: StableDiffusionXLPipeline(**tiny_xl(), add_watermarker=False)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_both_text_encoders_of_a_larger_model(
    large: Callable[[], Any], draw: Any, tmp_path: Path, kind: str
) -> None:
    trainer, stock, ours = large(), large(), large()
    plain = draw(trainer)
    settings = LoraSettings(("mid_block.*.attn2", "v_proj", "text_projection"), 3, 5, **KINDS[kind])
    adapter = inject(networks(trainer), settings, seed=0)
    assert {key.partition(".")[0] for key in adapter.parameters} == {
        "unet",
        "text_encoder",
        "text_encoder_2",
    }
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in adapter.parameters.items():
            if key.startswith("text_encoder_2"):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    trained = draw(trainer)
    assert (trained - plain).abs().max() > 1e-3, "the second text encoder counts"
    file = save(tmp_path, adapter.weights())
    stock.load_lora_weights(file)
    attach(ours, [(file, 1.0)])
    # The same operations in float32; at most the order of a sum may differ.
    assert (draw(stock) - trained).abs().max() <= 1e-6
    assert (draw(ours) - trained).abs().max() <= 1e-6
