"""LCM distillation (2310.04378, 2311.05556): a LoRA with which few steps do.

One frozen base is both: with the adapter it is the student, without it the teacher. The target is
self-consistent: it is what the student itself says, a step or several of the teacher's further
down.

Legend
    x, x_s   noisy latents at levels t and s, [n, C, h, w]; the guided teacher leads from one to
             the other, by the levels of `down` [n, steps], whose last is s
    w        guidance strength of each sample [n], guidance_scale - 1
    f        the student's consistency function, see `diffusion.consistency`
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import LCMScheduler
from PIL.Image import Image
from pydantic import Field, model_validator
from torch import Tensor

from ldm_pipeline.diffusion.consistency import (
    SOLVERS,
    ConsistencyFunction,
    consistency_errors,
    consistency_function,
    descend,
    descents,
    guided_each,
)
from ldm_pipeline.diffusion.denoiser import make_denoiser
from ldm_pipeline.diffusion.grids import consistency_grid
from ldm_pipeline.diffusion.schedule import Schedule
from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.files import FILE_NAME
from ldm_pipeline.lora.notes import LcmNote
from ldm_pipeline.training.adapter_config import AdapterConfig, AdapterSettings, PictureSettings
from ldm_pipeline.training.adapting import AdapterObjective, OpenModel, Pictures
from ldm_pipeline.training.captioned import Captioned, CaptionedSettings, Sample
from ldm_pipeline.training.config import NonNegativeFloat, Positive, PositiveFloat, Settings
from ldm_pipeline.training.levels import levels_of
from ldm_pipeline.training.pixels import PixelSettings, Quarters, a_corner, quarter
from ldm_pipeline.training.start import precision
from ldm_pipeline.training.updates import MovingAverage
from ldm_pipeline.training.world_data import CachedWorldSettings
from ldm_pipeline.training.world_pictures import WorldPictures

MOST_LEVELS = 1000
"""All levels of Stable Diffusion, and of whatever was made from it; the model's are looked at, too,
when it is open."""


class DistillationSettings(Settings):
    """What the student learns of the teacher; see `diffusion.consistency`."""

    original_steps: Annotated[Positive, Field(le=MOST_LEVELS)] = Field(
        default=50, description="levels that the student knows"
    )
    spacing: Literal["even", "angle"] = Field(
        default="even",
        description="of these levels: even timesteps, as LCM-LoRAs have them, which suit Stable "
        "Diffusion's schedule; or equal steps of arctan(sigma / alpha), which suit any",
    )
    stride: Positive = Field(
        default=1, description="levels that a step of the teacher goes down (2310.04378, alg. 1, k)"
    )
    teacher_steps: Annotated[Positive, Field(le=MOST_LEVELS)] = Field(
        default=1,
        description="of the teacher before the student is asked; more of them make noisy levels "
        "depend less on what the student knows so far, and cost two calls each",
    )
    towards_noise: Annotated[float, Field(ge=0, le=10)] = Field(
        default=0.0,
        description="0 draws all levels equally often; with 2, 7 of 8 samples come from the "
        "noisier half (1 - 2^-(1 + value)): the first of few steps decides what is where",
    )
    own_pictures: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0,
        description="share of samples in which the data's picture makes way for what the student "
        "draws of the same words in two leaps from noise: later steps are drawn from such, "
        "mistakes included, and so the teacher shows how to mend them (2405.05224, section 3.1)",
    )
    timestep_scaling: PositiveFloat = Field(default=10.0, description="of the boundary condition")
    w: tuple[NonNegativeFloat, NonNegativeFloat] = Field(
        default=(5.0, 15.0), description="the teacher's guidance_scale - 1, drawn between these"
    )
    solver: Literal["ddim", "heun"] = Field(default="ddim", description="heun costs a call more")
    huber: PositiveFloat | None = Field(default=0.001, description="null: squared errors")
    units: Literal["latents", "noise"] = Field(
        default="noise",
        description="of what errors are measured in: noise divides them by their level's, or the "
        "little noise that the first levels have is left in the pictures",
    )
    target: Literal["student", "average"] = Field(
        default="student", description="whose word is the target; average: optimiser.ema_decay's"
    )
    full: bool = Field(
        default=False, description="train a whole UNet that hears w, and no adapter (lora.*)"
    )
    w_channels: Positive = Field(default=256, description="in which a full one hears w")
    pixels: PixelSettings = PixelSettings()

    def kept_on_resume(self) -> Collection[str]:
        """The student knows these levels, by this boundary condition, and hears w so or not."""
        return ("original_steps", "spacing", "timestep_scaling", "full", "w_channels")

    @model_validator(mode="after")
    def _fits(self) -> DistillationSettings:
        if self.w[0] > self.w[1]:
            raise ValueError(f"w={list(self.w)} must rise")
        if self.w_channels < 4:
            raise ValueError(f"w_channels={self.w_channels} must be at least 4")
        return self


class FewStepPictureSettings(PictureSettings):
    """`steps` and `guidance` are the teacher's; the student draws in `few` steps without."""

    few: Positive = 4


class LcmConfig(AdapterConfig):
    """Everything that `train/train_lcm.py` reads."""

    data: CaptionedSettings | None = Field(default=None, description="captioned pictures, or …")
    world: CachedWorldSettings | None = Field(default=None, description="… the picture world")
    lcm: DistillationSettings = DistillationSettings()
    pictures: FewStepPictureSettings = FewStepPictureSettings()

    @model_validator(mode="after")
    def _has_pictures(self) -> LcmConfig:
        if (self.data is None) == (self.world is None):
            raise ValueError("set data (captioned pictures) or world (the picture world), not both")
        if self.lcm.target == "average" and not self.optimiser.ema_decay:
            raise ValueError("lcm.target=average needs optimiser.ema_decay, as 0.95")
        if self.pictures.prompts and self.pictures.few > self.lcm.original_steps:
            raise ValueError(
                f"pictures.few={self.pictures.few} must be at most"
                f" lcm.original_steps={self.lcm.original_steps}, the levels that a student knows"
            )
        if self.lcm.full and self.lora != AdapterSettings():
            raise ValueError("lcm.full=true trains a whole UNet, no adapter; leave lora out")
        if self.lcm.full and self.lcm.spacing != "even":
            raise ValueError(
                "lcm.full=true goes with lcm.spacing=even: the scheduler of a whole LCM, as stock"
                " diffusers writes it, tells of no other"
            )
        return self

    def read(self) -> Pictures:
        """The pictures to distil on."""
        order = self.run.seed, self.run.batch_size, precision(self.run.mixed_precision)
        if self.data is not None:
            return Captioned(self.data, *order)
        assert self.world is not None
        return WorldPictures(self.world, *order)


class LcmObjective(AdapterObjective):
    """Say of neighbouring points of the teacher's path that they end in the same picture."""

    config: LcmConfig

    def __init__(self, config: LcmConfig, open_model: OpenModel) -> None:
        self.shown: Quarters | None = None

        def opened(model: str, dtype: torch.dtype) -> Any:
            """The model, whose levels are looked at before its pictures are encoded."""
            pipe = open_model(model, dtype)
            self.descents = _descents(config.lcm, levels_of(pipe, zero_terminal=False)[1])
            if config.lcm.pixels.weight:
                self.shown = Quarters(config.lcm.pixels, pipe.unet, model == "bundled")
            return pipe

        super().__init__(config, opened, config.read())
        self.silence = self._spoken([""])
        self._average: MovingAverage | None = None

    def take_average(self, average: MovingAverage) -> None:
        """The moving average of what is trained, which may say the target."""
        if self.config.lcm.target == "average":
            self._average = average

    def _drawn(
        self, sample: Sample, position: int, share: float | None = None
    ) -> dict[str, Tensor]:
        """The same, and the noise of the student's own picture, if there are to be any."""
        drawn = super()._drawn(sample, position, share)
        if self.config.lcm.own_pictures and share is None:
            rng = np.random.default_rng([self.config.run.seed, 9, position % 2**63])
            generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
            drawn["own"] = torch.tensor(rng.random() < self.config.lcm.own_pictures)
            drawn["leaps"] = torch.randn((2, *drawn["z"].shape), generator=generator)
        return drawn

    def _level(self, rng: np.random.Generator, share: float | None) -> dict[str, Tensor]:
        """The levels and the guidance strength of a sample; `between` is where the second leap of
        the student's own picture begins, anywhere between noise alone and t."""
        lcm, top = self.config.lcm, len(self.descents) - 1
        trained = share is None
        if share is None:
            share = rng.random() ** (1 / (1 + lcm.towards_noise))
        at = min(int(share * (top + 1)), top)
        t, *down = self.descents[at]
        low, high = lcm.w
        w = torch.tensor(low + (high - low) * rng.random(), dtype=torch.float32)
        drawn = {"t": torch.tensor(t), "down": torch.tensor(down), "w": w}
        if self.shown is not None:
            drawn["corner"] = a_corner(rng)
        if lcm.own_pictures and trained:
            drawn["between"] = torch.tensor(self.descents[rng.integers(at, top + 1)][0])
        return drawn

    def _ready(self, group: dict[str, Tensor]) -> dict[str, Tensor]:
        """A group with its noisy latents and target: where the average says it, weights change."""
        cond = self._encoded(group)
        a, sig = self.schedule.coefficients(cond["t"], like=cond["z"])
        x = a * self._clean(cond) + sig * cond["eps"]
        return {**cond, "x": x, "target": self._target(cond, x)}

    @torch.no_grad()
    def _clean(self, cond: Mapping[str, Tensor]) -> Tensor:
        """The clean latents whose noisy ones are learnt from, [n, C, h, w]: the data's, or the
        student's own. All are drawn, as to choose from them would wait for the device."""
        if "own" not in cond:
            return cond["z"]
        f, between = self._student(cond), cond["between"]
        noise, more = cond["leaps"].unbind(1)
        a, sig = self.schedule.coefficients(between, like=noise)
        drawn = f(noise, torch.full_like(between, self.descents[-1][0]))
        drawn = f(a * drawn + sig * more, between)
        torch.clear_autocast_cache()  # as `_target` says
        return torch.where(cond["own"][:, None, None, None], drawn, cond["z"])

    def _errors(self, group: dict[str, Tensor]) -> Tensor:
        """The inconsistency of each sample of a group, [n]; where the student learns and `pixels`
        asks for it, that of its picture, too. Validations stay comparable, whatever its weight."""
        answer = self._student(group)(group["x"], group["t"])
        errors = self._apart(answer, group["target"], group["mask"], group)
        if self.shown is None or not torch.is_grad_enabled():
            return errors
        corner = group["corner"]
        with torch.no_grad():
            target = self.shown(group["target"], corner)
        answer = self.shown(answer, corner)
        mask = F.interpolate(quarter(group["mask"], corner), answer.shape[2:])
        return errors + self.config.lcm.pixels.weight * self._apart(answer, target, mask, group)

    def _apart(
        self, answer: Tensor, target: Tensor, mask: Tensor, group: Mapping[str, Tensor]
    ) -> Tensor:
        """How far two answers are apart, [n], in units of the level's noise if asked."""
        if self.config.lcm.units == "noise":
            _, sig = self.schedule.coefficients(group["t"], like=answer)
            answer, target = answer / sig, target / sig
        return consistency_errors(answer, target, huber=self.config.lcm.huber, mask=mask)

    @torch.no_grad()
    def _target(self, cond: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """f(x_s, s), prompted alone: what the student itself says, or its average."""
        both = {
            name: torch.cat([self.silence.get(name, value).expand_as(value), value])
            for name, value in cond.items()
        }
        pair = self.conditioning.network(self.unet, both)
        teacher = make_denoiser(guided_each(pair, cond["w"]), self.schedule, self.kind)
        solver, levels = SOLVERS[self.config.lcm.solver], (cond["t"], *cond["down"].unbind(1))
        with self._untrained():
            x_s = descend(solver, teacher, self.schedule, x, levels)
        with self._target_weights():
            target = self._student(cond)(x_s, levels[-1])
        # Autocast keeps its copies of weights until its block ends. Those made here are perhaps the
        # average's, and in earlier versions of torch have no gradients: not for the student.
        torch.clear_autocast_cache()
        return target

    def _student(self, cond: Mapping[str, Tensor]) -> ConsistencyFunction:
        network = self.conditioning.network(self._called(), cond)
        denoiser = make_denoiser(network, self.schedule, self.kind)
        return consistency_function(denoiser, self.config.lcm.timestep_scaling)

    def _target_weights(self) -> AbstractContextManager[None]:
        return nullcontext() if self._average is None else self._average.in_place()

    # -- what is shown and exported ----------------------------------------------------------

    def _draw_adapted(self, pipe: Any) -> list[Image]:
        """The prompts' pictures in few steps, without guidance."""
        own = pipe.scheduler
        pipe.scheduler = self._scheduler(own)
        try:
            steps = _steps(self.config.lcm, self.schedule, self.config.pictures.few)
            return self._draw(pipe, steps, 1.0)
        finally:
            pipe.scheduler = own

    def _scheduler(self, own: Any) -> LCMScheduler:
        """What few steps are drawn with, on the levels of the model's `own` scheduler."""
        return LCMScheduler.from_config(
            own.config,
            original_inference_steps=self.config.lcm.original_steps,
            timestep_scaling=self.config.lcm.timestep_scaling,
        )

    def _notes(self) -> Mapping[str, str]:
        lcm = self.config.lcm
        note = LcmNote(self.config.model, lcm.original_steps, lcm.timestep_scaling, lcm.spacing)
        return note.texts()

    def _use(self) -> str:
        few = min(4, self.config.lcm.original_steps)
        steps = _steps(self.config.lcm, self.schedule, few)
        values = {
            "few": few,
            "name": FILE_NAME,
            "base": self.config.model,
            "original": self.config.lcm.original_steps,
            "scaling": self.config.lcm.timestep_scaling,
            "steps": f"{'timesteps' if isinstance(steps, list) else 'num_inference_steps'}={steps}",
        }
        return USE.format(**values)


def _descents(lcm: DistillationSettings, schedule: Schedule) -> tuple[tuple[float, ...], ...]:
    """The teacher's ways down from each level that is trained, from the least noise; `UserError`
    where the model has fewer levels than are asked for."""
    far = lcm.stride, lcm.teacher_steps
    try:
        return descents(schedule, lcm.original_steps, lcm.spacing, *far)[::-1]
    except UserError as error:
        raise UserError(f"lcm.{error}") from error


def _steps(lcm: DistillationSettings, schedule: Schedule, n: int) -> int | list[int]:
    """n steps as stock schedulers are told them: their levels, if not the even ones."""
    if lcm.spacing == LcmNote.spacing:
        return n
    levels = consistency_grid(schedule, n, lcm.original_steps, spacing=lcm.spacing)
    return [int(t) for t in levels[:-1]]


USE = """    ldm generate "…" --model {base} --lcm {name} --steps {few}

or, in stock diffusers,

    from diffusers import LCMScheduler

    pipeline.load_lora_weights("{name}")
    pipeline.scheduler = LCMScheduler.from_config(
        pipeline.scheduler.config, original_inference_steps={original}, timestep_scaling={scaling}
    )
    pipeline("…", {steps}, guidance_scale=1.0)
"""
