"""The columns of the table of parity: what stock diffusers has a pipeline for, tiny.

Task.parts    components of the real classes, random and fp32
Task.pair     our pipeline and the task's stock one over the same components (see pairs.py)
Task.asked    what both are called with, where nothing else is asked for
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)

from tests.conftest import build, build_xl
from tests.parity.pairs import Pair, both, mask, picture, scheduler_of, seeded

SIZE = 32
"""Pixels of a side of what the tiny models draw by themselves."""

BASE = "EulerAncestralDiscreteScheduler"
"""It draws noise at each step, so that noise drawn in another order is seen."""


@dataclass(frozen=True)
class Task:
    """One stock pipeline, with a UNet of 4 channels or, for inpainting, of 9."""

    stock: Any
    redraws: bool = False
    paints: bool = False
    channels: int = 4

    @property
    def xl(self) -> bool:
        """Whether it is SDXL's."""
        return "XL" in self.stock.__name__

    @cached_property
    def takes(self) -> set[str]:
        """The arguments that the stock pipeline knows."""
        return set(inspect.signature(self.stock.__call__).parameters)

    def parts(self, scheduler: Any = None, **unet: Any) -> dict[str, Any]:
        """Fresh components, with `unet` as settings of the UNet."""
        made: Callable[..., dict[str, Any]] = build_xl if self.xl else build
        scheduler = scheduler or scheduler_of(BASE)
        return made(scheduler=scheduler, in_channels=self.channels, **unet)

    def pair(self, parts: dict[str, Any]) -> Pair:
        """Both pipelines over `parts`."""
        return both(parts, self.stock)

    def asked(self, size: int = SIZE) -> dict[str, Any]:
        """A prompt, a seed, 4 steps, and what the task needs: 3 of the steps are then run."""
        told: dict[str, Any] = {"prompt": "a red star", "num_inference_steps": 4}
        told |= {"generator": lambda: seeded(1)[0]}
        if self.redraws:
            told |= {"image": picture(size, size), "strength": 0.75}
        if self.paints:
            told |= {"mask_image": mask(size, size, soft=True)}
        if size != SIZE and "height" in self.takes:
            told |= {"height": size, "width": size}
        return told


TASKS = {
    "text": Task(StableDiffusionPipeline),
    "image": Task(StableDiffusionImg2ImgPipeline, redraws=True),
    "inpaint": Task(StableDiffusionInpaintPipeline, redraws=True, paints=True),
    "inpaint, 9 ch.": Task(StableDiffusionInpaintPipeline, True, True, channels=9),
    "XL text": Task(StableDiffusionXLPipeline),
    "XL image": Task(StableDiffusionXLImg2ImgPipeline, redraws=True),
    "XL inpaint": Task(StableDiffusionXLInpaintPipeline, redraws=True, paints=True),
    "XL inpaint, 9 ch.": Task(StableDiffusionXLInpaintPipeline, True, True, channels=9),
}
