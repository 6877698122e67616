"""The training loop's laws, on a toy: what an update is, what is saved, what stops a run."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ldm_pipeline.errors import UserError
from ldm_pipeline.training import checkpoint, engine
from ldm_pipeline.training.config import OptimiserSettings, TrainingConfig
from ldm_pipeline.training.engine import Interrupted, fit
from ldm_pipeline.training.objective import Batch, Objective
from ldm_pipeline.training.updates import (
    Gradients,
    Guard,
    MovingAverage,
    build_optimiser,
    learning_rate,
    leave_out,
    ramps,
)
from tests.training.toy import Toy, settings

TRAINED = {"first.weight", "first.bias", "last.weight", "last.bias"}


def saved(config: TrainingConfig) -> dict[str, dict[str, Tensor]]:
    """The parts of a run's newest checkpoint."""
    newest = checkpoint.newest(config.run.out / "checkpoints")
    assert newest is not None
    return checkpoint.load(newest)[0]


def exported(config: TrainingConfig) -> dict[str, Tensor]:
    """The weights of a run's final model."""
    return load_file(config.run.out / "final" / "toy.safetensors")


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """The same names with the same bits."""
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.fixture
def updates() -> Iterator[list[dict[str, Any]]]:
    """What the optimiser sees just before each update: its learning rates, the gradients' norm,
    and the parameters that have a gradient."""
    seen: list[dict[str, Any]] = []

    def note(optimiser: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        held = [p for group in optimiser.param_groups for p in group["params"]]
        gradients = [p.grad.flatten() for p in held if p.grad is not None]
        seen.append(
            {
                "lr": {group["lr"] for group in optimiser.param_groups},
                "norm": float(torch.cat(gradients).norm()),
                "held": {id(p) for p in held},
                "with gradient": {id(p) for p in held if p.grad is not None},
            }
        )

    handle = register_optimizer_step_pre_hook(note)
    yield seen
    handle.remove()


def stop_in(step: int, batch_size: int, *signals: signal.Signals) -> Any:
    """A hook that sends this process `signals` while the batch of `step` is made."""

    def asked(positions: range) -> None:
        if positions.start == step * batch_size:
            for number in signals:
                os.kill(os.getpid(), number)

    return asked


# -- stop and resume -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "accumulation,mixed_precision", [(1, "no"), (2, "no"), (1, "bf16")], ids=["1", "2", "bf16"]
)
def test_a_stop_leaves_no_trace(tmp_path: Path, accumulation: int, mixed_precision: str) -> None:
    """Wherever a run is stopped, the same call again ends in the same bits as a run without stop:
    weights, moving average, optimiser and the exported model."""

    def told(out: str) -> TrainingConfig:
        return settings(tmp_path / out, accumulation=accumulation, mixed_precision=mixed_precision)

    whole = told("whole")
    fit(Toy(whole), whole)
    for last in range(whole.run.steps):
        config = told(f"stopped in {last}")
        number = signal.SIGTERM if last % 2 else signal.SIGINT
        with pytest.raises(Interrupted, match=f"step {last + 1};"):
            fit(Toy(config, stop_in(last, 4, number)), config)
        fit(Toy(config), config)
        for part, tensors in saved(whole).items():
            assert_same(tensors, saved(config)[part])
        assert_same(exported(whole), exported(config))


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    """What was done after the last checkpoint is done again, the same way."""

    class Killed(Exception):
        """Stands for a kill: nothing of ours runs after it."""

    def kill(positions: range) -> None:
        if positions.start == 5 * 4:
            raise Killed

    whole = settings(tmp_path / "whole", save_every=2)
    broken = settings(tmp_path / "broken", save_every=2)
    fit(Toy(whole), whole)
    with pytest.raises(Killed):
        fit(Toy(broken, kill), broken)
    asked: list[int] = []
    fit(Toy(broken, lambda positions: asked.append(positions.start)), broken)
    assert asked == [4 * 4, 5 * 4]
    assert_same(exported(whole), exported(broken))


def test_a_validation_that_fails_costs_no_step(tmp_path: Path) -> None:
    """What was done before it is saved; the run that goes on from there makes it first."""

    class Failing(Toy):
        def validate(self) -> dict[str, float]:
            raise UserError("no room for the pictures")

    whole = settings(tmp_path / "whole", save_every=2)
    broken = settings(tmp_path / "broken", save_every=2)
    fit(Toy(whole), whole)
    with pytest.raises(UserError, match="no room"):
        fit(Failing(broken), broken)
    assert [path.name for path in (tmp_path / "broken" / "checkpoints").iterdir()] == [
        "step-00000002"
    ]
    with pytest.raises(UserError, match="no room"):
        fit(Failing(broken, lambda _: pytest.fail("went on without")), broken)
    fit(Toy(broken), broken)
    assert_same(exported(whole), exported(broken))


def test_a_damaged_checkpoint_costs_only_its_interval(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The newest is damaged: the one before it is used, and the run ends in the same bits, even
    where only one checkpoint is kept from then on."""
    whole = settings(tmp_path / "whole", save_every=2)
    fit(Toy(whole), whole)
    reference = exported(whole)
    newest = whole.run.out / "checkpoints" / "step-00000006"
    (newest / "weights.safetensors").write_bytes(b"")
    again = settings(whole.run.out, save_every=1, keep_checkpoints=1)
    with pytest.raises(Interrupted):
        fit(Toy(again, stop_in(4, 4, signal.SIGTERM)), again)
    assert str(newest) in caplog.text
    fit(Toy(again), again)
    assert_same(reference, exported(again))
    assert [path.name for path in newest.parent.iterdir()] == [newest.name]


@pytest.fixture
def ctrl_c_works() -> Iterator[None]:
    """Ctrl-C ends a process as usual; one that a shell started in the background ignores it."""
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, kept)


@pytest.mark.usefixtures("ctrl_c_works")
def test_a_second_signal_ends_at_once_and_handlers_come_back(tmp_path: Path) -> None:
    config = settings(tmp_path)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    twice = stop_in(1, 4, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(Toy(config, twice), config)
    assert checkpoint.newest(tmp_path / "checkpoints") is None
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_without_a_compiler_a_run_goes_on_without_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = settings(tmp_path / "plain")
    fit(Toy(plain), plain)
    monkeypatch.setenv("CXX", "no-such-compiler")
    told = settings(tmp_path / "compiled")
    asked = told.model_copy(update={"run": told.run.model_copy(update={"compile": True})})
    fit(Toy(asked), asked)
    (line,) = [m for m in caplog.messages if "C++ compiler" in m]
    assert line.startswith("going on without run.compile: ")
    assert_same(exported(plain), exported(asked))


def test_a_finished_run_only_exports(tmp_path: Path) -> None:
    def refuse(positions: range) -> None:
        raise AssertionError("a finished run asked for a batch")

    config = settings(tmp_path)
    final = fit(Toy(config), config)
    before = exported(config)
    (final / "toy.safetensors").unlink()
    assert fit(Toy(config, refuse), config) == final
    assert_same(before, exported(config))


def test_another_model_is_not_resumed(tmp_path: Path) -> None:
    config = settings(tmp_path)
    fit(Toy(config), config)
    wider, renamed = Toy(config), Toy(config)
    wider.last = nn.Linear(8, 2)
    renamed.extra = nn.Linear(1, 1)
    for other in (wider, renamed):
        with pytest.raises(UserError, match="holds another model"):
            fit(other, config)


# -- one update ------------------------------------------------------------------------------


def test_accumulation_changes_nothing_but_the_memory(tmp_path: Path) -> None:
    """Two halves give the mean of the whole."""
    results = []
    for accumulation in (1, 2):
        config = settings(tmp_path / str(accumulation), accumulation=accumulation)
        fit(Toy(config), config)
        results.append(saved(config))
    for part in ("weights", "average"):
        for name, value in results[0][part].items():
            # A sum of 4 in another order is some 1e-7 off; AdamW passes that on times lr = 1e-2.
            assert torch.allclose(value, results[1][part][name], rtol=1e-6, atol=1e-7), name


@pytest.mark.parametrize("scale", [1e6, 1e-3], ids=["huge", "small"])
def test_gradients_are_clipped_and_the_log_says_from_where(
    tmp_path: Path,
    scale: float,
    updates: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The norm that reaches the optimiser is at most `max_grad_norm`; smaller ones stay."""
    logged: list[float] = []

    def note(self: Accelerator, values: dict[str, float], step: int) -> None:
        if "grad_norm" in values:
            logged.append(values["grad_norm"])

    monkeypatch.setattr(Accelerator, "log", note)
    config = settings(tmp_path, max_grad_norm=0.5)
    fit(Toy(config, scale=scale), config)
    assert len(logged) == len(updates) == config.run.steps
    for before, seen in zip(logged, updates, strict=True):
        # Rounding of the factor and of 45 products in float32.
        assert seen["norm"] == pytest.approx(min(before, 0.5), rel=1e-5)
        assert seen["norm"] <= 0.5 * (1 + 1e-6)
        assert (before > 0.5) == (scale > 1)


def test_everything_that_requires_gradients_is_trained_and_nothing_else(
    tmp_path: Path, updates: list[dict[str, Any]]
) -> None:
    config = settings(tmp_path)
    toy = Toy(config)
    assert isinstance(toy, Objective)
    before = {name: p.detach().clone() for name, p in toy.named_parameters()}
    fit(toy, config)
    wanted = {id(p) for p in toy.parameters() if p.requires_grad}
    for seen in updates:
        assert seen["held"] == seen["with gradient"] == wanted
    moved = {n for n, p in toy.named_parameters() if not torch.equal(p, before[n])}
    assert moved == TRAINED
    parts = saved(config)
    assert parts["weights"].keys() == parts["average"].keys() == TRAINED
    assert {name.partition("|")[0] for name in parts["optimiser"]} == TRAINED
    assert_same({n: toy.get_parameter(n).detach() for n in TRAINED}, parts["weights"])


def test_weight_decay_spares_biases(tmp_path: Path) -> None:
    """Without gradients only the decay acts: matrices shrink, biases stay."""
    config = settings(tmp_path, steps=1)
    toy = Toy(config, scale=0.0)
    before = {name: p.detach().clone() for name, p in toy.named_parameters()}
    fit(toy, config)
    for name in TRAINED:
        changed = not torch.equal(toy.get_parameter(name), before[name])
        assert changed == name.endswith("weight"), name


def test_the_learning_rate_has_its_course(tmp_path: Path, updates: list[dict[str, Any]]) -> None:
    """Up in 4 equal steps, level, down in 5 equal steps that end one step above zero."""
    course = OptimiserSettings(lr=2.0, warmup_steps=4, cooldown_steps=5)
    rates = [learning_rate(step, 12, course) for step in range(12)]
    wanted = [0.5, 1, 1.5, 2, 2, 2, 2, 2, 1.6, 1.2, 0.8, 0.4]
    assert rates == pytest.approx(wanted, rel=1e-12)  # rounding of doubles
    flat = OptimiserSettings(lr=2.0, warmup_steps=0, cooldown_steps=0)
    assert {learning_rate(step, 12, flat) for step in range(12)} == {2.0}

    config = settings(tmp_path)
    fit(Toy(config), config)
    for step, seen in enumerate(updates):
        assert seen["lr"] == {learning_rate(step, config.run.steps, config.optimiser)}


@pytest.mark.parametrize(
    "warmup,cooldown,fitting",
    [(20, 100, (8, 42)), (0, 1000, (0, 50)), (1000, 0, (50, 0)), (25, 25, (25, 25))],
)
def test_ramps_that_do_not_fit_are_shortened(
    warmup: int, cooldown: int, fitting: tuple[int, int]
) -> None:
    """In proportion, so that the rate that is asked for is reached; a longer run has them whole."""
    course = OptimiserSettings(lr=2.0, warmup_steps=warmup, cooldown_steps=cooldown)
    assert ramps(50, course) == fitting
    assert max(learning_rate(step, 50, course) for step in range(50)) == 2.0
    assert ramps(1100, course) == (warmup, cooldown)


def test_a_shortened_ramp_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for steps, said in (
        (4, ["optimiser.warmup_steps=2 and cooldown_steps=6 are 1 and 3 in"]),
        (8, []),
    ):
        caplog.clear()
        config = settings(tmp_path, steps=steps)
        optimiser = config.optimiser.model_copy(update={"warmup_steps": 2, "cooldown_steps": 6})
        config = config.model_copy(update={"optimiser": optimiser})
        fit(Toy(config), config)
        lines = [line for line in caplog.messages if "warmup_steps=" in line]
        assert [line.partition(" run.")[0] for line in lines] == said


def test_the_moving_average_is_a_weighted_sum_of_all_weights() -> None:
    """After updates 1 … n with decays d, the average of weights w is the sum of
    w_i (1 - d_i) d_(i+1) … d_n, the initial weights with the product of all d."""
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    average = MovingAverage({"w": parameter}, 0.4)
    weights = [parameter.detach().double().clone()]
    decays = [min(0.4, (1 + n) / (10 + n)) for n in range(1, 8)]
    assert decays[0] < decays[-1] == 0.4  # both branches are gone through
    for n in range(1, 8):
        with torch.no_grad():
            parameter.add_(n)
        weights.append(parameter.detach().double().clone())
        average.update(n)
    wanted = weights[0] * torch.tensor(decays).double().prod()
    for i, decay in enumerate(decays):
        wanted = (
            wanted + weights[i + 1] * (1 - decay) * torch.tensor(decays[i + 1 :]).double().prod()
        )
    # Seven roundings of float32.
    assert torch.allclose(average.average["w"].double(), wanted, rtol=1e-6, atol=1e-6)


def test_the_average_stands_in_and_steps_back() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    average = MovingAverage({"w": parameter}, 0.9)
    with torch.no_grad():
        parameter.fill_(5.0)
    within: list[list[float]] = []

    def fail_within() -> None:
        with average.in_place():
            within.append(parameter.tolist())
            raise RuntimeError("within")

    with pytest.raises(RuntimeError, match="within"):
        fail_within()
    assert within == [[0.0, 0.0]]
    assert parameter.tolist() == [5.0, 5.0]


@pytest.mark.parametrize("ema_decay,part", [(0.9, "average"), (0.0, "weights")])
def test_the_final_model_is_the_average_where_there_is_one(
    tmp_path: Path, ema_decay: float, part: str
) -> None:
    config = settings(tmp_path, ema_decay=ema_decay)
    fit(Toy(config), config)
    final = {name: value for name, value in exported(config).items() if name in TRAINED}
    assert_same(saved(config)[part], final)


@pytest.mark.parametrize("by_an_earlier_version", [False, True])
def test_an_average_that_is_switched_on_begins_from_the_weights_as_they_are(
    tmp_path: Path, by_an_earlier_version: bool
) -> None:
    """Without an average none is saved; earlier versions saved the weights that a run began with.
    From then on it is carried along: a stop leaves no trace."""
    began = {n: Toy(settings(tmp_path)).get_parameter(n).detach() for n in TRAINED}
    ends = []
    for out in ("whole", "broken"):
        without = settings(tmp_path / out, steps=3, ema_decay=0.0)
        fit(Toy(without), without)
        parts = saved(without)
        assert parts.keys() == {"weights", "optimiser"}
        if by_an_earlier_version:
            newest = checkpoint.newest(without.run.out / "checkpoints")
            assert newest is not None
            state = checkpoint.load(newest)[1]
            checkpoint.save(newest.parent, 3, {**parts, "average": began}, state)
        config = settings(tmp_path / out, steps=5, ema_decay=0.9)
        if out == "broken":
            with pytest.raises(Interrupted):
                fit(Toy(config, stop_in(3, 4, signal.SIGTERM)), config)
            # After 4 updates the decay is 5 / 14.
            for name, value in saved(config)["average"].items():
                wanted = torch.lerp(saved(config)["weights"][name], parts["weights"][name], 5 / 14)
                assert torch.allclose(value, wanted, rtol=1e-6, atol=1e-7), name  # rounding
        fit(Toy(config), config)
        ends.append(saved(config)["average"])
    assert_same(*ends)


# -- refusals --------------------------------------------------------------------------------


class Spoilt(Toy):
    """A toy whose sample 13, the second of step 3, is not finite."""

    def __init__(self, config: TrainingConfig, where: str) -> None:
        super().__init__(config)
        self.where = where

    def batch(self, positions: range) -> Batch:
        """Marks sample 13, and spoils its input if asked."""
        batch = super().batch(positions)
        spoilt = torch.tensor([position == 13 for position in positions])
        if self.where == "input":
            batch["x"][spoilt, 2] = torch.inf
        return {**batch, "spoilt": spoilt}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The toy's loss, or one that is infinite, or one whose gradient is."""
        losses = super().forward(batch)
        if "spoilt" in batch and batch["spoilt"].any():
            if self.where == "loss":
                losses["loss"] = losses["loss"] + torch.inf
            elif self.where == "gradient":
                bias = self.last.bias
                losses["loss"] = losses["loss"] + (bias - bias.detach()).abs().sqrt().sum()
        return losses


@pytest.mark.parametrize("where", ["input", "loss", "gradient"])
def test_what_is_not_finite_stops_before_the_update(tmp_path: Path, where: str) -> None:
    """The error names the step; weights and checkpoints are those of the last good update."""
    config = settings(tmp_path, save_every=1)
    toy = Spoilt(config, where)
    with pytest.raises(FloatingPointError, match=r"step 3: .*\(sample 13\); nothing was updated"):
        fit(toy, config)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step-00000002", "step-00000003"}
    assert_same(saved(config)["weights"], {n: toy.get_parameter(n).detach() for n in TRAINED})
    assert not (tmp_path / "final").exists()


def test_what_was_not_finite_is_found_later_with_the_sample_and_nothing_is_lost(
    tmp_path: Path,
) -> None:
    """Looked at every 5 steps only: the weights are still those before step 3."""
    config = settings(tmp_path / "spoilt", validate_every=100)
    config = config.model_copy(update={"run": config.run.model_copy(update={"log_every": 5})})
    toy = Spoilt(config, "input")
    with pytest.raises(FloatingPointError, match=r"^step 3: .*\(sample 13\)"):
        fit(toy, config)
    assert not (tmp_path / "spoilt" / "checkpoints").exists()
    good = settings(tmp_path / "good", steps=6, save_every=1, keep_checkpoints=9)
    fit(Toy(good), good)
    before = checkpoint.load(good.run.out / "checkpoints" / "step-00000003")[0]["weights"]
    assert_same(before, {n: toy.get_parameter(n).detach() for n in TRAINED})


def test_under_a_scaler_what_is_not_finite_is_found_in_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under fp16, looked at every 5 steps only: no later step moves the weights."""

    class Scaling(Accelerator):
        def __init__(self, **told: Any) -> None:
            super().__init__(**told)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    monkeypatch.setattr(engine, "Accelerator", Scaling)
    config = settings(tmp_path / "spoilt", validate_every=100)
    config = config.model_copy(update={"run": config.run.model_copy(update={"log_every": 5})})
    toy = Spoilt(config, "loss")
    with pytest.raises(FloatingPointError, match=r"^step 3: .*\(sample 13\)"):
        fit(toy, config)
    good = settings(tmp_path / "good", save_every=1, keep_checkpoints=9)
    fit(Toy(good), good)
    before = checkpoint.load(good.run.out / "checkpoints" / "step-00000003")[0]["weights"]
    assert_same(before, {n: toy.get_parameter(n).detach() for n in TRAINED})


@pytest.mark.parametrize(("kind", "moments"), [("adamw", 6), ("muon", 4)])
def test_a_closed_guard_leaves_everything_as_it_was(kind: str, moments: int) -> None:
    """Weights, moments, the count of steps and the moving average; it opens no more by itself."""
    layer = nn.Linear(3, 2)
    trained = dict(layer.named_parameters())
    gradients, guard = Gradients(trained), Guard(torch.device("cpu"))
    optimiser, average = (
        build_optimiser(trained, OptimiserSettings.model_validate({"kind": kind})),
        MovingAverage(trained, 0.9),
    )

    def state() -> list[Tensor]:
        inner = [v for held in optimiser.state.values() for v in held.values()]
        return [t.detach().clone() for t in [*trained.values(), *average.average.values(), *inner]]

    states = []
    for step, value in enumerate([1.0, torch.nan, 1.0]):
        gradients.flat.fill_(value)
        guard.watch(step, torch.isfinite(gradients.clip(1.0)))
        leave_out(optimiser, guard.closed)
        optimiser.step()
        average.update(step + 1, guard.closed)
        states.append(state())
    assert guard.first_bad() == 1
    assert len(states[0]) == 2 + 2 + moments
    for later in states[1:]:
        assert all(torch.equal(a, b) for a, b in zip(states[0], later, strict=True))


class Full(Toy):
    """A toy whose memory holds two samples in training and no more."""

    error: Exception = torch.OutOfMemoryError("out of memory")

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The toy's losses."""
        if self.training and len(batch["x"]) > 2:
            raise self.error
        return super().forward(batch)


OUT_OF_MEMORY = {
    "accelerator": torch.OutOfMemoryError("CUDA out of memory"),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory:"
        " you tried to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "numpy": MemoryError("Unable to allocate 3.64 TiB for an array"),
}


def test_an_error_of_another_kind_is_no_lack_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Full, "error", RuntimeError("shapes do not match"), raising=False)
    config = settings(tmp_path, batch_size=8)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        fit(Full(config), config)


@pytest.mark.parametrize("where", OUT_OF_MEMORY)
def test_what_does_not_fit_is_done_in_more_pieces(
    where: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """8 samples in 4 pieces of 2: said, remembered, and the same bits as asked for so at once."""
    monkeypatch.setattr(Full, "error", OUT_OF_MEMORY[where], raising=False)
    asked = settings(tmp_path / "asked", batch_size=8, accumulation=4)
    found = settings(tmp_path / "found", batch_size=8, save_every=3)
    fit(Toy(asked), asked)
    with pytest.raises(Interrupted):
        fit(Full(found, stop_in(3, 8, signal.SIGTERM)), found)
    assert "going on with 4 at once and 2 pieces" in caplog.text
    assert "going on with 2 at once and 4 pieces" in caplog.text
    caplog.clear()
    fit(Full(found), found)
    assert "out of memory" not in caplog.text
    assert_same(exported(asked), exported(found))


def test_a_sample_that_never_fits_ends_in_one_line(tmp_path: Path) -> None:
    class Fuller(Toy):
        def forward(self, batch: Batch) -> dict[str, Tensor]:
            raise torch.OutOfMemoryError("out of memory")

    config = settings(tmp_path)
    with pytest.raises(UserError, match="out of memory with a single sample"):
        fit(Fuller(config), config)


def test_dropout_is_a_function_of_the_step(tmp_path: Path) -> None:
    """What the model itself draws comes again after a stop."""

    class Dropping(Toy):
        def forward(self, batch: Batch) -> dict[str, Tensor]:
            return super().forward({**batch, "x": nn.functional.dropout(batch["x"], 0.5)})

    whole, broken = settings(tmp_path / "whole"), settings(tmp_path / "broken")
    fit(Dropping(whole), whole)
    with pytest.raises(Interrupted):
        fit(Dropping(broken, stop_in(2, 4, signal.SIGINT)), broken)
    torch.rand(5)
    fit(Dropping(broken), broken)
    assert_same(exported(whole), exported(broken))
    plain = settings(tmp_path / "plain")
    fit(Toy(plain), plain)
    assert not torch.equal(exported(plain)["last.weight"], exported(whole)["last.weight"])


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    config = settings(tmp_path, batch_size=5, accumulation=2)
    with pytest.raises(UserError, match=r"run\.batch_size=5 .* 1 x 2"):
        fit(Toy(config), config)
    assert list(tmp_path.iterdir()) == []
