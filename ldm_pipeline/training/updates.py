"""What an update is: gradients in one buffer, an optimiser, the moving average, and a guard.

Legend
    trained    name -> parameter, float32; everything that a run changes
    finite     whether loss and gradients of a step can be used, a 0-d bool tensor on the device

Nothing here waits for the device: the guard lets the device itself leave an update out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ldm_pipeline.errors import UserError
from ldm_pipeline.training.config import OptimiserSettings
from ldm_pipeline.training.muon import Muon
from ldm_pipeline.training.objective import Averaging

log = logging.getLogger(__name__)

MOST_MEASURES = 16

NOT_STATE = ("params", "param_names", "lr", "weight_decay", "betas", "eps")
"""What of a group of parameters the configuration says, whatever a checkpoint was made with."""


def learning_rate(step: int, steps: int, settings: OptimiserSettings) -> float:
    """The rate of update `step` (from 0): linear warm-up, constant, linear cool-down to zero."""
    warmup, cooldown = ramps(steps, settings)
    warm = min(1.0, (step + 1) / warmup) if warmup else 1.0
    cool = min(1.0, (steps - step) / cooldown) if cooldown else 1.0
    return settings.lr * min(warm, cool)


def ramps(steps: int, settings: OptimiserSettings) -> tuple[int, int]:
    """The steps of warm-up and of cool-down in a run of `steps`: in proportion fewer than are asked
    for where both do not fit, or the rate would never be the one that is asked for."""
    warmup, cooldown = settings.warmup_steps, settings.cooldown_steps
    if warmup + cooldown <= steps:
        return warmup, cooldown
    warmup = round(steps * warmup / (warmup + cooldown))
    return warmup, steps - warmup


def say_what_is_shortened(steps: int, settings: OptimiserSettings) -> None:
    """Tell in one line where warm-up and cool-down are not as long as is asked for."""
    asked, fitting = (settings.warmup_steps, settings.cooldown_steps), ramps(steps, settings)
    if fitting != asked:
        told = "optimiser.warmup_steps=%d and cooldown_steps=%d are %d and %d in run.steps=%d"
        log.info(told, *asked, *fitting, steps)


def build_optimiser(
    trained: Mapping[str, nn.Parameter], settings: OptimiserSettings
) -> torch.optim.Optimizer:
    """The optimiser that `settings` name; weight decay on matrices and filters, not on biases.

    AdamW is one fused kernel. Raises `UserError` where the library of another kind is missing, and
    for settings that a kind has no use for.
    """
    matrices = {name: p for name, p in trained.items() if p.ndim > 1}
    groups: list[dict[str, Any]] = [
        {"params": list(matrices.values()), "weight_decay": settings.weight_decay},
        {"params": [p for p in trained.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    lr, betas, eps = settings.lr, settings.betas, settings.eps
    if settings.kind == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    if settings.kind == "muon":
        tables = {id(p) for name, p in matrices.items() if "embedding" in name}
        return Muon(groups, lr=lr, betas=betas, eps=eps, tables=tables)
    if settings.kind == "adafactor":
        for name in ("betas", "eps"):
            default, asked = OptimiserSettings.model_fields[name].default, getattr(settings, name)
            if asked != default:  # config.yaml, too, names the defaults
                told = list(asked) if isinstance(asked, tuple) else asked
                raise UserError(
                    f"optimiser.{name}={told} has no meaning with optimiser.kind=adafactor, which "
                    "has its own; leave it out"
                )
        return torch.optim.Adafactor(groups, lr=lr)
    try:
        if settings.kind == "prodigy":
            from prodigyopt import Prodigy

            return Prodigy(groups, lr=lr, betas=betas, eps=eps)
        if settings.kind == "schedulefree":
            from schedulefree import AdamWScheduleFree

            return AdamWScheduleFree(groups, lr=lr, betas=betas, eps=eps)
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, lr=lr, betas=betas, eps=eps)
    except ImportError as error:
        raise UserError(
            f"optimiser.kind={settings.kind!r} needs pip install 'ldm-pipeline[optimisers]'"
            f" ({error})"
        ) from error


def optimiser_state(
    optimiser: Any, trained: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state: tensors as `<parameter>|exp_avg` and so on, and all other values, those
    of its groups too, as JSON takes them."""
    tensors: dict[str, Tensor] = {}
    others: dict[str, Any] = {"parameters": {}, "groups": []}
    for name, parameter in trained.items():
        for key, value in optimiser.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}|{key}"] = value
            else:
                others["parameters"][f"{name}|{key}"] = value
    for group in optimiser.param_groups:
        plain = {k: v for k, v in group.items() if k not in NOT_STATE}
        others["groups"].append(
            {k: v.item() if isinstance(v, Tensor) else v for k, v in plain.items()}
        )
    return tensors, others


def restore_optimiser(
    optimiser: Any,
    trained: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    others: Mapping[str, Any],
) -> None:
    """Put back what `optimiser_state` gave."""
    found: dict[str, dict[str, Any]] = {name: {} for name in trained}
    for full, value in [*tensors.items(), *others.get("parameters", {}).items()]:
        name, _, key = full.rpartition("|")
        moved = value.to(trained[name].device) if isinstance(value, Tensor) else value
        found[name][key] = moved
    for name, parameter in trained.items():
        if found[name]:
            optimiser.state[parameter] = found[name]
    for group, values in zip(optimiser.param_groups, others.get("groups", []), strict=False):
        group.update({k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def skips_on_the_device(optimiser: Any) -> bool:
    """Whether an optimiser can leave a step out by itself; see `leave_out`."""
    inner = getattr(optimiser, "optimizer", optimiser)  # accelerate's wrapper holds torch's
    return isinstance(inner, (torch.optim.AdamW, Muon))


class Gradients:
    """All gradients and the measures of a step in one flat float32 buffer.

    The parameters' `.grad` are views of it, so that clipping is one norm, clearing one fill, and
    processes exchange everything in one collective.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter]) -> None:
        odd = [name for name, p in trained.items() if p.dtype != torch.float32]
        assert not odd, f"trained weights are float32 masters; not so: {', '.join(odd)}"
        parameters = list(trained.values())
        size = sum(p.numel() for p in parameters)
        self.names: list[str] = []
        self.buffer = torch.zeros(size + MOST_MEASURES, device=parameters[0].device)
        self.flat, self._measures = self.buffer.split([size, MOST_MEASURES])
        pieces = self.flat.split([p.numel() for p in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)

    def clear(self) -> None:
        """All zeros again."""
        self.buffer.zero_()

    def measure(self, values: Mapping[str, Tensor], share: float) -> None:
        """Add `share` of a piece's measures to those of the step."""
        self.names = list(values)
        assert len(self.names) <= MOST_MEASURES, f"more than {MOST_MEASURES} measures"
        stacked = torch.stack([value.detach().float() for value in values.values()])
        self._measures[: len(self.names)] += share * stacked

    @property
    def measures(self) -> Tensor:
        """The measures of the step, [len(names)], where they are computed."""
        return self._measures[: len(self.names)]

    def clip(self, most: float) -> Tensor:
        """Scale the gradients to a norm of at most `most`; their norm before, a 0-d tensor."""
        norm = torch.linalg.vector_norm(self.flat)
        self.flat.mul_((most / norm).clamp(max=1.0))
        return norm


class Guard:
    """Keeps what is not finite from the weights, without waiting for the device.

    From the first bad step on every update is left out on the device, until somebody asks
    `first_bad()`: then weights, optimiser and average are still those before that step.
    """

    def __init__(self, device: torch.device) -> None:
        self._first_bad = torch.full((), -1, device=device)

    def watch(self, step: int, finite: Tensor) -> None:
        """Note `step` if it is not finite and none was noted before."""
        first = (self._first_bad < 0) & ~finite
        self._first_bad = torch.where(first, step, self._first_bad)

    @property
    def closed(self) -> Tensor:
        """1.0 where updates are left out, else 0.0; a 0-d float32 tensor."""
        return (self._first_bad >= 0).float()

    def first_bad(self) -> int | None:
        """The first step that was not finite; this waits for the device."""
        step = int(self._first_bad)
        return step if step >= 0 else None


def leave_out(optimiser: Any, closed: Tensor) -> None:
    """Tell a fused optimiser to leave its next step out, on the device, where `closed` is 1.

    Fused optimisers read `found_inf` for this: torch's own way to skip an update under fp16.
    """
    inner = getattr(optimiser, "optimizer", optimiser)  # accelerate's wrapper holds torch's
    inner.found_inf = closed
    inner.grad_scale = None


class MovingAverage:
    """An exponential moving average of parameters, in float32, with a short memory at the start."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.parameters = parameters
        self.average = {name: p.detach().float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int, closed: Tensor | float = 0.0) -> None:
        """Move towards the weights after `step` updates, unless `closed` is 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages = list(self.average.values())
        change = torch._foreach_sub([p.detach() for p in self.parameters.values()], averages)
        torch._foreach_mul_(change, (1 - decay) * (1 - closed))
        torch._foreach_add_(averages, change)

    @torch.no_grad()
    def go_on(self, saved: Mapping[str, Tensor] | None) -> None:
        """Put the `saved` average in place; without one, begin anew from the weights as they are.

        To be called before the first `update`, with tensors on the CPU. What is still the weights
        that the run began with is no average: earlier versions saved that of runs without one.
        """
        if saved is not None:
            began = {name: value.cpu() for name, value in self.average.items()}
            if all(torch.equal(value, saved[name]) for name, value in began.items()):
                saved = None
        for name, parameter in self.parameters.items():
            self.average[name].copy_(parameter if saved is None else saved[name])

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


def moving_average(
    objective: nn.Module, trained: Mapping[str, nn.Parameter], decay: float
) -> MovingAverage | None:
    """The moving average of what is trained, which the objective is shown if it looks at it.

    None where `decay` is 0: it would cost a copy of the weights, and be what they were at first.
    """
    if not decay:
        return None
    average = MovingAverage(trained, decay)
    if isinstance(objective, Averaging):
        objective.take_average(average)
    return average
