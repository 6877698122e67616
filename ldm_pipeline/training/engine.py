"""The one training loop: any objective, on as many processes as accelerate launches.

An objective is a module whose forward turns a batch into losses; the engine does the rest: batches
in the background, precision, accumulation over pieces, clipping, AdamW, the moving average of the
weights, logs, validation, checkpoints, resume and the end of the run.

Nothing here remembers where it was but the step. The batch of step k, its noise and the learning
rate are functions of (seed, k), so a run that was killed and started again by the same command goes
through the same updates, bit for bit on a CPU, and N processes share one global batch.
"""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ldm_pipeline.errors import UserError
from ldm_pipeline.training import checkpoint
from ldm_pipeline.training.config import OptimiserSettings, TrainingConfig, write_yaml

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]


@runtime_checkable
class Objective(Protocol):
    """What a training run optimises. Implementations are `torch.nn.Module`s.

    Parameters that require gradients are trained, the others are frozen and not saved.
    """

    def batch(self, positions: range) -> Batch:
        """The samples at these positions of the run's endless stream; no state, any process."""
        ...

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Scalar means over the batch; `loss` is minimised, the others are logged."""
        ...

    def validate(self) -> dict[str, float]:
        """Measures on samples that training never sees, with fixed noise."""
        ...

    def export(self, folder: Path) -> None:
        """Write the trained model (the moving average is in place) in Diffusers layout."""
        ...


class Interrupted(Exception):
    """The run was asked to stop; everything is saved, and the same command goes on."""


class _Steps(Dataset[Batch]):
    """The share of one process in every step's batch, so that a loader can prepare ahead."""

    def __init__(self, objective: Objective, batch_size: int, rank: int, world_size: int) -> None:
        self.objective, self.batch_size = objective, batch_size
        self.share = batch_size // world_size
        self.offset = rank * self.share

    def __getitem__(self, step: int) -> Batch:
        first = step * self.batch_size + self.offset
        return self.objective.batch(range(first, first + self.share))


class MovingAverage:
    """An exponential moving average of parameters, in float32, with a short memory at the start."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.parameters = parameters
        self.average = {name: p.detach().float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights after `step` updates."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = [p.detach().float() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), current, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The average stands in for the weights while the block runs."""
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(self.average[name])
            try:
                yield
            finally:
                for name, p in self.parameters.items():
                    p.copy_(kept[name])


def learning_rate(step: int, steps: int, settings: OptimiserSettings) -> float:
    """The rate of update `step` (from 0): linear warm-up, constant, linear cool-down to zero."""
    warm = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    left = steps - step
    cool = min(1.0, left / settings.cooldown_steps) if settings.cooldown_steps else 1.0
    return settings.lr * min(warm, cool)


def fit(objective: nn.Module, config: TrainingConfig) -> Path:
    """Train `objective` as `config` says and return the folder of the final model.

    The same call again resumes from the newest whole checkpoint; a finished run only exports.
    Raises UserError for settings that do not fit together, FloatingPointError before the update
    that a non-finite loss or gradient would have spoilt, and Interrupted after SIGINT or SIGTERM.
    """
    run = config.run
    accelerator = Accelerator(
        mixed_precision=run.mixed_precision, log_with="tensorboard", project_dir=run.out
    )
    pieces = accelerator.num_processes * run.accumulation
    if run.batch_size % pieces:
        raise UserError(
            f"run.batch_size={run.batch_size} must be a multiple of processes x accumulation, "
            f"{accelerator.num_processes} x {run.accumulation}"
        )
    if run.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("run.mixed_precision='fp16' needs a GPU; use bf16 or no on a CPU")
    set_seed(run.seed)
    assert isinstance(objective, Objective)
    trained = {n: p for n, p in objective.named_parameters() if p.requires_grad}
    optimiser = _adamw(list(trained.values()), config.optimiser)
    module, optimiser = accelerator.prepare(objective, optimiser)
    average = MovingAverage(trained, config.optimiser.ema_decay)
    checkpoints = run.out / "checkpoints"

    start = _resume(checkpoints, trained, average, optimiser)
    if accelerator.is_main_process:
        run.out.mkdir(parents=True, exist_ok=True)
        write_yaml(config, run.out / "config.yaml")
        accelerator.init_trackers("logs")
    forward = torch.compile(module) if run.compile else module
    steps = _Steps(objective, run.batch_size, accelerator.process_index, accelerator.num_processes)
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=range(start, run.steps),
        num_workers=run.workers if start < run.steps else 0,
        prefetch_factor=4 if run.workers and start < run.steps else None,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=_leave_signals_to_the_run,
    )
    bar = tqdm(
        loader,
        initial=start,
        total=run.steps,
        desc=run.out.name,
        unit="step",
        dynamic_ncols=True,
        disable=not accelerator.is_local_main_process,
    )

    def save(step: int) -> None:
        if accelerator.is_main_process:
            parts: dict[str, Mapping[str, Tensor]] = {
                "weights": trained,
                "average": average.average,
                "optimiser": _optimiser_tensors(optimiser, trained),
            }
            saved = checkpoint.save(checkpoints, step, parts, {"seed": run.seed})
            checkpoint.prune(checkpoints, run.keep_checkpoints, saved)
        accelerator.wait_for_everyone()

    def validate(step: int) -> None:
        if accelerator.is_main_process:
            objective.eval()
            with average.in_place() if config.optimiser.ema_decay else nullcontext():
                scores = objective.validate()
            objective.train()
            accelerator.log({f"validation/{k}": v for k, v in scores.items()}, step=step)
            shown = "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
            bar.write(f"step {step}: {shown}")
        accelerator.wait_for_everyone()

    objective.train()
    with _stop_on_signals() as stop:
        for step, batch in enumerate(bar, start=start):
            rate = learning_rate(step, run.steps, config.optimiser)
            for group in optimiser.param_groups:
                group["lr"] = rate
            batch = {name: value.to(accelerator.device) for name, value in batch.items()}
            measures: dict[str, Tensor] = {}
            for piece in range(run.accumulation):
                part = {name: value.chunk(run.accumulation)[piece] for name, value in batch.items()}
                last = piece == run.accumulation - 1
                with nullcontext() if last else accelerator.no_sync(module):
                    with accelerator.autocast():
                        losses = forward(part)
                    accelerator.backward(losses["loss"] / run.accumulation)
                for name, value in losses.items():
                    measures[name] = measures.get(name, 0) + value.detach() / run.accumulation
            norm = accelerator.clip_grad_norm_(trained.values(), config.optimiser.max_grad_norm)
            spoilt = not (math.isfinite(float(norm)) and math.isfinite(float(measures["loss"])))
            if spoilt and run.mixed_precision != "fp16":
                raise FloatingPointError(
                    f"step {step}: the gradient's norm is {float(norm)} (loss "
                    f"{float(measures['loss']):.4g}); nothing was updated. Lower optimiser.lr"
                )
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            done = step + 1
            if config.optimiser.ema_decay:
                average.update(done)
            if done % run.log_every == 0:
                values = {name: float(value) for name, value in measures.items()}
                accelerator.log({**values, "lr": rate, "grad_norm": float(norm)}, step=done)
                bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()})
            if done % run.validate_every == 0 or done == run.steps:
                validate(done)
            if _asked_to_stop(stop, accelerator, done % run.log_every == 0):
                save(done)
                accelerator.end_training()
                raise Interrupted(f"stopped at step {done}; the same command goes on from there")
            if done % run.save_every == 0 or done == run.steps:
                save(done)
    final = run.out / "final"
    if accelerator.is_main_process:
        objective.eval()
        with average.in_place() if config.optimiser.ema_decay else nullcontext():
            objective.export(final)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return final


def _adamw(parameters: list[nn.Parameter], settings: OptimiserSettings) -> torch.optim.AdamW:
    """AdamW in one fused kernel; weight decay on matrices and filters only, not on biases."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True
    )


def _optimiser_tensors(optimiser: Any, trained: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """AdamW's state as named tensors: `<parameter>|exp_avg` and so on."""
    return {
        f"{name}|{key}": value
        for name, parameter in trained.items()
        for key, value in optimiser.state.get(parameter, {}).items()
    }


def _resume(
    folder: Path,
    trained: Mapping[str, nn.Parameter],
    average: MovingAverage,
    optimiser: Any,
) -> int:
    """Put the newest whole checkpoint in place; the step to go on with, 0 where there is none."""
    newest = checkpoint.newest(folder)
    if newest is None:
        return 0
    parts, state = checkpoint.load(newest)
    if parts["weights"].keys() != trained.keys():
        raise UserError(f"{newest} holds another model; choose another run.out or remove it")
    with torch.no_grad():
        for name, parameter in trained.items():
            if parts["weights"][name].shape != parameter.shape:
                raise UserError(f"{newest} holds another model ({name} has another shape)")
            parameter.copy_(parts["weights"][name])
            average.average[name].copy_(parts["average"][name])
            prefix = f"{name}|"
            optimiser.state[parameter] = {
                key.removeprefix(prefix): value.to(parameter.device if value.ndim else "cpu")
                for key, value in parts["optimiser"].items()
                if key.startswith(prefix)
            }
    log.info("going on from %s", newest)
    return int(state["step"])


def _asked_to_stop(received: list[int], accelerator: Accelerator, may_wait: bool) -> bool:
    """Whether a signal came; several processes ask each other, but only where they `may_wait`,
    so that all stop after the same step and none waits for the others in vain."""
    if accelerator.num_processes == 1:
        return bool(received)
    if not may_wait:
        return False
    flag = torch.tensor(float(bool(received)), device=accelerator.device)
    return bool(accelerator.reduce(flag, reduction="sum") > 0)


def _leave_signals_to_the_run(worker: int) -> None:
    """A signal to the whole group must not end the workers: the step under way still needs them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _stop_on_signals() -> Iterator[list[int]]:
    """A list that SIGINT or SIGTERM fills; a second signal ends the process at once."""
    received: list[int] = []
    kept: dict[signal.Signals, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for known, handler in kept.items():
            signal.signal(known, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        kept[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
