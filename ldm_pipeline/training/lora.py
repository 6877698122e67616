"""LoRA fine-tuning of a text-to-image model on captioned pictures.

Legend
    z        clean latents [n, C, h, w], drawn anew from the cached mean and std at each step
    eps, t   noise and level of each sample;  x = alpha(t) z + sigma(t) eps
    embeds   text embeddings [n, L, C], from the cache, or of the text encoder where it is trained
    group    the samples of a batch that have one size; mostly there is one

The base model is frozen. The autoencoder and, unless it is trained, the text encoder speak only
before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL.Image import Image
from pydantic import Field, model_validator
from torch import Tensor, nn

from ldm_pipeline.data.cache import Share
from ldm_pipeline.diffusion.losses import Loss, denoising_errors, loss_weights
from ldm_pipeline.diffusion.noise import coarse_noise
from ldm_pipeline.diffusion.schedule import Schedule
from ldm_pipeline.errors import UserError
from ldm_pipeline.grid import captioned_grid
from ldm_pipeline.lora import files
from ldm_pipeline.lora.inject import Adapter, inject, without_input_casts
from ldm_pipeline.lora.targets import LoraSettings, Override
from ldm_pipeline.models.text import encode, tokenise
from ldm_pipeline.models.unet import bind
from ldm_pipeline.training.captioned import (
    Captioned,
    CaptionedSettings,
    Sample,
    cached_latents,
    cached_texts,
    text_key,
)
from ldm_pipeline.training.config import (
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Settings,
    TrainingConfig,
)
from ldm_pipeline.training.levels import LevelSettings
from ldm_pipeline.training.lora_card import PICTURES, model_card
from ldm_pipeline.training.objective import Batch
from ldm_pipeline.training.ranks import Ranks, launched
from ldm_pipeline.training.start import precision

BANDS = 4
"""Into so many bands of levels the held-out loss is told."""


OpenModel = Callable[[str, torch.dtype], Any]
"""Opens "bundled", a model folder or a hub id as a Stable Diffusion pipeline, in a precision."""


class OverrideSettings(Settings):
    """What differs in the modules that a pattern matches."""

    rank: Positive | None = None
    alpha: PositiveFloat | None = None


class AdapterSettings(Settings):
    """Which modules are adapted, and how; see `lora.targets`."""

    targets: str | tuple[str, ...] = Field(
        default="attention",
        description="attention, attention+feedforward, all, or a list of patterns",
    )
    rank: Positive = 16
    alpha: PositiveFloat | None = Field(default=None, description="rank, unless given")
    dora: bool = False
    rslora: bool = False
    overrides: dict[str, OverrideSettings] = Field(
        default={}, description="pattern: {rank, alpha} where they differ"
    )
    text_encoder: bool = Field(default=False, description="adapt the text encoder as well")

    def settings(self) -> LoraSettings:
        """The same as `lora` takes it."""
        targets = self.targets if isinstance(self.targets, str) else list(self.targets)
        overrides = {p: Override(o.rank, o.alpha) for p, o in self.overrides.items()}
        return LoraSettings(targets, self.rank, self.alpha, self.dora, self.rslora, overrides)


class LossSettings(Settings):
    """The loss and the noise; see `diffusion.losses` and `diffusion.noise`."""

    weighting: Literal["none", "min_snr", "debiased"] = "none"
    gamma: PositiveFloat = Field(default=5.0, description="where min_snr stops to grow")
    huber: PositiveFloat | None = Field(default=None, description="larger errors count by amount")
    offset_noise: NonNegativeFloat = 0.0
    pyramid_noise: NonNegativeFloat = 0.0
    zero_terminal_snr: bool = Field(default=False, description="for v-prediction models")

    def loss(self) -> Loss:
        """The same as the core takes it."""
        return Loss(self.weighting, self.gamma, self.huber)


class PictureSettings(Settings):
    """What is drawn at each validation, with the adapter and without it, from fixed seeds."""

    prompts: tuple[str, ...] = ()
    steps: Positive = 25
    guidance: NonNegativeFloat = 5.0
    negative: str = ""


class LoraConfig(TrainingConfig):
    """Everything that `train/train_lora.py` reads."""

    model: str = Field(default="bundled", description="bundled, a folder or a hub id")
    data: CaptionedSettings
    lora: AdapterSettings = AdapterSettings()
    loss: LossSettings = LossSettings()
    levels: LevelSettings = LevelSettings(uniform=1.0)
    gradient_checkpointing: bool = False
    pictures: PictureSettings = PictureSettings()

    @model_validator(mode="after")
    def _fits(self) -> LoraConfig:
        self.lora.settings()
        return self


class LoraObjective(nn.Module):
    """Tell the noise from the latents of the data set's pictures, with an adapter alone."""

    def __init__(self, config: LoraConfig, open_model: OpenModel) -> None:
        super().__init__()
        self.config = config
        self.state = launched()
        self.ranks = Ranks(self.state)
        seed = config.run.seed
        self.data = Captioned(config.data, seed, config.run.batch_size)
        pipe = open_model(config.model, self._dtype())
        self.kind, self.schedule = _levels_of(pipe, config.loss.zero_terminal_snr)
        self.loss = config.loss.loss()
        share = Share(
            self.state.process_index, self.state.num_processes, self.state.wait_for_everyone
        )
        pipe.to(self.state.device)
        self.latents = cached_latents(self.data, pipe.vae, share)
        self.tokenizer = pipe.tokenizer
        self.unet = pipe.unet
        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        models: dict[str, nn.Module] = {"unet": self.unet}
        if config.lora.text_encoder:
            self.text_encoder = pipe.text_encoder
            models["text_encoder"] = self.text_encoder
        else:
            texts = [*self.data.texts(), *config.pictures.prompts, config.pictures.negative]
            self.texts = cached_texts(
                texts, config.data.cache, pipe.tokenizer, pipe.text_encoder, share
            )
        for part in (pipe.vae,) if config.lora.text_encoder else (pipe.vae, pipe.text_encoder):
            part.to("cpu")  # they have said all that training asks
        self._pipe = pipe if config.pictures.prompts else None
        self._base: list[Image] = []
        self.adapter = inject(models, config.lora.settings(), seed=seed)
        if config.begin_from is not None:
            _begin_from(self.adapter, config.begin_from)

    def batch(self, positions: range) -> Batch:
        """The samples of these positions, in groups of one size."""
        drawn: dict[tuple[int, int], list[dict[str, Tensor]]] = {}
        for position in positions:
            sample = self.data.sample(position)
            drawn.setdefault(sample.transform.bucket, []).append(self._drawn(sample, position))
        return {"groups": [_stacked(group) for group in drawn.values()], "n": len(positions)}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The weighted mean of the denoising penalty of all samples."""
        with ExitStack() as stack:
            if torch.is_autocast_enabled(self.unet.device.type):
                stack.enter_context(without_input_casts(self.adapter))
            sums = [self._penalty(group) for group in batch["groups"]]
        loss = torch.stack([weighted for weighted, _ in sums]).sum() / batch["n"]
        error = torch.stack([plain for _, plain in sums]).sum() / batch["n"]
        return {"loss": loss, "error": error}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The plain penalty on what was held out, in bands of levels, with fixed noise."""
        if not self.data.held_out:
            return {}
        errors: list[list[float]] = [[] for _ in range(BANDS)]
        levels = self.schedule.num_train_timesteps
        half = self.unet.dtype != torch.float32
        context = torch.autocast(self.unet.device.type, self.unet.dtype, enabled=half)
        own = list(enumerate(self.data.held_out))[self.state.process_index :: self.ranks.count]
        for number, sample in own:
            for band in range(BANDS):
                rng = np.random.default_rng([7, number, band])
                t = int((band + rng.random()) * levels / BANDS)
                group = _stacked([self._drawn(sample, -1 - number * BANDS - band, t)])
                moved = {name: value.to(self.unet.device) for name, value in group.items()}
                with context:
                    errors[band].append(float(self._errors(moved)[0]))
        totals = torch.tensor([sum(band) for band in errors], dtype=torch.float64)
        means = (self.ranks.total(totals) / len(self.data.held_out)).tolist()
        return {"loss": sum(means) / BANDS} | {f"loss_band_{i}": m for i, m in enumerate(means)}

    def export(self, folder: Path) -> None:
        """Write the adapter as stock diffusers reads it, and its model card."""
        files.save(folder, self.adapter.weights())
        picture = self.picture()
        if picture is not None:
            picture.save(folder / PICTURES)
        card = model_card(
            self.config, self.config.model, len(self.data.samples), picture is not None
        )
        (folder / "README.md").write_text(card, "utf-8")

    def picture(self) -> Image | None:
        """The prompts drawn without the adapter and with it, side by side; None without prompts."""
        if self._pipe is None:
            return None
        if not self._base:
            with self.adapter.disabled():
                self._base = self._draw(self._pipe)
        adapted = self._draw(self._pipe)
        prompts = self.config.pictures.prompts
        pairs = [(self._base[i], adapted[i]) for i in range(len(prompts))]
        captions = [text for p in prompts for text in (f"without: {p}", f"with: {p}")]
        return captioned_grid([one for pair in pairs for one in pair], captions, columns=2)

    def _draw(self, pipe: Any) -> list[Image]:
        """The prompts' pictures, picture i from seed i, with the network as it is now."""
        told, side = self.config.pictures, self.config.data.resolution
        pipe.set_progress_bar_config(disable=True)
        pipe.vae.to(self.unet.device)
        pictures: list[Image] = pipe(
            prompt_embeds=self._embeds(told.prompts),
            negative_prompt_embeds=self._embeds([told.negative] * len(told.prompts)),
            height=side,
            width=side,
            num_inference_steps=told.steps,
            guidance_scale=told.guidance,
            generator=[torch.Generator().manual_seed(i) for i in range(len(told.prompts))],
        ).images
        pipe.vae.to("cpu")
        return pictures

    def _embeds(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [n, L, C] of texts, of the text encoder as it is now where it is trained."""
        if self.config.lora.text_encoder:
            return encode(self.tokenizer, self.text_encoder, list(texts), warn=False)
        cached = [self.texts[text_key(text)]["embeds"] for text in texts]
        return torch.stack(cached).to(self.unet.device)

    def name_of(self, position: int) -> str:
        """The picture at a position, for messages."""
        return self.data.sample(position).item.picture.name

    def _penalty(self, group: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The sums over a group of the weighted and of the plain penalties."""
        errors = self._errors(group)
        weights = loss_weights(self.kind, self.schedule, group["t"], self.loss) * group["weight"]
        return (weights.to(errors.dtype) * errors).sum(), errors.sum()

    def _errors(self, group: dict[str, Tensor]) -> Tensor:
        """The plain penalty of each sample of a group, [n]."""
        embeds = group["embeds"] if "embeds" in group else self.text_encoder(group["tokens"])[0]
        return denoising_errors(
            bind(self.unet, embeds.to(self.unet.dtype)),
            self.schedule,
            self.kind,
            group["z"],
            group["eps"],
            group["t"],
            huber=self.loss.huber,
            mask=group["mask"],
        )

    def _drawn(self, sample: Sample, position: int, t: int | None = None) -> dict[str, Tensor]:
        """All that a step needs of one sample; its noise, level and words depend on the position.

        With a level `t` given, it is for validation: the whole caption.
        """
        seed, settings = self.config.run.seed, self.config.loss
        entry = self.latents[sample.key]
        mean, std = entry["mean"].float(), entry["std"].float()
        rng = np.random.default_rng([seed, 8, position % 2**63])
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        shape = tuple(mean.shape)
        words = self.data.words(sample, rng) if t is None else self.data.caption(sample)
        level = self.config.levels.draw(rng, self.schedule.num_train_timesteps) if t is None else t
        mask = entry.get("mask")
        drawn = {
            "z": mean + std * torch.randn(shape, generator=generator),
            "eps": coarse_noise(shape, generator, settings.offset_noise, settings.pyramid_noise),
            "t": torch.tensor(level),
            "mask": torch.ones(1, *shape[1:]) if mask is None else mask.float(),
            "weight": torch.tensor(sample.item.weight),
        }
        if self.config.lora.text_encoder:
            tokens = tokenise(self.tokenizer, [words], warn=False).input_ids[0]
            return {**drawn, "tokens": tokens}
        return {**drawn, "embeds": self.texts[text_key(words)]["embeds"]}

    def _dtype(self) -> torch.dtype:
        """The frozen base's precision: bf16 where a GPU computes in it anyway."""
        chosen = precision(self.config.run.mixed_precision, self.state.device.type)
        half = chosen != "no" and self.state.device.type == "cuda"
        return {"bf16": torch.bfloat16, "fp16": torch.float16}[chosen] if half else torch.float32


def _stacked(group: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([sample[name] for sample in group]) for name in group[0]}


def _levels_of(pipe: Any, zero_terminal: bool) -> tuple[str, Schedule]:
    """What the network predicts, and the levels that it is trained on."""
    config = dict(pipe.scheduler.config)
    kind = str(config.get("prediction_type", "epsilon"))
    schedule = Schedule.from_config(config)
    if zero_terminal and kind == "epsilon":
        raise UserError(
            "loss.zero_terminal_snr=true needs a v-prediction model: at the last level all is "
            "noise, and a network that predicts the noise learns nothing there"
        )
    return kind, schedule.zero_terminal_snr() if zero_terminal else schedule


@torch.no_grad()
def _begin_from(adapter: Adapter, place: Path) -> None:
    """Start from the values in a LoRA file; raises UserError where it is one of another shape."""
    parameters, loaded = adapter.parameters, files.load(place)
    found = loaded.tensors
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    wanted = {name: tuple(value.shape) for name, value in parameters.items()}
    if shapes != wanted:
        odd = sorted(shapes.items() ^ wanted.items())
        raise UserError(
            f"begin_from: {place} is an adapter of another shape than lora.* asks for "
            f"({len(odd)} differences, as {odd[0][0]})"
        )
    if dict(loaded.layouts) != dict(adapter.layouts):
        raise UserError(
            f"begin_from: {place} has another alpha, dora or rslora than lora.* asks for; the same "
            "numbers would count for more or less"
        )
    for name, parameter in parameters.items():
        parameter.copy_(found[name])
