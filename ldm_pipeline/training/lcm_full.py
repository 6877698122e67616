"""Distillation of a full LCM (2310.04378): a whole UNet that is told how strong the guidance is.

The student begins as the teacher, with a projection of the guidance strength that begins at zero,
and is trained in float32; the teacher stays as it was opened, beside it. What is written is a whole
pipeline, which stock diffusers and ours open and draw with in few steps.

Legend
    w       guidance strength of each sample [n], guidance_scale - 1; the UNet hears it as
            sinusoids [n, w_channels]
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import UNet2DConditionModel
from PIL.Image import Image
from torch import Tensor, nn

from ldm_pipeline.errors import UserError
from ldm_pipeline.models.conditioning import OneEncoder
from ldm_pipeline.models.quiet import quiet_transformers
from ldm_pipeline.training.adapting import OpenModel
from ldm_pipeline.training.halving import halved
from ldm_pipeline.training.lcm import LcmConfig, LcmObjective
from ldm_pipeline.training.lora_card import PICTURES
from ldm_pipeline.training.start import part_of, take_weights, weights_in

with quiet_transformers():
    from diffusers import LatentConsistencyModelPipeline


class FullLcmObjective(LcmObjective):
    """The same as `LcmObjective`, learnt by a whole UNet that hears w."""

    def _check_begin_from(self, place: Path) -> None:
        weights_in(part_of(place, "unet"))

    def _make(self, pipe: Any, models: dict[str, nn.Module]) -> None:
        """The student beside the teacher, which is frozen as all of `pipe` is."""
        if self.unet.config.time_cond_proj_dim is not None:
            raise UserError(
                f"{self.config.model} is a full LCM already; name the model to distil, whose UNet"
                " is not told the guidance"
            )
        self.unet.requires_grad_(False)
        self.student = hearing(self.unet, self.config.lcm.w_channels)
        if self.config.begin_from is not None:
            take_weights(self.student, part_of(self.config.begin_from, "unet"))
        if self.config.gradient_checkpointing:
            self.student.enable_gradient_checkpointing()
        self._parts = dict(pipe.components)
        self._class = type(pipe)

    def _learnt(self) -> Mapping[str, Tensor]:
        return dict(self.student.named_parameters())

    def _untrained(self) -> AbstractContextManager[None]:
        return nullcontext()  # the teacher is a UNet of its own

    def _learner(self) -> UNet2DConditionModel:
        return self.student

    def _under_autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def _draw_adapted(self, pipe: Any) -> list[Image]:
        """The prompts' pictures in few steps, told the middle of the strengths that are trained."""
        own, settings = (pipe.scheduler, pipe.unet), self.config.pictures
        pipe.scheduler, pipe.unet = self._scheduler(own[0]), self.student
        try:
            with torch.autocast(
                self.student.device.type, self.unet.dtype, self.unet.dtype != torch.float32
            ):
                return self._draw(pipe, settings.few, 1.0 + sum(self.config.lcm.w) / 2)
        finally:
            pipe.scheduler, pipe.unet = own

    def export(self, folder: Path, updates: int) -> None:
        """Write the whole pipeline in Diffusers layout, in 16 bits, and its model card.

        Of Stable Diffusion 1.x and 2.x it is a `LatentConsistencyModelPipeline` to stock diffusers.
        """
        changed = {"unet": self.student, "scheduler": self._scheduler(self._parts["scheduler"])}
        parts = {name: halved(part) for name, part in {**self._parts, **changed}.items()}
        if isinstance(self.conditioning, OneEncoder):
            pipe = LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
        else:
            pipe = self._class(**parts, add_watermarker=False)
        pipe.save_pretrained(folder)
        picture = self.picture()
        if picture is not None:
            picture.save(folder / PICTURES)
        (folder / "README.md").write_text(self._card(updates, picture is not None), "utf-8")

    def _card(self, updates: int, shown: bool) -> str:
        resolved = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False)
        low, high = self.config.lcm.w
        return CARD.format(
            base=self.config.model,
            tag=self.conditioning.tag,
            samples=len(self.data.samples),
            updates=updates,
            batch=self.config.run.batch_size,
            few=min(4, self.config.lcm.original_steps),
            scales=f"{1 + low:g} to {1 + high:g}",
            middle=f"{1 + (low + high) / 2:g}",
            shown=f"![drawn by the teacher and in few steps]({PICTURES})\n\n" if shown else "",
            config=resolved,
        )


def distillation(config: LcmConfig, open_model: OpenModel) -> LcmObjective:
    """The objective that `config` asks for: an adapter or a whole UNet."""
    return (FullLcmObjective if config.lcm.full else LcmObjective)(config, open_model)


def hearing(unet: UNet2DConditionModel, channels: int) -> UNet2DConditionModel:
    """A trainable float32 copy of `unet` that hears the guidance in `channels`, and at first says
    what `unet` says, whatever it hears."""
    student = UNet2DConditionModel.from_config(unet.config, time_cond_proj_dim=channels)
    missing, unexpected = student.load_state_dict(
        {name: value.float() for name, value in unet.state_dict().items()}, strict=False
    )
    assert (missing, unexpected) == (["time_embedding.cond_proj.weight"], [])
    nn.init.zeros_(student.time_embedding.cond_proj.weight)
    return student.to(unet.device, torch.float32).requires_grad_(True)


CARD = """---
base_model: {base}
library_name: diffusers
pipeline_tag: text-to-image
tags: [{tag}, lcm, text-to-image, diffusers]
---
# A latent consistency model of {base}

{shown}Trained on {samples} captioned pictures: {updates} updates of {batch} samples each. Its UNet
is told the guidance, and learnt scales of {scales}.

    ldm generate "…" --model FOLDER --lcm --steps {few} --guidance {middle}

or in stock diffusers

    import torch
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained("FOLDER", torch_dtype=torch.float32)
    pipeline("…", num_inference_steps={few}, guidance_scale={middle})

## Configuration

```yaml
{config}```
"""
