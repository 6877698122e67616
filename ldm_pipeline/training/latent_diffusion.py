"""Training of the latent diffusion model: a cross-attention UNet that turns noise into latents.

Legend
    z        clean latents [B, 4, h, w], drawn anew from the cached mean and std at each step
    eps, t   noise and level of each sample;  x = alpha(t) z + sigma(t) eps
    embeds   text embeddings [B, L, C]; a dropped caption is the empty text (2207.12598)

Position p of the run is picture p of an endless sequence of shuffled passes over the cached
pictures, some of which may come several times in each; its caption is worded anew each time.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Self

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    UNet2DConditionModel,
)
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from ldm_pipeline.data.world import KINDS, World, among_strangers
from ldm_pipeline.diffusion.losses import Loss, denoising_errors, denoising_loss
from ldm_pipeline.diffusion.prediction import interpret
from ldm_pipeline.diffusion.schedule import Schedule
from ldm_pipeline.errors import UserError, choose
from ldm_pipeline.images import to_tensor
from ldm_pipeline.models import autoencoder
from ldm_pipeline.models.quiet import quiet_transformers
from ldm_pipeline.models.text import tokenise
from ldm_pipeline.models.unet import bind
from ldm_pipeline.processes.ranks import Ranks, launched
from ldm_pipeline.training.config import (
    Fraction,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Settings,
    ShapeSettings,
    TrainingConfig,
    must_divide,
)
from ldm_pipeline.training.halving import halved
from ldm_pipeline.training.layout import FINE, LayoutHead, Listener, WordsHead, labels_of
from ldm_pipeline.training.levels import LevelSettings
from ldm_pipeline.training.objective import Batch
from ldm_pipeline.training.pixels import PixelSettings, Quarters, a_corner
from ldm_pipeline.training.shares import share_of
from ldm_pipeline.training.start import attend_quickly, precision, take_weights
from ldm_pipeline.training.world_data import (
    CachedWorldSettings,
    cached_latents,
    fresh_caption,
    key_at,
    noise_of,
)

with quiet_transformers():
    from diffusers import StableDiffusionPipeline

PREDICTS = "v_prediction"

SCHEDULER: dict[str, object] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": PREDICTS,
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,
}
"""DDPM's linear schedule: on latents of 16 x 16 the scaled one of Stable Diffusion leaves so much
signal at its last level that the starting noise would decide the background's colour."""


MOST_SNR = 10.0
"""An error in pixels weighs its level's signal-to-noise ratio, capped here (as 2303.09556 does)."""


class UnetSettings(ShapeSettings):
    """The shape of the UNet, level by level from the finest; the middle always attends."""

    channels: tuple[Positive, ...] = (64, 128, 192)
    attends: tuple[bool, ...] = (True, True, False)
    layers_per_block: Positive = 1
    heads: Positive = 4
    norm_groups: Positive = 16

    @model_validator(mode="after")
    def _fits(self) -> Self:
        must_divide("norm_groups", self.norm_groups, channels=self.channels)
        must_divide("heads", self.heads, channels=self.channels)
        if len(self.attends) != len(self.channels):
            raise ValueError(
                f"attends={self.attends} must tell of {len(self.channels)} levels, as channels does"
            )
        return self


class OftenSettings(Settings):
    """Which pictures come more often than the others."""

    kinds: tuple[str, ...] = Field(default=(), description="of things, each as KINDS calls it")
    times: Annotated[int, Field(ge=2)] = Field(
        default=2, description="how often a picture that holds one comes in each pass"
    )

    @model_validator(mode="after")
    def _known(self) -> Self:
        for kind in self.kinds:
            choose("kinds", kind, KINDS)
        if self.times != type(self).model_fields["times"].default and not self.kinds:
            raise ValueError(f"times={self.times} needs kinds: which pictures come so often")
        return self


class LatentDiffusionConfig(TrainingConfig):
    """Everything that `train/train_unet.py` reads."""

    autoencoder: Path
    text: Path
    """Folder with `text_encoder` and `tokenizer`."""
    train_text_encoder: bool = True
    model: UnetSettings = UnetSettings()
    data: CachedWorldSettings = CachedWorldSettings()
    often: OftenSettings = OftenSettings()
    levels: LevelSettings = LevelSettings()
    caption_dropout: Fraction = 0.1
    strange_words: Fraction = Field(
        default=0.0, description="share of the captions among words that mean nothing here"
    )
    layout_weight: NonNegativeFloat = Field(
        default=0.0, description="of naming what is where, a task beside the denoising"
    )
    words_weight: NonNegativeFloat = Field(
        default=0.0, description="of naming it from the words alone: teaches the text encoder"
    )
    pixels: PixelSettings = PixelSettings()
    min_snr_gamma: PositiveFloat | None = Field(
        default=None, description="min-SNR weights (2303.09556), capped here; 5 is usual"
    )

    def kept_on_resume(self) -> Collection[str]:
        """Whose latents and which tokenizer; which text encoder, where that is frozen."""
        frozen = () if self.train_text_encoder else ("begin_from",)
        return ("autoencoder", "text", "train_text_encoder", *frozen)


class LatentDiffusionObjective(nn.Module):
    """Tell the noise from the latents, given the words."""

    def __init__(self, config: LatentDiffusionConfig) -> None:
        super().__init__()
        for folder in (config.autoencoder, config.text / "text_encoder", config.text / "tokenizer"):
            if not folder.is_dir():
                raise UserError(f"{folder} is missing; train it first")
        torch.manual_seed(config.run.seed)
        self.config = config
        self._device = launched().device
        self._precision = precision(config.run.mixed_precision, self._device.type)
        self.world = World(config.data.seed)
        self.tokenizer = CLIPTokenizer.from_pretrained(config.text / "tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(
            config.text / "text_encoder", attn_implementation="eager", dtype=torch.float32
        )
        self.text_encoder.requires_grad_(config.train_text_encoder)
        self.unet = _unet(config.model, self.text_encoder.config.hidden_size)
        attend_quickly(self.unet, self._precision, self._device.type)
        if config.begin_from is not None:
            take_weights(self.unet, config.begin_from / "unet")
            take_weights(self.text_encoder, config.begin_from / "text_encoder")
        self.layout: LayoutHead | None = None
        if config.layout_weight:
            self._listener = Listener(self.unet)
            self.layout = LayoutHead(self._listener.channels)
        self.words: WordsHead | None = None
        if config.words_weight:
            self.words = WordsHead(self.text_encoder.config.hidden_size, side=8)
        self.shown = Quarters(config.pixels, self.unet) if config.pixels.weight else None
        self.schedule = Schedule.from_config(SCHEDULER)
        gamma = config.min_snr_gamma
        self.loss = Loss() if gamma is None else Loss("min_snr", gamma)
        self._vae = [AutoencoderKL.from_pretrained(config.autoencoder)]  # in a list: not trained
        self.mean, self.std = self._cached()
        self.pictures = self._pictures()

    def batch(self, positions: range) -> Batch:
        """Latents, tokens, noise and levels of these positions."""
        n, seed = len(self.pictures), self.config.run.seed
        indices, captions, levels, labels, corners = [], [], [], [], []
        for position in positions:
            index = self.pictures[_order(n, seed, position // n)[position % n]]
            rng = np.random.default_rng([seed, 3, position])
            indices.append(index)
            captions.append(self._caption(index, rng))
            levels.append(self.config.levels.draw(rng, self.schedule.num_train_timesteps))
            if self.layout is not None or self.words is not None:
                labels.append(labels_of(self.world.told(index)[0], FINE * self.mean.shape[-1]))
            if self.shown is not None:
                corners.append(a_corner(rng))
        shape = self.mean.shape[1:]
        mean, std = self.mean[indices].float(), self.std[indices].float()
        noise = noise_of(positions, (2, *shape), seed)
        tokens = tokenise(self.tokenizer, captions, warn=False).input_ids
        batch = {
            "z": mean + std * noise[:, 0],
            "eps": noise[:, 1],
            "t": torch.tensor(levels),
            "tokens": tokens,
        }
        if labels:
            batch["labels"] = torch.from_numpy(np.stack(labels))
        if corners:
            batch["corner"] = torch.stack(corners)
        return batch

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The denoising loss (2006.11239, eq. 14) of v-predictions (2202.00512).

        Every place counts alike. With 4 times the weight where a thing is, the network answers with
        a mean that is weighted so, too, wherever it is not sure yet: things grew into large blots.
        """
        embeds = self.text_encoder(batch["tokens"])[0]
        network = bind(self.unet, embeds)
        z, t, answers = batch["z"], batch["t"], []

        def told_of(x: Tensor, t: Tensor) -> Tensor:
            answers.append((x, network(x, t)))
            return answers[-1][1]

        denoising = denoising_loss(told_of, self.schedule, PREDICTS, z, batch["eps"], t, self.loss)
        told = {"denoising": denoising}
        loss = denoising
        if self.layout is not None:
            assert self._listener.heard is not None
            told["layout"] = self.layout(self._listener.heard, batch["labels"])
            loss = loss + self.config.layout_weight * told["layout"]
        if self.words is not None:
            told["words_layout"] = self.words(embeds, batch["labels"])
            loss = loss + self.config.words_weight * told["words_layout"]
        if self.shown is not None:
            told["pixels"] = self._in_pixels(*answers[0], batch)
            loss = loss + self.config.pixels.weight * told["pixels"]
        return {"loss": loss, **told}

    def _in_pixels(self, x: Tensor, answer: Tensor, batch: Batch) -> Tensor:
        """The mean squared error in pixels of what the network's answer about x says is x0, each
        weighted by its level."""
        assert self.shown is not None
        z, t, corner = batch["z"], batch["t"], batch["corner"]
        x0 = interpret(PREDICTS, answer.to(z.dtype), x, *self.schedule.coefficients(t, like=z)).x0
        with torch.no_grad():
            truth = self.shown(z, corner)
        errors = (self.shown(x0, corner) - truth).square().flatten(1).mean(dim=1)
        weights = self.schedule.log_snr(t).exp().clamp(max=MOST_SNR)
        return (weights.to(errors.dtype) * errors).mean()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The unweighted loss on 256 pictures of the test split, in four bands of levels.

        `words` is how much greater the loss is with the caption of another picture: 0 where the
        words are not heard.
        """
        world, device = World(self.config.data.seed, "test"), self.unet.device
        samples = [world[i] for i in range(256)]
        z, _ = autoencoder.encode(self._vae[0].to(device), _stack(samples).to(device))
        tokens = tokenise(self.tokenizer, [s.caption for s in samples], warn=False).input_ids
        eps = noise_of(range(256), tuple(z.shape[1:]), 1).to(device)
        t = torch.linspace(0, self.schedule.num_train_timesteps - 1, 256, device=device).round()
        embeds = self.text_encoder(tokens.to(device))[0]
        errors, astray = (
            denoising_errors(bind(self.unet, told), self.schedule, PREDICTS, z, eps, t)
            for told in (embeds, embeds.roll(1, dims=0))
        )
        bands = errors.view(4, 64).mean(dim=1).tolist()
        named = {f"loss_band_{i}": value for i, value in enumerate(bands)}
        words = float((astray - errors).mean())
        return {"loss": float(errors.mean()), "words": words, **named}

    def export(self, folder: Path, updates: int) -> None:
        """Write the whole pipeline in Diffusers layout, in 16 bits."""
        parts = {"unet": self.unet, "text_encoder": self.text_encoder, "vae": self._vae[0]}
        StableDiffusionPipeline(
            **{name: halved(part) for name, part in parts.items()},
            tokenizer=self.tokenizer,
            scheduler=DDIMScheduler(**SCHEDULER),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)

    def _caption(self, index: int, rng: np.random.Generator) -> str:
        """A fresh wording of picture `index`, none of the held-out ones, or the empty text.

        Strange words that would push the caption's own out of what the encoder reads stay out.
        """
        if rng.random() < self.config.caption_dropout:
            return ""
        caption = fresh_caption(self.world, index, rng)
        if self.config.strange_words and rng.random() < self.config.strange_words:
            filled = among_strangers(caption, rng)
            if len(self.tokenizer(filled).input_ids) <= self.tokenizer.model_max_length:
                return filled
        return caption

    def _pictures(self) -> list[int]:
        """The pictures of one pass: all, and those with things of `often.kinds` several times."""
        often, n = self.config.often, self.config.data.pictures
        if not often.kinds:
            return list(range(n))
        scenes = (self.world.told(index)[0] for index in range(n))
        held = [any(thing.kind in often.kinds for thing in scene.things) for scene in scenes]
        return [index for index in range(n) for _ in range(often.times if held[index] else 1)]

    def _cached(self) -> tuple[Tensor, Tensor]:
        """Mean and std of all pictures' latents; see `cached_latents`."""
        data = self.config.data
        share = share_of(Ranks(launched()))
        cache = cached_latents(data, self._vae[0].to(self._device), self._precision, share)
        entries = [cache[key_at(index)] for index in range(data.pictures)]
        return torch.stack([e["mean"] for e in entries]), torch.stack([e["std"] for e in entries])


def _unet(settings: UnetSettings, text_channels: int) -> UNet2DConditionModel:
    down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in settings.attends]
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=settings.channels,
        down_block_types=tuple(down),
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        layers_per_block=settings.layers_per_block,
        attention_head_dim=settings.heads,  # diffusers' historical name for the number of heads
        cross_attention_dim=text_channels,
        norm_num_groups=settings.norm_groups,
    )


@lru_cache(maxsize=2)
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which pass `epoch` goes through `n` pictures."""
    return np.random.default_rng([seed, 4, epoch]).permutation(n)


def _stack(samples: list) -> Tensor:
    return to_tensor(np.stack([sample.picture for sample in samples]))
