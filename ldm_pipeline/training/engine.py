"""The one training loop: any objective, on as many processes as accelerate launches.

An objective is a module whose forward turns a batch into losses; the engine does the rest: batches
in the background, precision, accumulation over pieces, clipping, updates, the moving average of the
weights, logs, validation, checkpoints, resume and the end of the run.

Nothing here remembers where it was but the step. The batch of step k, its noise and the learning
rate are functions of (seed, k), so a run that was killed and started again by the same command goes
through the same updates, bit for bit on a CPU, and N processes share one global batch. With AdamW
nothing waits for the device either, but where something is logged, measured or saved; other
optimisers cannot leave a step out by themselves, and wait once a step to see that it is finite, as
every optimiser does under fp16.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from multiprocessing import get_all_start_methods
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ldm_pipeline.data.writing import NotWritten, in_one_line, settle_folder, write_folder, writing
from ldm_pipeline.errors import UserError
from ldm_pipeline.processes.ranks import Ranks, launched
from ldm_pipeline.too_large import ADVICE, in_memory, is_out_of_memory
from ldm_pipeline.training.clock import Clock
from ldm_pipeline.training.config import TrainingConfig, write_yaml
from ldm_pipeline.training.objective import (
    Batch,
    Compiling,
    DrawsPictures,
    Objective,
    Stoppable,
    named,
)
from ldm_pipeline.training.progress import Checkpoints, Progress
from ldm_pipeline.training.resuming import FILE_NAME, check_resume, say_what_changed
from ldm_pipeline.training.sharding import Shards, sharding
from ldm_pipeline.training.signals import leave_signals_to_the_run, stop_on_signals
from ldm_pipeline.training.start import compiled, compiles, precision, warn_of_accelerate
from ldm_pipeline.training.steps import Steps, seed_of
from ldm_pipeline.training.tracking import check_tracker, keep_picture, start_tracker
from ldm_pipeline.training.updates import (
    Gradients,
    Guard,
    build_optimiser,
    learning_rate,
    leave_out,
    moving_average,
    say_what_is_shortened,
    skips_on_the_device,
)

log = logging.getLogger(__name__)


SMALLER_UPDATE = (
    "optimiser.kind=adafactor keeps less, optimiser.ema_decay=0 keeps no copy; or train less"
)
"""What to do where the optimiser's own state does not fit."""


class Interrupted(Exception):
    """The run was asked to stop; everything is saved, and the same command goes on."""


def check(config: TrainingConfig) -> None:
    """Raise UserError where the settings do not fit together, the machine, the processes or what
    the run in their folder was begun with.

    Nothing is built to find out: whoever has data to encode first can ask before.
    """
    run, state = config.run, launched()
    if config.begin_from is not None and not config.begin_from.exists():
        raise UserError(f"begin_from={config.begin_from} is not there; name what was trained")
    check_resume(config)
    check_tracker(run.log_with)
    sharding(state)
    if run.batch_size % (state.num_processes * run.accumulation):
        raise UserError(
            f"run.batch_size={run.batch_size} must be a multiple of processes x accumulation, "
            f"{state.num_processes} x {run.accumulation}"
        )
    if run.mixed_precision == "fp16" and state.device.type == "cpu":
        raise UserError("run.mixed_precision='fp16' needs a GPU; use bf16 or no on a CPU")
    build_optimiser(
        {"one": nn.Parameter(torch.zeros(1))}, config.optimiser
    )  # is its library there?


def fit(objective: nn.Module, config: TrainingConfig) -> Path:
    """Train `objective` as `config` says and return the folder of the final model.

    The same call again resumes from the newest whole checkpoint, first with the validation that a
    stop left out; a finished run only exports. Raises UserError for settings that do not fit
    together or the memory, FloatingPointError for a loss or gradient that is not finite (nothing
    was updated from there on) or for such weights (which are not saved), NotWritten where the disk
    takes no more, and Interrupted after SIGINT or SIGTERM.
    """
    with in_memory("outside the gradients of a step"):
        run = _Run(objective, config)
        with stop_on_signals() as stop:
            run.train(stop)
        return run.finish()


class _Run:
    """One run: the parts that each step goes through."""

    def __init__(self, objective: nn.Module, config: TrainingConfig) -> None:
        assert isinstance(objective, Objective)
        run = config.run
        check(config)
        self.config, self.objective = config, objective
        mixed_precision = precision(run.mixed_precision)
        self.accelerator = Accelerator(mixed_precision=mixed_precision, project_dir=run.out)
        self.ranks = Ranks(self.accelerator.state)
        set_seed(run.seed)
        self.module = objective.to(self.accelerator.device)
        self.trained = {n: p for n, p in objective.named_parameters() if p.requires_grad}
        self.shards = Shards(objective, self.trained.values(), self.accelerator.state)
        self.ranks.start_alike(self.trained.values())
        self.gradients = Gradients(self.trained)
        self.guard = Guard(self.accelerator.device)
        optimiser = build_optimiser(self.trained, config.optimiser)
        self.optimiser: Any = self.accelerator.prepare_optimizer(optimiser)
        self.optimiser.train()
        self.average = moving_average(objective, self.trained, config.optimiser.ema_decay)
        self.checkpoints = Checkpoints(
            config, self.ranks, self.trained, self.optimiser, self.average, self.accelerator.scaler
        )
        self.forward = self._compiled() if run.compile and compiles() else self.module
        at = self.checkpoints.resume()
        self.done = self.logged = at.done
        self.accumulation, self.best, self.owed = at.pieces, at.best, at.owed
        if len(set(self.ranks.told(str(self.done)))) > 1:
            raise UserError(f"processes see different checkpoints in {run.out}; share that folder")
        self._by_the_first(self._begin)

    def _compiled(self) -> Any:
        """What computes the losses: the objective, compiled as a whole or as it knows best."""
        if not isinstance(self.objective, Compiling):
            return compiled(self.module)
        self.objective.compile_network()
        return self.module

    # -- the loop ----------------------------------------------------------------------------

    def train(self, stop: list[int]) -> None:
        """All steps that are left; raises what `fit` raises."""
        run = self.config.run
        if isinstance(self.objective, Stoppable):
            self.objective.heed(stop)
        self.module.train()
        since = torch.zeros(0)
        self.clock, first = Clock(), self.done
        with tqdm(
            initial=self.done,
            total=run.steps,
            desc=run.out.name,
            unit="step",
            dynamic_ncols=True,
            disable=not self.accelerator.is_local_main_process,
        ) as bar:
            if self.owed:
                self._validate(stop, bar)
                if self.owed:
                    self._interrupted()
            batches = self._batches()
            while self.done < run.steps:
                step = self.done
                fits = self._backward(step, next(batches))
                stopping, full = self.ranks.agree(bool(stop), not fits)
                if full:
                    self._halve()
                    batches = self._batches()
                    continue
                norm = self._update(step)
                self.done = done = step + 1
                since = self.gradients.measures + (since if since.numel() else 0)
                bar.update()
                logging_now, validating, saving = (
                    done % every == 0 or done == run.steps
                    for every in (run.log_every, run.validate_every, run.save_every)
                )
                if logging_now or validating or saving or stopping:
                    self._stop_if_spoilt()
                if logging_now:
                    self._log(since / (done - self.logged), norm, done - self.logged, bar)
                    since, self.logged = torch.zeros(0), done
                if validating and saving and not stopping:
                    self.owed = True  # should the validation fail, the steps before it are kept
                    self._save()
                if validating:
                    self._validate(stop, bar)
                stopping = stopping or self.owed
                if saving or stopping:
                    self._save()
                if stopping:
                    self._interrupted()
        if self.done > first and self.accelerator.is_main_process:
            log.info("%d steps in %s", self.done - first, self.clock)

    def _interrupted(self) -> NoReturn:
        """End where all is saved."""
        self.accelerator.end_training()
        raise Interrupted(f"stopped at step {self.done}; the same command goes on from there")

    def finish(self) -> Path:
        """Export the model, the moving average in place where there is one."""
        final = self.config.run.out / "final"
        self.module.eval()
        with self._averaged():
            self._by_the_first(lambda: write_folder(final, self._export))
        self.accelerator.end_training()
        return final

    # -- one step ----------------------------------------------------------------------------

    def _backward(self, step: int, pieces: Sequence[Batch]) -> bool:
        """The gradients of this process's share; False where it did not fit into the memory."""
        self.gradients.clear()
        try:
            for number, batch in enumerate(pieces, start=self.ranks.index * len(pieces)):
                torch.manual_seed(seed_of(self.config.run.seed, step, number))
                batch = send_to_device(batch, self.accelerator.device, non_blocking=True)
                with self.accelerator.autocast():
                    losses = self.forward(batch)
                loss = losses["loss"] / len(pieces)
                scaler = self.accelerator.scaler
                (loss if scaler is None else scaler.scale(loss)).backward()
                self.gradients.measure(losses, 1 / len(pieces))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.shards.out_of_memory()
            return False
        return True

    def _update(self, step: int) -> Tensor:
        """Average over the processes, clip, and move weights and average; the gradients' norm."""
        optimiser = self.config.optimiser
        self.ranks.average(self.gradients.buffer)
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(getattr(self.optimiser, "optimizer", self.optimiser))
        norm = self.gradients.clip(optimiser.max_grad_norm)
        finite = torch.isfinite(self.gradients.measures).all()
        if scaler is None:  # under fp16 an infinite gradient is common: the scaler leaves it out
            finite &= torch.isfinite(norm)
        self.guard.watch(step, finite)
        rate = learning_rate(step, self.config.run.steps, optimiser)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        if scaler is None and skips_on_the_device(self.optimiser):
            leave_out(self.optimiser, self.guard.closed)
        else:
            # Waits for the device at every step. A scaler does, too, but would leave out the one
            # step alone: later ones would move the weights.
            self._stop_if_spoilt()
        with in_memory("in an update", SMALLER_UPDATE):
            self.optimiser.step()
        if self.average is not None:
            self.average.update(step + 1, self.guard.closed)
        return norm

    def _halve(self) -> None:
        """Go on with pieces of half the size: the batch of an update stays what it was."""
        piece = self._steps().piece
        if piece == 1:
            raise UserError(f"out of memory with a single sample: {ADVICE}")
        parts = next(n for n in range(2, piece + 1) if piece % n == 0)
        self.accumulation *= parts
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self.accelerator.is_main_process:
            log.warning(
                "out of memory with %d samples at once: going on with %d at once and %d pieces a "
                "process; an update is still made of %d samples",
                piece,
                piece // parts,
                self.accumulation,
                self.config.run.batch_size,
            )

    def _stop_if_spoilt(self) -> None:
        """Raise where a step since the last look was not finite; names the samples to blame."""
        bad = self.guard.first_bad()
        if bad is None:
            return
        blamed = self.ranks.told(", ".join(self._culprits(bad)))
        where = f" ({', '.join(blamed)})" if blamed else ""
        raise FloatingPointError(
            f"step {bad}: the loss or a gradient is not finite{where}; nothing was updated from "
            "there on. Lower optimiser.lr, or look at the sample"
        )

    def _culprits(self, step: int) -> list[str]:
        """Which of this process's samples of `step` have a loss or gradient that is not finite."""
        found = []
        for position in (p for piece in self._steps().positions(step) for p in piece):
            self._backward(step, [self.objective.batch(range(position, position + 1))])
            fp16 = self.accelerator.scaler is not None  # where scaled gradients may be infinite
            looked_at = self.gradients.measures if fp16 else self.gradients.buffer
            if not torch.isfinite(looked_at).all():
                found.append(named(self.objective, position))
        return found

    # -- around the steps --------------------------------------------------------------------

    def _steps(self) -> Steps:
        return Steps(self.objective, self.config.run.batch_size, self.ranks, self.accumulation)

    def _batches(self) -> Iterator[list[Batch]]:
        """The pieces of every step from here on, prepared ahead by workers if there are any."""
        run = self.config.run
        if self.done >= run.steps:
            return iter(())
        # A worker takes the objective along as it is, with its open caches: only a fork can.
        workers = run.workers if "fork" in get_all_start_methods() else 0
        return iter(
            DataLoader(
                self._steps(),
                batch_size=None,
                sampler=range(self.done, run.steps),
                num_workers=workers,
                prefetch_factor=4 if workers else None,
                multiprocessing_context="fork" if workers else None,
                pin_memory=self.accelerator.device.type == "cuda",
                worker_init_fn=leave_signals_to_the_run,
            )
        )

    def _log(self, means: Tensor, norm: Tensor, steps: int, bar: Any) -> None:
        """Write the means of the last `steps`; the first thing in many steps that waits."""
        if not self.accelerator.is_main_process:
            return
        values = dict(zip(self.gradients.names, means.tolist(), strict=True))
        rate = self.optimiser.param_groups[0]["lr"]
        told = {"lr": rate, "grad_norm": float(norm)}
        # Asked last: what is above waited for the device to be done with all of the steps.
        told["samples_per_second"] = speed = self.clock.speed(steps * self.config.run.batch_size)
        self.accelerator.log({**values, **told}, step=self.done)
        bar.set_postfix({**{k: f"{v:.4g}" for k, v in values.items()}, "img/s": f"{speed:.3g}"})

    def _validate(self, stop: list[int], bar: Any) -> None:
        """Measure what is trained; owed instead where the run is to stop, before or meanwhile."""
        self.owed = self._to_stop(stop)
        if self.owed:
            return
        self.module.eval()
        with self.clock.apart(), in_memory("in a validation"), self._averaged():
            scores = self.objective.validate()
            self.owed = self._to_stop(stop)  # a stop may have cut it short; pictures take long
            if not self.owed:
                self._by_the_first(lambda: self._keep(scores, bar))
        self.module.train()

    def _to_stop(self, stop: list[int]) -> bool:
        """Whether any process was asked to stop."""
        return self.ranks.agree(bool(stop))[0]

    def _keep(self, scores: Mapping[str, float], bar: Any) -> None:
        """Log and show what a validation said, and the model if it is the best so far."""
        self.accelerator.log({f"validation/{k}": v for k, v in scores.items()}, step=self.done)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
        bar.write(f"step {self.done}: {shown}" if shown else f"step {self.done}")
        self._show()
        if scores.get("loss", math.inf) < self.best:
            write_folder(self.config.run.out / "best", self._export)
            self.best = scores["loss"]

    def _export(self, folder: Path) -> None:
        self.objective.export(folder, self.done)

    def _show(self) -> None:
        """Keep the picture that the objective draws, as a file and where the run is logged."""
        picture = self.objective.picture() if isinstance(self.objective, DrawsPictures) else None
        if picture is not None:
            trackers = self.accelerator.trackers
            keep_picture(picture, self.config.run.out / "pictures", self.done, trackers)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Within the block the weights are the averaged ones, whoever averages them, and whole."""
        averaged = nullcontext() if self.average is None else self.average.in_place()
        with averaged, self.shards.whole():
            self.optimiser.eval()  # schedule-free optimisers average by themselves
            yield
            self.optimiser.train()

    def _begin(self) -> None:
        """Open the run's folder, with the configuration and the log."""
        run = self.config.run
        run.out.mkdir(parents=True, exist_ok=True)
        path, unfinished = run.out / FILE_NAME, run.out / f".{FILE_NAME}.unfinished"
        if self.done:
            say_what_changed(self.config)
        say_what_is_shortened(run.steps, self.config.optimiser)
        warn_of_accelerate(run)
        for name in ("best", "final"):
            settle_folder(run.out / name)
        with writing(path, unfinished):
            write_yaml(self.config, unfinished)
            unfinished.replace(path)
        self.accelerator.trackers = start_tracker(self.config)

    def _by_the_first(self, write: Callable[[], object]) -> None:
        """Let the main process write, and wait for it; where it cannot, every process raises."""
        error: Exception | None = None
        if self.accelerator.is_main_process:
            try:
                with in_memory("while pictures were drawn or a model was written"):
                    write()
            except (OSError, UserError) as caught:
                error = caught
        told = self.ranks.told("" if error is None else in_one_line(error))
        if error is not None:
            raise error
        if told:
            raise NotWritten(told[0])

    def _save(self) -> None:
        """Write a checkpoint, unless there is something in it that no run could go on with."""
        if not self.checkpoints.finite():
            raise FloatingPointError(
                f"after {self.done} updates the weights are not finite: they are not saved, and "
                "older checkpoints stay. Lower optimiser.lr"
            )
        at = Progress(self.done, self.accumulation, self.best, self.owed)
        self._by_the_first(lambda: self.checkpoints.save(at))
