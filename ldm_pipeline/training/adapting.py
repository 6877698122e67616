"""Training an adapter on a frozen text-to-image model: what LoRA and LCM distillation share.

Legend
    z        clean latents [n, C, h, w], drawn anew from the cached mean and std at each step
    eps      the noise of each sample;  x = alpha(t) z + sigma(t) eps at its level t
    cond     the UNet's conditioning by name, as embeds [n, L, C], see `models.conditioning`; from
             the cache, or of the text encoders
    group    the samples of a batch that have one size; mostly there is one. For a compiled network
             it is padded to the size of the batch: one shape, and one compilation, for each size

The base model is frozen. The autoencoder and, where texts are cached, the text encoders speak only
before the first step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL.Image import Image
from torch import Tensor, nn

from ldm_pipeline.data.buckets import Size
from ldm_pipeline.data.cache import Cache, Share, key_of
from ldm_pipeline.errors import UserError
from ldm_pipeline.grid import captioned_grid
from ldm_pipeline.lora.inject import inject, without_input_casts
from ldm_pipeline.models.conditioning import conditioning_of
from ldm_pipeline.processes.ranks import Ranks, launched
from ldm_pipeline.too_large import in_memory, is_out_of_memory
from ldm_pipeline.training.adapter_config import AdapterConfig
from ldm_pipeline.training.captioned import Sample
from ldm_pipeline.training.encoding import cached_texts, text_key
from ldm_pipeline.training.levels import levels_of
from ldm_pipeline.training.lora_card import PICTURES, model_card
from ldm_pipeline.training.lora_export import check_formats, family_of_unet, write_formats
from ldm_pipeline.training.objective import Batch
from ldm_pipeline.training.sharding import sharding
from ldm_pipeline.training.shares import share_of
from ldm_pipeline.training.start import (
    attend_quickly,
    check_adapter,
    compiled,
    precision,
    recompute,
    take_adapter,
)

BANDS = 4
"""Into so many bands of levels the held-out loss is told."""


OpenModel = Callable[[str, torch.dtype], Any]
"""Opens "bundled", a model's folder or file or a hub id as a pipeline of its family, in a
precision."""


class Pictures(Protocol):
    """The captioned pictures that an adapter is trained on."""

    @property
    def samples(self) -> Sequence[Sample]:
        """All that training sees."""
        ...

    @property
    def side(self) -> int:
        """Of the square that has a picture's area, in pixels."""
        ...

    @property
    def sizes(self) -> list[Size]:
        """The sizes that pictures of a step can have."""
        ...

    @property
    def measured(self) -> list[Sample]:
        """Those that validations look at, which training never sees."""
        ...

    @property
    def cache(self) -> Path:
        """The folder of what is encoded once."""
        ...

    def sample(self, position: int) -> Sample:
        """The sample at a position of the run's endless stream."""
        ...

    def words(self, sample: Sample, rng: np.random.Generator) -> str:
        """The words that go with a sample in one step."""
        ...

    def caption(self, sample: Sample) -> str:
        """A sample's words as validations take them."""
        ...

    def texts(self) -> list[str] | None:
        """Every text that a step may ask for; None where they are too many to be cached."""
        ...

    def latents(self, vae: AutoencoderKL, share: Share) -> Cache:
        """Mean, std and perhaps mask of every sample's latents, by its key."""
        ...


class AdapterObjective(nn.Module, ABC):
    """Train an adapter alone; what it is to learn, a subclass says.

    `train_texts` adapts the text encoders as well. Data that cannot be read, and a begin_from that
    holds nothing to begin from, are refused before the model is opened.
    """

    def __init__(
        self,
        config: AdapterConfig,
        open_model: OpenModel,
        data: Pictures,
        *,
        zero_terminal_snr: bool = False,
        train_texts: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.state = launched()
        self.ranks = Ranks(self.state)
        self.data = data
        if sharding(self.state) and len(self.data.sizes) > 1:
            raise UserError(
                "under FSDP all processes must call the network equally often, and a batch of "
                f"several sizes calls it for each; set data.fixed=true (sizes: {self.data.sizes})"
            )
        if config.begin_from is not None:
            self._check_begin_from(config.begin_from)
        pipe = open_model(config.model, self._dtype())
        self.kind, self.schedule = levels_of(pipe, zero_terminal_snr)
        self.conditioning = conditioning_of(pipe)
        pipe.to(self.state.device)
        self.unet = pipe.unet
        device = self.state.device.type
        attend_quickly(self.unet, precision(config.run.mixed_precision, device), device)
        encoders = self.conditioning.encoders
        if config.gradient_checkpointing:
            recompute(self.unet, *(encoders.values() if train_texts else ()))
        models: dict[str, nn.Module] = {"unet": self.unet}
        for name, encoder in encoders.items():
            if train_texts:
                models[name] = encoder
                self.add_module(name, encoder)
            else:
                encoder.requires_grad_(False)
        self._stop: Sequence[int] = ()
        self._quick: list[Any] = []  # the compiled call; in a list, as it is no part of its own
        self._pipe = pipe if config.pictures.prompts else None
        self._base: list[Image] = []
        self._drawn_last: tuple[str, list[Image]] = ("", [])
        self._make(pipe, models)  # before anything is encoded, which takes long: it may refuse
        share = share_of(self.ranks)
        self.latents = data.latents(pipe.vae, share)
        texts = None if train_texts else data.texts()
        self.texts: Cache | None = None
        if texts is not None:
            texts = [*texts, *config.pictures.prompts, config.pictures.negative]
            self.texts = cached_texts(texts, data.cache, self.conditioning, share)
        for part in [pipe.vae, *encoders.values()] if self.texts is not None else [pipe.vae]:
            nn.Module.to(part, "cpu", dtype=self.unet.dtype)  # diffusers' own warns of empty lists

    def _check_begin_from(self, place: Path) -> None:
        """Raise UserError where what is to be gone on from is not there."""
        check_adapter(place)

    def _make(self, pipe: Any, models: dict[str, nn.Module]) -> None:
        """Make what is trained: an adapter in `models`, which are those of `pipe`."""
        config = self.config
        unread = self.conditioning.unread
        self.adapter = inject(models, config.lora.settings(), seed=config.run.seed, unread=unread)
        if config.begin_from is not None:
            take_adapter(self.adapter, config.begin_from)
        self.family = family_of_unet(self.unet.config, self.kind)
        check_formats(config, self.adapter.weights(), self.family, self.unet.config)

    def _learnt(self) -> Mapping[str, Tensor]:
        """What is trained, by name."""
        return self.adapter.parameters

    def _untrained(self) -> AbstractContextManager[None]:
        """Within the block the UNet is the model's own."""
        return self.adapter.disabled()

    def _under_autocast(self) -> AbstractContextManager[Any]:
        """How the networks are called under autocast."""
        return without_input_casts(self.adapter)

    @abstractmethod
    def _level(self, rng: np.random.Generator, share: float | None) -> dict[str, Tensor]:
        """The level `t` of a sample, and what else is drawn for it; with a share in [0, 1) given,
        the level there between the least noise and the most."""

    @abstractmethod
    def _errors(self, group: dict[str, Tensor]) -> Tensor:
        """The plain penalty of each sample of a group, [n]."""

    def _noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """The noise that is put on latents of this shape."""
        return torch.randn(shape, generator=generator)

    def _ready(self, group: dict[str, Tensor]) -> dict[str, Tensor]:
        """A group with what has to be computed before the first gradient of any group is."""
        return group

    def _sums(self, errors: Tensor, group: dict[str, Tensor]) -> dict[str, Tensor]:
        """The sums over a group of what is minimised, `loss`, and of what else is logged, from the
        plain penalties [n]."""
        return {"loss": (group["weight"].to(errors.dtype) * errors).sum()}

    def _sums_of(self, group: dict[str, Tensor], n: int) -> dict[str, Tensor]:
        """The same of the first `n` samples of a group; the others are there for the shape."""
        errors = self._errors(group)[:n]
        return self._sums(errors, {name: value[:n] for name, value in group.items()})

    def compile_network(self) -> None:
        """Compile the UNet where it has gradients. What is called without, for a teacher, a
        validation or a picture, is called too seldom or in too many shapes."""
        self._quick = [compiled(self._learner(), shapes=len(self.data.sizes))]

    def _learner(self) -> Any:
        """The UNet that learns."""
        return self.unet

    def _called(self) -> Any:
        """The UNet that learns, as it is called now."""
        return self._quick[0] if self._quick and torch.is_grad_enabled() else self._learner()

    @property
    def shared(self) -> nn.Module:
        """The UNet, where the base is shared out over the processes."""
        return self.unet

    def batch(self, positions: range) -> Batch:
        """The samples of these positions, in groups of one size, and how many are in each."""
        drawn: dict[tuple[int, int], list[dict[str, Tensor]]] = {}
        for position in positions:
            sample = self.data.sample(position)
            drawn.setdefault(sample.transform.bucket, []).append(self._drawn(sample, position))
        rows, groups = len(positions) if self._quick else 0, drawn.values()
        return {"groups": [stacked(g, rows) for g in groups], "counts": list(map(len, groups))}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The means over all samples."""
        with ExitStack() as stack:
            if torch.is_autocast_enabled(self.unet.device.type):
                stack.enter_context(self._under_autocast())
            groups = list(map(self._ready, batch["groups"]))
            sums = list(map(self._sums_of, groups, batch["counts"]))
        n = sum(batch["counts"])
        return {name: torch.stack([s[name] for s in sums]).sum() / n for name in sums[0]}

    def heed(self, stop: Sequence[int]) -> None:
        """Be shown what a signal fills: it ends a validation between two groups."""
        self._stop = stop

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
            if self._stop:
                break
            moved = {name: value.to(self.unet.device) for name, value in group.items()}
            with context:
                errors = self._errors_in_parts(moved)
            sums.index_add_(0, torch.tensor(bands), errors.cpu().double())
        means = (self.ranks.total(sums) / len(chosen)).tolist()
        return {"loss": sum(means) / BANDS} | {f"loss_band_{i}": m for i, m in enumerate(means)}

    def _errors_in_parts(self, group: dict[str, Tensor]) -> Tensor:
        """The plain penalty of each sample of a group, [n]; in halves where memory asks for it."""
        try:
            return self._errors(self._ready(group))
        except (RuntimeError, MemoryError) as error:
            n = len(group["z"])
            if n == 1 or not is_out_of_memory(error):
                raise
        # Here, as the error would hold what the attempt had made.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        halves = (slice(None, n // 2), slice(n // 2, None))
        parts = [{name: value[half] for name, value in group.items()} for half in halves]
        return torch.cat([self._errors_in_parts(part) for part in parts])

    def _validation(self, chosen: list[Sample]) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """This process's share of every chosen sample in every band: (bands, group), batched."""
        run = self.config.run
        own = list(enumerate(chosen))[self.state.process_index :: self.ranks.count]
        drawn: dict[Size, list[tuple[int, dict[str, Tensor]]]] = {}
        for number, sample in own:
            for band in range(BANDS):
                rng = np.random.default_rng([7, number, band])
                share = (band + rng.random()) / BANDS
                one = self._drawn(sample, -1 - number * BANDS - band, share)
                drawn.setdefault(sample.transform.bucket, []).append((band, one))
        # What fits into the memory with gradients fits without; what a run found not to fit is cut.
        most = max(1, run.batch_size // (self.ranks.count * run.accumulation))
        for group in drawn.values():
            for start in range(0, len(group), most):
                bands, samples = zip(*group[start : start + most], strict=True)
                yield list(bands), stacked(list(samples))

    def export(self, folder: Path, updates: int) -> None:
        """Write the adapter, as stock diffusers reads it at least, and its model card."""
        weights, seen = self.adapter.weights(), self.data.samples
        write_formats(folder, self.config, weights, self._notes(), self.family, seen, updates)
        picture = self.picture()
        if picture is not None:
            picture.save(folder / PICTURES)
        card = model_card(
            self.config,
            self.config.model,
            len(seen),
            updates,
            picture is not None,
            self.conditioning.tag,
            self._use(),
        )
        (folder / "README.md").write_text(card, "utf-8")

    def _notes(self) -> Mapping[str, str]:
        """What is written into the header of the exported file besides."""
        return {}

    def _use(self) -> str | None:
        """How to draw with the exported file, for its card; None is the way of LoRAs."""
        return None

    def picture(self) -> Image | None:
        """The prompts drawn without the adapter and with it, side by side; None without prompts."""
        if self._pipe is None:
            return None
        with in_memory("with pictures.prompts, which are drawn at once", "name fewer of them"):
            if not self._base:
                with self._untrained():
                    shown = self.config.pictures
                    self._base = self._draw(self._pipe, shown.steps, shown.guidance)
            adapted = self._adapted(self._pipe)
        pairs = zip(self._base, adapted, strict=True)
        told = [f"{how}: {p}" for p in self.config.pictures.prompts for how in ("without", "with")]
        return captioned_grid([one for pair in pairs for one in pair], told, columns=2)

    def _adapted(self, pipe: Any) -> list[Image]:
        """The prompts' pictures with the adapter; weights that were drawn last are not again.

        A validation that finds the best model shows it and exports it, and the last one shows what
        is exported in the end.
        """
        key = key_of(self._learnt())
        if key != self._drawn_last[0]:
            self._drawn_last = key, self._draw_adapted(pipe)
        return self._drawn_last[1]

    def _draw_adapted(self, pipe: Any) -> list[Image]:
        """The prompts' pictures with the adapter."""
        return self._draw(pipe, self.config.pictures.steps, self.config.pictures.guidance)

    def _draw(self, pipe: Any, steps: int | list[int], guidance: float) -> list[Image]:
        """The prompts' pictures, picture i from seed i; in so many steps, or along these levels."""
        shown, side = self.config.pictures, self.data.side
        own = {"timesteps": steps} if isinstance(steps, list) else {"num_inference_steps": steps}
        negative = [shown.negative] * len(shown.prompts)
        pipe.set_progress_bar_config(disable=True)
        pipe.vae.to(self.unet.device)
        pictures: list[Image] = pipe(
            **self.conditioning.arguments(*map(self._spoken, [shown.prompts, negative])),
            height=side,
            width=side,
            **own,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(i) for i in range(len(shown.prompts))],
        ).images
        pipe.vae.to("cpu")
        return pictures

    @torch.no_grad()
    def _spoken(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The conditioning of texts, by the text encoders as they are now if none is cached."""
        cond = self._encoded(self._looked_up(texts))
        return {name: value.to(self.unet.device) for name, value in cond.items()}

    def _looked_up(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The cached conditioning of texts, or their tokens where nothing is cached."""
        if self.texts is None:
            return self.conditioning.tokens(texts)
        return stacked([self.texts[text_key(text)] for text in texts])

    def _encoded(self, group: dict[str, Tensor]) -> dict[str, Tensor]:
        """A group with what the text encoders say, where nothing is cached."""
        return group if self.texts is not None else {**group, **self.conditioning.encode(group)}

    def name_of(self, position: int) -> str:
        """The picture at a position, for messages."""
        return self.data.sample(position).item.picture.name

    def _drawn(
        self, sample: Sample, position: int, share: float | None = None
    ) -> dict[str, Tensor]:
        """All that a step needs of one sample; its noise, level and words depend on the position.

        With a `share` given (see `_level`), it is for validation: the whole caption.
        """
        seed = self.config.run.seed
        entry = self.latents[sample.key]
        mean, std = entry["mean"].float(), entry["std"].float()
        rng = np.random.default_rng([seed, 8, position % 2**63])
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        shape = tuple(mean.shape)
        words = self.data.words(sample, rng) if share is None else self.data.caption(sample)
        mask = entry.get("mask")
        cut = sample.transform
        cond = {name: value[0] for name, value in self._looked_up([words]).items()}
        return {
            "z": mean + std * torch.randn(shape, generator=generator),
            "eps": self._noise(shape, generator),
            **self._level(rng, share),
            "mask": torch.ones(1, *shape[1:]) if mask is None else mask.float(),
            "weight": torch.tensor(sample.item.weight),
            **cond,
            **self.conditioning.micro_conditions(cut.original, (cut.left, cut.top), cut.bucket),
        }

    def _dtype(self) -> torch.dtype:
        """The frozen base's precision: that which is computed in anyway."""
        chosen = precision(self.config.run.mixed_precision, self.state.device.type)
        return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[chosen]


def stacked(samples: Sequence[dict[str, Tensor]], rows: int = 0) -> dict[str, Tensor]:
    """Samples as one group: each tensor with a first axis for them; the last sample is repeated
    until there are `rows`."""
    padded = [*samples, *[samples[-1]] * (rows - len(samples))]
    return {name: torch.stack([sample[name] for sample in padded]) for name in samples[0]}
