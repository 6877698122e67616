"""Laws of an adapter in training: it alone is trained, in float32, and it leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.inject import eject, inject, without_input_casts
from ldm_pipeline.lora.targets import LoraSettings
from ldm_pipeline.models.unet import bind
from tests.lora.conftest import BLOCKS, KINDS
from tests.lora.test_targets import ATTENTIONS, TEXT


def answer(unet: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What the UNet says about fixed noise."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 4, 16, 16, generator=generator).to(dtype)
    embeds = torch.randn(1, 77, 32, generator=generator).to(dtype)
    return bind(unet, embeds)(x, torch.tensor(500))


def test_exactly_the_adapter_is_trainable_and_float32(pipe: Any, adapt: Any, kind: str) -> None:
    adapter = adapt(pipe, kind, targets="attention")
    parts = ["lora_A.weight", "lora_B.weight"]
    parts += ["lora_magnitude_vector"] if kind == "dora" else []
    modules = [f"unet.{n}" for n in ATTENTIONS] + [f"text_encoder.{n}" for n in TEXT]
    assert set(adapter.parameters) == {f"{n}.{part}" for n in modules for part in parts}
    models = (pipe.unet, pipe.text_encoder)
    trainable = {id(p) for m in models for p in m.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in adapter.parameters.values()}
    assert {p.dtype for p in adapter.parameters.values()} == {torch.float32}


@pytest.mark.parametrize("targets", ["attention", BLOCKS])
def test_a_new_adapter_changes_nothing_and_a_trained_one_does(
    pipe: Any, kind: str, targets: Any
) -> None:
    plain = answer(pipe.unet)
    adapter = inject({"unet": pipe.unet}, LoraSettings(targets, **KINDS[kind]), seed=0)
    assert torch.equal(answer(pipe.unet), plain)
    before = {name: p.detach().clone() for name, p in adapter.parameters.items()}
    for part in {name.rpartition("lora_")[2] for name in before}:
        with torch.no_grad():
            for name, parameter in adapter.parameters.items():
                parameter.copy_(before[name] + 0.1 * name.endswith(part))
        # While B is zero, A alone says nothing.
        assert torch.equal(answer(pipe.unet), plain) is (part == "A.weight"), part


def test_every_parameter_has_a_gradient(pipe: Any, adapt: Any, kind: str) -> None:
    adapter = adapt(pipe, kind)
    ids = torch.arange(77)[None]
    embeds = pipe.text_encoder(ids)[0]
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    bind(pipe.unet, embeds)(x, torch.tensor(500)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters.values())
    base = [p for m in (pipe.unet, pipe.text_encoder) for p in m.parameters() if p.grad is not None]
    assert len(base) == len(adapter.parameters), "no other parameter has a gradient"


def test_ejecting_leaves_the_base_exactly_as_it_was(pipe: Any, adapt: Any, kind: str) -> None:
    models = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    pipe.unet.conv_in.requires_grad_(False)

    def everything() -> tuple[Any, ...]:
        return (
            [(c, n, id(m), m.training) for c in models for n, m in models[c].named_modules()],
            [
                (c, n, id(p), p.requires_grad)
                for c in models
                for n, p in models[c].named_parameters()
            ],
            [hasattr(m, "peft_config") for m in models.values()],
            [bool(m._hf_peft_config_loaded) for m in models.values()],
        )

    weights = {c: {n: v.clone() for n, v in m.state_dict().items()} for c, m in models.items()}
    before = everything()
    for _ in range(2):
        adapter = adapt(pipe, kind)
        answer(pipe.unet).sum().backward()
        eject(adapter)
        assert everything() == before
    for component, model in models.items():
        state = model.state_dict()
        assert state.keys() == weights[component].keys()
        assert all(torch.equal(state[n], v) for n, v in weights[component].items())


def test_the_beginning_depends_on_the_seed_alone(tiny: Callable[..., Any], kind: str) -> None:
    def beginning(seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        unet = tiny()["unet"].to(dtype)
        torch.manual_seed(int(torch.randint(1000, ()).item()))
        state = torch.get_rng_state()
        adapter = inject({"unet": unet}, LoraSettings(**KINDS[kind]), seed=seed)
        assert torch.equal(torch.get_rng_state(), state), "torch's own generator was used"
        return {n: p.detach() for n, p in adapter.parameters.items() if n.endswith("A.weight")}

    first, again = beginning(1, torch.float32), beginning(1, torch.bfloat16)
    other = beginning(2, torch.float32)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert all(not torch.equal(first[n], other[n]) for n in first)
    # As nn.Linear draws: uniform within 1/sqrt(inputs). Half of n draws below half of that, to
    # 4 standard errors.
    drawn = torch.cat([(a * a.shape[1] ** 0.5).abs().flatten() for a in first.values()])
    assert drawn.max() <= 1
    assert abs((drawn < 0.5).float().mean() - 0.5) < 4 * 0.5 / len(drawn) ** 0.5


def test_a_small_step_is_not_rounded_away_on_a_bfloat16_base(
    pipe: Any, adapt: Any, kind: str
) -> None:
    pipe.unet.to(torch.bfloat16)
    pipe.text_encoder.to(torch.bfloat16)
    for name, parameter in adapt(pipe, kind).parameters.items():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(1 + 1e-4)
        assert bool((parameter != before).all()), name
        half = before.to(torch.bfloat16)
        assert torch.equal(half * (1 + 1e-4), half), "the danger is real"


def test_dora_measures_a_bfloat16_base_in_float32(pipe: Any) -> None:
    pipe.unet.to(torch.bfloat16)
    weights = {n: p.detach().float() for n, p in pipe.unet.named_parameters()}
    adapter = inject({"unet": pipe.unet}, LoraSettings(BLOCKS, dora=True), seed=0)
    for key, magnitude in adapter.parameters.items():
        if key.endswith("lora_magnitude_vector"):
            name = key.removeprefix("unet.").replace("lora_magnitude_vector", "weight")
            rows = weights[name].flatten(1).norm(dim=1)
            # The sum of a row's squares in another order; bfloat16 would be off by up to 4e-3.
            assert torch.allclose(magnitude.detach().flatten(), rows, rtol=1e-6, atol=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_it_runs_on_a_bfloat16_base(pipe: Any, adapt: Any, kind: str, autocast: bool) -> None:
    pipe.unet.to(torch.bfloat16)
    pipe.text_encoder.to(torch.bfloat16)
    plain = answer(pipe.unet, torch.bfloat16)
    adapter = adapt(pipe, kind)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        adapted = answer(pipe.unet, torch.bfloat16)
    adapted.float().square().mean().backward()
    assert not torch.equal(adapted, plain)
    gradients = [p.grad for n, p in adapter.parameters.items() if n.startswith("unet")]
    assert all(g is not None and g.dtype == torch.float32 for g in gradients)


def test_without_casts_autocast_gives_the_same_gradients(pipe: Any, adapt: Any, kind: str) -> None:
    pipe.unet.to(torch.bfloat16)
    adapter = adapt(pipe, kind)
    layers = [m for m in pipe.unet.modules() if hasattr(m, "cast_input_dtype_enabled")]

    def gradients() -> dict[str, torch.Tensor]:
        pipe.unet.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = answer(pipe.unet, torch.bfloat16).float().square().mean()
        loss.backward()
        parameters = adapter.parameters.items()
        return {n: p.grad.clone() for n, p in parameters if p.grad is not None}

    usual = gradients()
    with without_input_casts(adapter):
        assert {layer.cast_input_dtype_enabled for layer in layers} == {kind == "dora"}
        lean = gradients()
    assert {layer.cast_input_dtype_enabled for layer in layers} == {True}
    assert usual.keys() == lean.keys()
    assert all(torch.equal(usual[n], lean[n]) for n in usual)


def test_a_second_adapter_is_refused_before_anything_changes(pipe: Any, adapt: Any) -> None:
    adapt(pipe)
    before = [name for name, _ in pipe.unet.named_modules()]
    with pytest.raises(UserError, match="already has an adapter"):
        inject({"unet": pipe.unet}, LoraSettings(), seed=0)
    assert [name for name, _ in pipe.unet.named_modules()] == before


def test_an_average_of_the_parameters_can_stand_for_them(pipe: Any, adapt: Any) -> None:
    adapter = adapt(pipe)
    halves = {name: p.detach() / 2 for name, p in adapter.parameters.items()}
    weights = adapter.weights(halves)
    assert weights.layouts == adapter.layouts
    assert all(torch.equal(weights.tensors[n] * 2, p) for n, p in adapter.parameters.items())
    with pytest.raises(AssertionError):
        adapter.weights({"unet": torch.zeros(1)})
