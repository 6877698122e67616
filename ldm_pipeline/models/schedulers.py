"""Stock diffusers schedulers behind the core's Sampler protocol.

A stock scheduler keeps its run's state on itself, works out for itself where a step ends, and keeps
x in a scale of its own. Here every course owns a copy of the scheduler, follows its timesteps one
by one, and hands it the network's own output, so that the latents are those of a stock pipeline,
bit for bit. The copy makes runs independent: one pipeline serves any number of threads.

Legend
    t, s     the level a step starts from and the level it ends on, in timesteps
    order    how many of the scheduler's timesteps make one step (2 for Heun)
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any

import torch
from torch import Tensor

from ldm_pipeline.diffusion.course import Course, share
from ldm_pipeline.diffusion.denoiser import Denoiser
from ldm_pipeline.diffusion.noise import Noise
from ldm_pipeline.diffusion.schedule import CLEAN, Schedule
from ldm_pipeline.errors import UserError, choose

STOCK_SCHEDULERS: dict[str, str] = {
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
    "deis": "DEISMultistepScheduler",
    "kdpm2": "KDPM2DiscreteScheduler",
    "kdpm2_a": "KDPM2AncestralDiscreteScheduler",
    "dpmpp_2s": "DPMSolverSinglestepScheduler",
    "dpmpp_2m_sde": "DPMSolverMultistepScheduler",
    "tcd": "TCDScheduler",
}
"""Samplers offered by name through this adapter, and the stock class that does the work.

LMS is not among them: its stock class needs scipy. Where scipy is installed, a model's own LMS
scheduler runs through `StockSampler` like any other.
"""

STOCK_OPTIONS: dict[str, dict[str, Any]] = {
    "dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++"},
    "dpmpp_2s": {"lower_order_final": True},  # what it needs to end without noise
    "pndm": {"skip_prk_steps": True},  # as Stable Diffusion runs it; else it needs 4 steps or more
}
"""What a name means beyond its class: entries of the scheduler's config."""


def stock_sampler(name: str, config: Mapping[str, Any], eta: float | None = None) -> StockSampler:
    """The sampler called `name` (a key of STOCK_SCHEDULERS) over the schedule of `config`.

    `config` is that of any stock scheduler of the Stable Diffusion family. Raises UserError for an
    unknown name.
    """
    choose("sampler", name, STOCK_SCHEDULERS)
    told = json.dumps(dict(config), default=lambda array: array.tolist())
    return StockSampler(_stock_scheduler(name, told), eta=eta)


@lru_cache(maxsize=16)
def _stock_scheduler(name: str, config: str) -> Any:
    """One scheduler for all draws, none of which changes it: KDPM2's takes 0.3 s to make."""
    import diffusers

    made_by = getattr(diffusers, STOCK_SCHEDULERS[name])
    return made_by.from_config(json.loads(config), **STOCK_OPTIONS.get(name, {}))


def scheduler_class(name: object, place: object) -> Any:
    """The scheduler of diffusers called `name`, which `place` asks for; `UserError` for no such."""
    import diffusers

    kind = getattr(diffusers, str(name), None)
    if not isinstance(kind, type) or not issubclass(kind, diffusers.SchedulerMixin):
        raise UserError(
            f"{place} names the scheduler {name}, which this version of diffusers has not; put"
            " another of its schedulers there, such as DDIMScheduler"
        )
    return kind


@dataclass(frozen=True, eq=False)
class StockSampler:
    """Any stock scheduler of the Stable Diffusion family as a Sampler; it is copied, never changed.

    timesteps, sigmas  custom levels, at most one of the two, where the scheduler takes them; they
                       then decide the number of steps
    eta                share of fresh noise, for schedulers whose step takes it; None is their own

    Raises UserError for schedulers that cannot draw one image from one generator (those on a
    Brownian tree), for flow-matching ones, whose levels are not those of a noise schedule, and for
    those whose step asks for more than the network's answer, the level and x. Where a scheduler
    cannot put noise into a picture, a course's `noisy` raises it.
    """

    scheduler: Any
    timesteps: tuple[int, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    eta: float | None = None

    def __post_init__(self) -> None:
        name = type(self.scheduler).__name__
        if hasattr(self.scheduler, "noise_sampler"):
            raise UserError(
                f"{name} draws its noise outside the generators and never twice the same; use "
                "sampler='dpmpp_2m_sde' instead"
            )
        if name.startswith("FlowMatch"):
            raise UserError(f"{name} is for flow-matching models, not for Stable Diffusion")
        if not _steps_alone(self.scheduler):
            raise UserError(
                f"{name} does not step from the UNet's answer alone, as Stable Diffusion's do; take"
                " another, as DDIMScheduler, or name a sampler, as sampler='ddim'"
            )
        if self.timesteps is not None and self.sigmas is not None:
            raise UserError("pass either timesteps or sigmas, not both")

    def course(
        self, schedule: Schedule, n: int, strength: float = 1.0, exact: bool = False
    ) -> Course:
        """A fresh course of n steps; below strength 1, of its last part, as stock image-to-image.

        `times` are the scheduler's own timesteps, so there are more than n of them where a step
        evaluates the network more than once. `schedule` is not asked: the scheduler has its own.
        """
        own = deepcopy(self.scheduler)
        begin = self._set(own, n, strength, exact) * getattr(own, "order", 1)
        if hasattr(own, "set_begin_index"):
            own.set_begin_index(begin)
        steps = own.timesteps[begin:]
        times = (*(float(t) for t in steps), CLEAN)
        accepted = inspect.signature(own.step).parameters
        place = count()

        def step(denoiser: Denoiser, x: Tensor, t: float, s: float, noise: Noise) -> Tensor:
            timestep = steps[next(place)]
            assert float(timestep) == t, "a stock scheduler's timesteps must be taken in order"
            scaled = own.scale_model_input(x, timestep)
            chosen: dict[str, Any] = {}
            if "generator" in accepted:
                chosen["generator"] = list(noise.generators)
            if "eta" in accepted and self.eta is not None:
                chosen["eta"] = self.eta
            output = denoiser(scaled, t).output
            try:
                after: Tensor = own.step(output, timestep, x, return_dict=False, **chosen)[0]
            except IndexError as error:
                known = len(getattr(own, "betas", ()))
                if known >= own.config.num_train_timesteps:
                    raise
                raise UserError(
                    f"{type(own).__name__} has no level {t:g}: its config's trained_betas are"
                    f" {known}, and its num_train_timesteps {own.config.num_train_timesteps}"
                ) from error
            return after

        def first(noise: Tensor) -> Tensor:
            return noise * own.init_noise_sigma

        def noisy(z: Tensor, noise: Tensor, t: float) -> Tensor:
            if t == CLEAN:
                return z
            if not hasattr(own, "add_noise"):
                raise UserError(
                    f"{type(own).__name__} cannot put noise into a picture; take another scheduler,"
                    " as DDIMScheduler, or name a sampler, as sampler='ddim'"
                )
            level = torch.tensor([t], dtype=own.timesteps.dtype)
            started: Tensor = own.add_noise(z, noise, level.repeat(z.shape[0]))
            return started

        def skip(k: int) -> None:
            for _ in range(k):
                next(place)
            if hasattr(own, "set_begin_index"):
                own.set_begin_index(begin + k)

        return Course(times, step, first, noisy, skip, getattr(own, "order", 1), own)

    def _set(self, own: Any, n: int, strength: float, exact: bool) -> int:
        """Set the copy's timesteps; how many of the steps that they make are left out."""
        accepted = inspect.signature(own.set_timesteps).parameters
        most = own.config.get("original_inference_steps", own.config.num_train_timesteps)
        total, first = share(n, strength, most, exact)
        levels = own.config.num_train_timesteps
        if self.timesteps is None and self.sigmas is None and total > levels:
            raise UserError(f"num_inference_steps={n} must lie between 1 and {levels}")
        custom = self.timesteps or ()
        if any(not 0 <= t < levels or t != int(t) for t in custom):
            raise UserError(
                f"timesteps={list(custom)} must be whole numbers from 0 to {levels - 1}, descending"
            )
        chosen: dict[str, Any] = {"num_inference_steps": total}
        if self.timesteps is not None:
            chosen = {"timesteps": list(self.timesteps)}
        elif self.sigmas is not None:
            chosen = {"sigmas": list(self.sigmas)}
        name = type(own).__name__
        for key in chosen:
            if key not in accepted:
                raise UserError(
                    f"{name} takes no custom {key}; pass num_inference_steps instead, or a sampler"
                    " that takes them, such as sampler='euler'"
                )
        try:
            own.set_timesteps(**chosen)
        except ValueError as error:
            raise UserError(f"{name}: {' '.join(str(error).split())}") from error
        if "num_inference_steps" in chosen:
            return first
        made = len(own.timesteps)
        return share(made, strength, made, exact)[1]


def _steps_alone(scheduler: Any) -> bool:
    """Whether a scheduler's step asks for nothing but the network's output, the level and x."""
    step = getattr(scheduler, "step", None)
    if step is None:
        return False
    parameters = inspect.signature(step).parameters.values()
    return sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters) <= 3
