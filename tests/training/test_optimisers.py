"""Every kind of optimiser learns, and resumes where it stopped."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ldm_pipeline.errors import UserError
from ldm_pipeline.training import checkpoint
from ldm_pipeline.training.config import OptimiserSettings, TrainingConfig
from ldm_pipeline.training.engine import Interrupted, fit
from ldm_pipeline.training.updates import build_optimiser
from tests.training.test_engine import Spoilt, stop_in
from tests.training.toy import Toy, settings

RATES = {"adamw": 1e-2, "muon": 1e-2, "adafactor": 1e-2, "prodigy": 1.0, "schedulefree": 1e-2}
kinds = pytest.mark.parametrize("kind", RATES)


def told(out: Path, kind: str, steps: int = 6) -> TrainingConfig:
    """A toy's run with this optimiser."""
    config = settings(out, steps=steps, validate_every=100)
    optimiser = OptimiserSettings.model_validate(
        {"kind": kind, "lr": RATES[kind], "warmup_steps": 0, "cooldown_steps": 0, "ema_decay": 0}
    )
    return config.model_copy(update={"optimiser": optimiser})


def error(config: TrainingConfig, folder: str) -> float:
    """The exported model's error on positions that no run reaches."""
    toy = Toy(config)
    toy.load_state_dict(load_file(config.run.out / folder / "toy.safetensors"))
    return toy.validate()["error"]


@kinds
def test_it_learns(tmp_path: Path, kind: str) -> None:
    config = told(tmp_path, kind, steps=300)
    before = Toy(config).validate()["error"]
    fit(Toy(config), config)
    assert error(config, "final") < 0.8 * before


@kinds
def test_a_stop_leaves_no_trace(tmp_path: Path, kind: str) -> None:
    """Tensors and numbers of the optimiser, the weights and the exported model."""
    whole, broken = told(tmp_path / "whole", kind), told(tmp_path / "broken", kind)
    fit(Toy(whole), whole)
    with pytest.raises(Interrupted):
        fit(Toy(broken, stop_in(2, 4, signal.SIGTERM)), broken)
    fit(Toy(broken), broken)
    ends = [checkpoint.newest(config.run.out / "checkpoints") for config in (whole, broken)]
    (one, state), (other, again) = (checkpoint.load(end) for end in ends if end is not None)
    assert state == again
    for part, tensors in one.items():
        assert [n for n, v in tensors.items() if not torch.equal(v, other[part][n])] == []
    files = [load_file(c.run.out / "final" / "toy.safetensors") for c in (whole, broken)]
    assert all(torch.equal(value, files[1][name]) for name, value in files[0].items())


@kinds
def test_what_is_not_finite_stops_before_the_update(tmp_path: Path, kind: str) -> None:
    config = told(tmp_path, kind)
    toy = Spoilt(config, "input")
    with pytest.raises(FloatingPointError, match=r"step 3: .*sample 13"):
        fit(toy, config)
    assert all(torch.isfinite(p).all() for p in toy.parameters())


@pytest.mark.parametrize(
    ("change", "named"),
    [({"kind": "adafactor"}, 'optimiser.kind="adamw"'), ({"seed": 4}, "run.seed=3")],
)
def test_another_kind_or_seed_is_no_resume(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    config = told(tmp_path, "adamw")
    fit(Toy(config), config)
    section = "run" if "seed" in change else "optimiser"
    fields = {**getattr(config, section).model_dump(), **change}
    other = type(config).model_validate({**config.model_dump(), section: fields})
    with pytest.raises(UserError, match=f"was begun with {named}"):
        fit(Toy(other), other)


def test_what_the_configuration_says_holds_after_a_resume(tmp_path: Path) -> None:
    config = told(tmp_path, "adamw")
    fit(Toy(config), config)
    fields = {**config.optimiser.model_dump(), "weight_decay": 0.5, "betas": (0.5, 0.6)}
    run = {**config.run.model_dump(), "steps": 7}
    other = type(config).model_validate({"run": run, "optimiser": fields})
    seen: list[tuple[float, tuple[float, float]]] = []

    def note(optimiser: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        first = optimiser.param_groups[0]
        seen.append((first["weight_decay"], first["betas"]))

    handle = register_optimizer_step_pre_hook(note)
    fit(Toy(other), other)
    handle.remove()
    assert seen == [(0.5, (0.5, 0.6))]


def test_schedule_free_gives_away_its_average(tmp_path: Path) -> None:
    config = told(tmp_path, "schedulefree", steps=50)
    fit(Toy(config), config)
    newest = checkpoint.newest(tmp_path / "checkpoints")
    assert newest is not None
    final = load_file(tmp_path / "final" / "toy.safetensors")["last.weight"]
    assert not torch.equal(checkpoint.load(newest)[0]["weights"]["last.weight"], final)


def test_schedule_free_takes_no_second_average() -> None:
    for fields in ({"ema_decay": 0.9}, {"ema_decay": 0, "cooldown_steps": 3}):
        with pytest.raises(ValueError, match="averages weights by itself"):
            OptimiserSettings.model_validate({"kind": "schedulefree", **fields})


@pytest.mark.parametrize(
    ("kind", "module"),
    [("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt"), ("schedulefree", "schedulefree")],
)
def test_a_missing_library_is_named(
    kind: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, f"{module}.optim", None)
    asked = OptimiserSettings.model_validate({"kind": kind, "ema_decay": 0})
    with pytest.raises(UserError, match=rf"kind='{kind}' needs pip install"):
        build_optimiser(dict(nn.Linear(2, 2).named_parameters()), asked)


@pytest.mark.parametrize(("name", "value"), [("betas", (0.5, 0.6)), ("eps", 1e-6)])
def test_what_adafactor_has_no_use_for_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    """Before anything is written; the defaults, which config.yaml names, are not."""
    config = told(tmp_path, "adafactor", steps=1)
    asked = config.optimiser.model_copy(update={name: value})
    with pytest.raises(UserError, match=rf"optimiser\.{name}=.* with optimiser\.kind=adafactor"):
        fit(Toy(config), config.model_copy(update={"optimiser": asked}))
    assert list(tmp_path.iterdir()) == []
    told_again = OptimiserSettings.model_validate(config.optimiser.model_dump())
    build_optimiser(dict(nn.Linear(2, 2).named_parameters()), told_again)
