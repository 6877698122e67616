"""LoRA fine-tuning of a text-to-image model on captioned pictures.

Legend
    z        clean latents [n, C, h, w];  x = alpha(t) z + sigma(t) eps
    eps, t   noise and level of each sample
    group    the samples of a batch that have one size; mostly there is one
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from ldm_pipeline.diffusion.losses import Loss, denoising_errors, loss_weights
from ldm_pipeline.diffusion.noise import coarse_noise
from ldm_pipeline.diffusion.prediction import target
from ldm_pipeline.training.adapter_config import AdapterConfig, AdapterSettings
from ldm_pipeline.training.adapting import AdapterObjective, OpenModel
from ldm_pipeline.training.captioned import Captioned, CaptionedSettings, Sample
from ldm_pipeline.training.config import NonNegativeFloat, PositiveFloat, Settings
from ldm_pipeline.training.levels import LevelSettings
from ldm_pipeline.training.objective import Batch
from ldm_pipeline.training.start import precision


class LoraAdapterSettings(AdapterSettings):
    """Which modules are adapted; the text encoders' may be as well."""

    text_encoder: bool = Field(default=False, description="adapt the text encoders as well")


class LossSettings(Settings):
    """The loss and the noise; see `diffusion.losses` and `diffusion.noise`."""

    weighting: Literal["none", "min_snr", "debiased"] = "none"
    gamma: PositiveFloat = Field(default=5.0, description="where min_snr stops to grow")
    huber: PositiveFloat | None = Field(default=None, description="larger errors count by amount")
    offset_noise: NonNegativeFloat = 0.0
    pyramid_noise: NonNegativeFloat = 0.0
    zero_terminal_snr: bool = Field(default=False, description="for v-prediction models")
    regularise_to: Literal["pictures", "answers"] = Field(
        default="pictures",
        description="of data.regularisation: what its pictures show, or the model's own answers "
        "about them, which have no noise of their own",
    )

    def kept_on_resume(self) -> Collection[str]:
        """How much noise a level stands for."""
        return ("zero_terminal_snr",)

    def loss(self) -> Loss:
        """The same as the core takes it."""
        return Loss(self.weighting, self.gamma, self.huber)


class LoraConfig(AdapterConfig):
    """Everything that `train/train_lora.py` reads."""

    data: CaptionedSettings
    lora: LoraAdapterSettings = LoraAdapterSettings()
    loss: LossSettings = LossSettings()
    levels: LevelSettings = LevelSettings(uniform=1.0)

    @model_validator(mode="after")
    def _keeps_something(self) -> LoraConfig:
        if self.loss.regularise_to == "pictures":
            return self
        if self.data.regularisation is None:
            raise ValueError(
                "loss.regularise_to=answers needs data.regularisation: what is asked about"
            )
        if self.loss.zero_terminal_snr:
            raise ValueError(
                "loss.regularise_to=answers goes without loss.zero_terminal_snr: the model's own"
                " answers are those of its own levels"
            )
        return self


class LoraObjective(AdapterObjective):
    """Tell the noise from the latents of the data set's pictures, with an adapter alone."""

    config: LoraConfig
    data: Captioned

    def __init__(self, config: LoraConfig, open_model: OpenModel) -> None:
        run = config.run
        super().__init__(
            config,
            open_model,
            Captioned(config.data, run.seed, run.batch_size, precision(run.mixed_precision)),
            zero_terminal_snr=config.loss.zero_terminal_snr,
            train_texts=config.lora.text_encoder,
        )
        self.loss = config.loss.loss()

    def _drawn(
        self, sample: Sample, position: int, share: float | None = None
    ) -> dict[str, Tensor]:
        """The same, and whether the sample regularises, if that is to be asked about."""
        drawn = super()._drawn(sample, position, share)
        if self.config.loss.regularise_to == "answers" and share is None:
            drawn["regularises"] = torch.tensor(sample.item.regularisation)
        return drawn

    def _level(self, rng: np.random.Generator, share: float | None) -> dict[str, Tensor]:
        levels = self.schedule.num_train_timesteps
        drawn = self.config.levels.draw(rng, levels) if share is None else int(share * levels)
        return {"t": torch.tensor(drawn)}

    def _noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        settings = self.config.loss
        return coarse_noise(shape, generator, settings.offset_noise, settings.pyramid_noise)

    def _sums(self, errors: Tensor, group: dict[str, Tensor]) -> dict[str, Tensor]:
        """The sums over a group of the weighted and of the plain penalties."""
        weights = loss_weights(self.kind, self.schedule, group["t"], self.loss) * group["weight"]
        return {"loss": (weights.to(errors.dtype) * errors).sum(), "error": errors.sum()}

    def batch(self, positions: range) -> Batch:
        """The same, and which samples of each group the model itself is asked about, [k]; one at
        least, as under FSDP every process calls it."""
        batch = super().batch(positions)
        for group, n in zip(batch["groups"], batch["counts"], strict=True):
            if "regularises" in group:
                asked = group["regularises"][:n].nonzero()[:, 0]
                group["asked"] = asked if len(asked) else torch.zeros(1, dtype=torch.long)
        return batch

    @torch.no_grad()
    def _ready(self, group: dict[str, Tensor]) -> dict[str, Tensor]:
        """A group with what a right answer is: of regularisation the model's own (1606.09282)."""
        if "asked" not in group:
            return group
        z, eps, t = group["z"], group["eps"], group["t"]
        a, sig = self.schedule.coefficients(t, like=z)
        told = target(self.kind, z, eps, a, sig)
        # By number: choosing by truth would wait for the device, to know how many they are.
        own = {
            name: group[name].index_select(0, group["asked"]) for name in group.keys() - {"asked"}
        }
        x = (a * z + sig * eps).index_select(0, group["asked"])
        with self._untrained():
            said = self.conditioning.network(self.unet, self._encoded(own))(x, own["t"])
        torch.clear_autocast_cache()  # as `LcmObjective._target` says
        wanted = told.index_copy(0, group["asked"], said.to(told.dtype))
        regularises = group["regularises"][:, None, None, None]
        return {**group, "wanted": torch.where(regularises, wanted, told)}

    def _errors(self, group: dict[str, Tensor]) -> Tensor:
        """The plain penalty of each sample of a group, [n]."""
        return denoising_errors(
            self.conditioning.network(self._called(), self._encoded(group)),
            self.schedule,
            self.kind,
            group["z"],
            group["eps"],
            group["t"],
            huber=self.loss.huber,
            mask=group["mask"],
            wanted=group.get("wanted"),
        )
