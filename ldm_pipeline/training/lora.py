"""LoRA fine-tuning of a text-to-image model on captioned pictures.

Legend
    z        clean latents [n, C, h, w], drawn anew from the cached mean and std at each step
    eps, t   noise and level of each sample;  x = alpha(t) z + sigma(t) eps
    told     what the UNet is told by name, as text embeddings [n, L, C], see `models.conditioning`;
             from the cache, or of the text encoders where they are trained
    group    the samples of a batch that have one size; mostly there is one

The base model is frozen. The autoencoder and, unless they are trained, the text encoders speak only
before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL.Image import Image
from pydantic import Field, model_validator
from torch import Tensor, nn

from ldm_pipeline.data.buckets import Size
from ldm_pipeline.data.cache import Cache, Share, key_of
from ldm_pipeline.diffusion.losses import Loss, denoising_errors, loss_weights
from ldm_pipeline.diffusion.noise import coarse_noise
from ldm_pipeline.diffusion.schedule import Schedule
from ldm_pipeline.errors import UserError
from ldm_pipeline.grid import captioned_grid
from ldm_pipeline.lora import files
from ldm_pipeline.lora.inject import Adapter, inject, without_input_casts
from ldm_pipeline.lora.targets import LoraSettings, Override
from ldm_pipeline.models.conditioning import conditioning_of
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
from ldm_pipeline.training.sharding import sharding
from ldm_pipeline.training.start import precision

BANDS = 4
"""Into so many bands of levels the held-out loss is told."""


OpenModel = Callable[[str, torch.dtype], Any]
"""Opens "bundled", a model folder or a hub id as a pipeline of its family, in a precision."""


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
    text_encoder: bool = Field(default=False, description="adapt the text encoders as well")

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
        if sharding(self.state) and len(self.data.sizes) > 1:
            raise UserError(
                "under FSDP all processes must call the network equally often, and a batch of "
                f"several sizes calls it for each; set data.fixed=true (sizes: {self.data.sizes})"
            )
        pipe = open_model(config.model, self._dtype())
        self.kind, self.schedule = _levels_of(pipe, config.loss.zero_terminal_snr)
        self.conditioning = conditioning_of(pipe)
        self.loss = config.loss.loss()
        share = Share(self.ranks.index, self.ranks.count, self.ranks.told)
        pipe.to(self.state.device)
        self.latents = cached_latents(self.data, pipe.vae, share)
        self.unet = pipe.unet
        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        encoders = self.conditioning.encoders
        self.texts: Cache | None = None
        if not config.lora.text_encoder:
            texts = [*self.data.texts(), *config.pictures.prompts, config.pictures.negative]
            self.texts = cached_texts(texts, config.data.cache, self.conditioning, share)
        for part in [pipe.vae, *encoders.values()] if self.texts is not None else [pipe.vae]:
            part.to("cpu", dtype=self.unet.dtype)  # they have said all that training asks
        models: dict[str, nn.Module] = {"unet": self.unet}
        if self.texts is None:
            models |= encoders
            for name, encoder in encoders.items():
                self.add_module(name, encoder)
        self._pipe = pipe if config.pictures.prompts else None
        self._base: list[Image] = []
        self._drawn_last: tuple[str, list[Image]] = ("", [])
        unread = self.conditioning.unread
        self.adapter = inject(models, config.lora.settings(), seed=seed, unread=unread)
        if config.begin_from is not None:
            _begin_from(self.adapter, config.begin_from)

    @property
    def shared(self) -> nn.Module:
        """The UNet, where the base is shared out over the processes."""
        return self.unet

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
        """The plain penalty on some of what was held out, in bands of levels, with fixed noise."""
        chosen = self.data.measured
        if not chosen:
            return {}
        half = self.unet.dtype != torch.float32
        context = torch.autocast(self.unet.device.type, self.unet.dtype, enabled=half)
        sums = torch.zeros(BANDS, dtype=torch.float64)
        for bands, group in self._validation(chosen):
            moved = {name: value.to(self.unet.device) for name, value in group.items()}
            with context:
                errors = self._errors(moved)
            sums.index_add_(0, torch.tensor(bands), errors.double().cpu())
        means = (self.ranks.total(sums) / len(chosen)).tolist()
        return {"loss": sum(means) / BANDS} | {f"loss_band_{i}": m for i, m in enumerate(means)}

    def _validation(self, chosen: list[Sample]) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """This process's share of every chosen sample in every band: (bands, group), batched."""
        levels, run = self.schedule.num_train_timesteps, self.config.run
        own = list(enumerate(chosen))[self.state.process_index :: self.ranks.count]
        drawn: dict[Size, list[tuple[int, dict[str, Tensor]]]] = {}
        for number, sample in own:
            for band in range(BANDS):
                rng = np.random.default_rng([7, number, band])
                t = int((band + rng.random()) * levels / BANDS)
                one = self._drawn(sample, -1 - number * BANDS - band, t)
                drawn.setdefault(sample.transform.bucket, []).append((band, one))
        # What fits into the memory with gradients fits without.
        most = max(1, run.batch_size // (self.ranks.count * run.accumulation))
        for group in drawn.values():
            for start in range(0, len(group), most):
                bands, samples = zip(*group[start : start + most], strict=True)
                yield list(bands), _stacked(list(samples))

    def export(self, folder: Path) -> None:
        """Write the adapter as stock diffusers reads it, and its model card."""
        files.save(folder, self.adapter.weights())
        picture = self.picture()
        if picture is not None:
            picture.save(folder / PICTURES)
        samples, tag = len(self.data.samples), self.conditioning.tag
        card = model_card(self.config, self.config.model, samples, picture is not None, tag)
        (folder / "README.md").write_text(card, "utf-8")

    def picture(self) -> Image | None:
        """The prompts drawn without the adapter and with it, side by side; None without prompts."""
        if self._pipe is None:
            return None
        if not self._base:
            with self.adapter.disabled():
                self._base = self._draw(self._pipe)
        adapted = self._adapted(self._pipe)
        prompts = self.config.pictures.prompts
        pairs = [(self._base[i], adapted[i]) for i in range(len(prompts))]
        captions = [text for p in prompts for text in (f"without: {p}", f"with: {p}")]
        return captioned_grid([one for pair in pairs for one in pair], captions, columns=2)

    def _adapted(self, pipe: Any) -> list[Image]:
        """The prompts' pictures with the adapter; weights that were drawn last are not again.

        A validation that finds the best model shows it and exports it, and the last one shows what
        is exported in the end.
        """
        key = key_of(self.adapter.parameters)
        if key != self._drawn_last[0]:
            self._drawn_last = key, self._draw(pipe)
        return self._drawn_last[1]

    def _draw(self, pipe: Any) -> list[Image]:
        """The prompts' pictures, picture i from seed i, with the network as it is now."""
        told, side = self.config.pictures, self.config.data.resolution
        negative = [told.negative] * len(told.prompts)
        pipe.set_progress_bar_config(disable=True)
        pipe.vae.to(self.unet.device)
        pictures: list[Image] = pipe(
            **self.conditioning.arguments(*map(self._spoken, [told.prompts, negative])),
            height=side,
            width=side,
            num_inference_steps=told.steps,
            guidance_scale=told.guidance,
            generator=[torch.Generator().manual_seed(i) for i in range(len(told.prompts))],
        ).images
        pipe.vae.to("cpu")
        return pictures

    @torch.no_grad()
    def _spoken(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What is told of texts, by the text encoders as they are now where they are trained."""
        told = self._encoded(self._looked_up(texts))
        return {name: value.to(self.unet.device) for name, value in told.items()}

    def _looked_up(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What is told of texts, or what the text encoders read of them where they are trained."""
        if self.texts is None:
            return self.conditioning.tokens(texts)
        return _stacked([self.texts[text_key(text)] for text in texts])

    def _encoded(self, group: dict[str, Tensor]) -> dict[str, Tensor]:
        """A group with what the text encoders say, where they are trained."""
        return group if self.texts is not None else {**group, **self.conditioning.encode(group)}

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
        return denoising_errors(
            self.conditioning.network(self.unet, self._encoded(group)),
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
        cut = sample.transform
        told = {name: value[0] for name, value in self._looked_up([words]).items()}
        return {
            "z": mean + std * torch.randn(shape, generator=generator),
            "eps": coarse_noise(shape, generator, settings.offset_noise, settings.pyramid_noise),
            "t": torch.tensor(level),
            "mask": torch.ones(1, *shape[1:]) if mask is None else mask.float(),
            "weight": torch.tensor(sample.item.weight),
            **told,
            **self.conditioning.place(cut.original, (cut.left, cut.top), cut.bucket),
        }

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
    if "sigma_data" in config:
        raise UserError(
            "the model's scheduler weighs its network's input and output by sigma_data (EDM,"
            " 2206.00364); only models of noise, v and x0 prediction can be trained"
        )
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
