"""Captioned pictures as a LoRA training reads them: looked at, encoded once, in a fixed order.

Each picture goes once through the autoencoder, each wording once through the text encoders; the
answers are kept in caches whose keys hold everything that decides them, so that editing a picture
or changing the model encodes anew exactly what changed. Training itself then calls neither.

Legend
    item     a picture of the data set with its captions, see `data.captioned`
    sample   one item at one position of the run's endless stream of epochs
    mask     what of the latents counts, [1, h, w] from 0 to 1
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from pydantic import Field, model_validator
from torch import Tensor

from ldm_pipeline.data import captioned, wording
from ldm_pipeline.data.buckets import CENTRE, Buckets, Transform, aspect_buckets, crop_at, one_size
from ldm_pipeline.data.cache import Cache, Entry, Share, fill, key_of
from ldm_pipeline.data.captioned import Item
from ldm_pipeline.data.decoding import Picture, read_size
from ldm_pipeline.data.order import epoch_order
from ldm_pipeline.data.sources import BadPicture
from ldm_pipeline.errors import UserError
from ldm_pipeline.images import to_tensor
from ldm_pipeline.models import autoencoder
from ldm_pipeline.too_large import in_memory
from ldm_pipeline.training.config import (
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Part,
    Positive,
    Settings,
)
from ldm_pipeline.training.encoding import AT_ONCE, parts, plain
from ldm_pipeline.training.shares import one_on_each_machine_first

log = logging.getLogger(__name__)
PIXELS_AT_ONCE = 2**18
"""Of the pictures of one call, if there is more than one."""


class CaptionSettings(Settings):
    """How captions are varied; see `data.wording`."""

    dropout: Fraction = Field(default=0.1, description="probability of the empty caption")
    shuffle_tags: bool = Field(default=False, description="reorder what commas separate")
    tag_dropout: Fraction = Field(default=0.0, description="probability for each tag to go")
    keep_tags: NonNegative = Field(default=0, description="so many first tags stay in place")
    variants: Positive = Field(default=4, description="versions of a varied caption")
    key: str | None = Field(default=None, description="of the source: where captions are")
    default: str | None = Field(default=None, description="for pictures that have none")

    @property
    def wording(self) -> wording.Wording:
        """The part that varies captions."""
        return wording.Wording(
            self.dropout, self.shuffle_tags, self.tag_dropout, self.keep_tags, self.variants
        )


class CaptionedSettings(Settings):
    """Which pictures, at what size, with what words."""

    source: str = Field(description="folder, .tar, .parquet or hub id")
    split: str | None = Field(default=None, description="of the source if it is a table (train)")
    resolution: Positive = Field(default=512, description="side of the square with this area")
    bucket_step: Positive = Field(default=64, description="sides are multiples of it")
    fixed: bool = Field(default=False, description="one square size for all pictures")
    upscale: bool = Field(default=False, description="enlarge pictures that are too small")
    random_crop: bool = Field(default=False, description="crop at a place of its own, not centred")
    alpha_masks: bool = Field(default=False, description="a picture's alpha is its mask")
    limit: Positive | None = Field(default=None, description="only the first so many of the source")
    strict: bool = Field(default=False, description="stop at a bad picture, not leave it out")
    regularisation: str | None = Field(default=None, description="pictures to keep knowing")
    regularisation_weight: NonNegativeFloat = 1.0
    stream: bool = Field(default=False, description="copy a table's rows, not download it whole")
    held_out: Part = Field(default=0.0, description="share kept for validation alone")
    measured: Positive = Field(default=8, description="at most so many of held_out each time")
    cache: Path = Path("cache")
    captions: CaptionSettings = CaptionSettings()

    @model_validator(mode="after")
    def _fits(self) -> CaptionedSettings:
        self.buckets()
        return self

    def buckets(self) -> Buckets:
        """The sizes that pictures are brought to."""
        if self.fixed:
            return one_size(self.resolution, self.resolution, upscale=self.upscale)
        return aspect_buckets(self.resolution, self.bucket_step, upscale=self.upscale)


@dataclass(frozen=True)
class Sample:
    """One picture of the data set that can be trained on: its cache key and how it was cut."""

    item: Item
    transform: Transform
    key: str


class Captioned:
    """The samples of a data set and the order of a run through them."""

    def __init__(
        self, settings: CaptionedSettings, seed: int, batch_size: int, precision: str = "no"
    ) -> None:
        """`precision` is what the autoencoder may compute in, "bf16" or another."""
        self.settings, self.seed, self.batch_size = settings, seed, batch_size
        self.precision = precision
        self.wording = settings.captions.wording
        sources = [settings.source, *filter(None, [settings.regularisation])]
        if settings.stream and not any(map(captioned.is_table, sources)):
            raise UserError(
                "data.stream=true is for tables, which are parquet files and hub ids, not for "
                f"{' and '.join(sources)}; leave it out"
            )
        samples = self._looked_at(settings.source, regularisation=False)
        held = round(settings.held_out * len(samples))
        held = min(max(held, 1), len(samples) - 1) if settings.held_out else 0
        aside = set(np.random.default_rng([seed, 6]).permutation(len(samples))[:held].tolist())
        self.held_out = [s for i, s in enumerate(samples) if i in aside]
        self.samples = [s for i, s in enumerate(samples) if i not in aside]
        self.kept: list[Sample] = []
        if settings.regularisation is not None:
            self.kept = self._looked_at(settings.regularisation, regularisation=True)
        self._order = lru_cache(maxsize=2)(self._order_of)

    @property
    def measured(self) -> list[Sample]:
        """Those of the held-out samples that validations look at, always the same ones."""
        order = np.random.default_rng([self.seed, 10]).permutation(len(self.held_out))
        return [self.held_out[i] for i in order[: self.settings.measured]]

    @property
    def side(self) -> int:
        """Of the square that has a picture's area, in pixels."""
        return self.settings.resolution

    @property
    def cache(self) -> Path:
        """The folder of what is encoded once."""
        return self.settings.cache

    def latents(self, vae: AutoencoderKL, share: Share) -> Cache:
        """Mean, std and mask of every sample's latents; see `cached_latents`."""
        return cached_latents(self, vae, share)

    def every(self) -> list[Sample]:
        """All samples, those of validation and regularisation too."""
        return [*self.samples, *self.held_out, *self.kept]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """The sizes (width, height) that pictures of a step can have."""
        return sorted({sample.transform.bucket for sample in [*self.samples, *self.kept]})

    def leave_out(self, keys: set[str]) -> None:
        """Go on without the samples of these keys, which could not be encoded, and count them."""
        every = [sample.key for sample in self.every()]
        bad = sum(key in keys for key in every)
        if bad:
            log.warning("%d of %d pictures could not be encoded and are left out", bad, len(every))
        self.samples = [s for s in self.samples if s.key not in keys]
        self.held_out = [s for s in self.held_out if s.key not in keys]
        self.kept = [s for s in self.kept if s.key not in keys]
        told = self.settings
        for source, left in ((told.source, self.samples), (told.regularisation, self.kept)):
            if source is not None and not left:
                raise UserError(f"{source} has no picture that can be trained on")
        self._order.cache_clear()

    @property
    def epoch(self) -> int:
        """Samples of an epoch: every picture once, and as many of the regularisation's."""
        return len(self.samples) * (2 if self.kept else 1)

    def sample(self, position: int) -> Sample:
        """The sample at a position of the run."""
        epoch, place = divmod(position, self.epoch)
        return self._order(epoch)[place]

    def words(self, sample: Sample, rng: np.random.Generator) -> str:
        """The words that go with a sample in one step."""
        return wording.caption_for(sample.item, self.wording, self.seed, rng)

    def caption(self, sample: Sample) -> str:
        """The first caption of a sample, as it stands."""
        return sample.item.captions[0] if sample.item.captions else wording.EMPTY

    def texts(self) -> list[str]:
        """Every text that a step may ask for, the empty one first."""
        items = [sample.item for sample in self.every()]
        plain = [self.caption(sample) for sample in self.held_out]
        return [*wording.texts_to_encode(items, self.wording, self.seed), *plain]

    def _order_of(self, epoch: int) -> list[Sample]:
        samples = list(self.samples)
        if self.kept:
            n = len(self.samples)
            turns = range(epoch * n, (epoch + 1) * n)
            samples += [self.kept[turn % len(self.kept)] for turn in turns]
        sizes = sorted({sample.transform.bucket for sample in samples})
        buckets = [sizes.index(sample.transform.bucket) for sample in samples]
        order = epoch_order(buckets, self.batch_size, epoch, self.seed)
        return [samples[i] for i in order]

    def _looked_at(self, source: str, regularisation: bool) -> list[Sample]:
        """The samples of a source; pictures that cannot be used are named and counted."""
        settings = self.settings
        split = None if regularisation else settings.split
        limit = None if regularisation else settings.limit
        copy = _streamed(settings, source, split, limit) if settings.stream else None

        def read() -> list[Item]:
            return captioned.read_dataset(
                source,
                caption_key=settings.captions.key,
                default_caption=settings.captions.default,
                alpha_masks=settings.alpha_masks,
                regularisation=regularisation,
                weight=settings.regularisation_weight if regularisation else 1.0,
                split=split,
                stream_to=copy,
                limit=limit,
            )

        # One process copies what is streamed; the others find it.
        items = read() if copy is None else one_on_each_machine_first(read)
        self._look_at_captions(items, source, regularisation)
        buckets = settings.buckets()
        samples, bad = [], 0
        for item in items:
            try:
                samples.append(_looked_at(item, buckets, settings.random_crop, self.seed))
            except BadPicture as error:
                if settings.strict:
                    raise
                log.warning("left out: %s", error)
                bad += 1
        if bad:
            log.warning("%d of %d pictures of %s are left out", bad, len(items), source)
        if not samples:
            raise UserError(f"{source} has no picture that can be trained on")
        return samples

    def _look_at_captions(self, items: Sequence[Item], source: str, regularisation: bool) -> None:
        """Say how many pictures have no words; UserError where there are none to learn at all.

        Pictures that regularise may well have none: what the model draws unasked is then kept.
        """
        without = sum(not any(item.captions) for item in items)
        if not without or self.settings.captions.default is not None:
            return
        if without == len(items) and not regularisation:
            raise UserError(
                f"no picture of data.source={source} has a caption; write them (.txt files or "
                'metadata.jsonl), or set data.captions.default, which all get ("": no words)'
            )
        log.warning("%d of %d pictures of %s have no caption", without, len(items), source)


def _streamed(
    settings: CaptionedSettings, source: str, split: str | None, limit: int | None
) -> Path:
    """Where the copied rows of a source lie; a local file that has changed is copied anew."""
    place = Path(source).expanduser()
    local = [path for path in (place, *place.rglob("*")) if path.is_file()]
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in local]
    told = repr((source, split, limit, sorted(facts)))
    return settings.cache / "rows" / hashlib.sha256(told.encode()).hexdigest()[:16]


def _looked_at(item: Item, buckets: Buckets, random_crop: bool, seed: int) -> Sample:
    read = captioned.in_memory(item)
    size = read_size(read.picture.read(), item.picture.name)
    transform = buckets.fit(size, crop_at(seed, item.key) if random_crop else CENTRE)
    if transform is None:
        raise BadPicture(
            f"{item.picture.name}: {size[0]}x{size[1]} is too small; set data.upscale or a lower "
            "data.resolution"
        )
    return Sample(item, transform, _key(read, transform))


def _key(item: Item, transform: Transform) -> str:
    """A hash of an item's bytes and of how it is cut."""
    digest = hashlib.sha256(item.picture.read())
    digest.update(transform.key.encode())
    if item.mask is not None:
        digest.update(b"alpha" if item.mask == captioned.ALPHA else item.mask.read())
    return digest.hexdigest()[:32]


# -- encoding --------------------------------------------------------------------------------


def cached_latents(data: Captioned, vae: AutoencoderKL, share: Share) -> Cache:
    """Mean, std and mask of every sample's latents; samples that fail are left out of `data`.

    They are encoded in the precision of the run and of the autoencoder, always as many of one size
    in a call (`parts`). Raises `UserError` for latents that are not finite (an autoencoder in half
    precision can overflow, and what it then says must not be kept), and where processes would train
    on different samples.
    """
    samples = sorted(data.every(), key=lambda sample: sample.transform.bucket)
    computed_in = torch.bfloat16 if data.precision == "bf16" else vae.dtype
    key = key_of(autoencoder.encoder_weights(vae), plain(vae.config), str(computed_in))
    cache = Cache(data.settings.cache / "latents" / key)

    @in_memory("while pictures were encoded")
    @torch.no_grad()
    def encode(indices: Sequence[int]) -> list[Entry | None]:
        asked = [samples[i] for i in indices]
        loaded = [(sample, _loaded(sample, data.settings.strict)) for sample in asked]
        sound = [(sample, picture) for sample, picture in loaded if picture is not None]
        entries: dict[str, Entry] = {}
        for bucket, alike in groupby(sound, lambda pair: pair[0].transform.bucket):
            for part, filled in parts(list(alike), _at_once(bucket)):
                x = torch.cat([to_tensor(s.transform.picture(p.pixels)) for s, p in filled])
                mean, std = autoencoder.encode(vae, x.to(vae.device, vae.dtype))
                for pair, *told in zip(part, mean, std, strict=False):
                    entries[pair[0].key] = _entry(*pair, *told)
        return [entries.get(sample.key) for sample in asked]

    most = max((_at_once(sample.transform.bucket) for sample in samples), default=1)
    with autoencoder.quick(vae, data.precision):
        fill(cache, [sample.key for sample in samples], encode, share, batch_size=most)
    data.leave_out({sample.key for sample in samples if sample.key not in cache})
    used = repr([(sample.key, sample.item.captions) for sample in data.every()])
    if len(set(share.told(hashlib.sha256(used.encode()).hexdigest()))) > 1:
        raise UserError(
            f"processes see different pictures or captions in data.source={data.settings.source}; "
            "share that folder, or make its copies the same"
        )
    return cache


def _at_once(bucket: tuple[int, int]) -> int:
    """How many pictures of a size go through the autoencoder in one call."""
    return max(1, min(AT_ONCE, PIXELS_AT_ONCE // (bucket[0] * bucket[1])))


def _loaded(sample: Sample, strict: bool) -> Picture | None:
    """A sample's picture, or None where it is bad."""
    try:
        read = captioned.in_memory(sample.item)
        if _key(read, sample.transform) != sample.key:
            raise BadPicture(f"{read.picture.name}: has changed since the run began; start again")
        return captioned.load(read)
    except BadPicture as error:
        if strict:
            raise
        log.warning("left out: %s", error)
        return None


def _entry(sample: Sample, picture: Picture, mean: Tensor, std: Tensor) -> Entry:
    """What is kept of a picture, whose latents' mean and std are [C, h, w] each."""
    if not (torch.isfinite(mean).all() and torch.isfinite(std).all()):
        raise UserError(
            f"{sample.item.picture.name}: its latents are not finite; use an autoencoder that "
            "works in this precision, or run.mixed_precision=no"
        )
    kept = {"mean": mean, "std": std}
    entry = {name: value.to("cpu", torch.half, copy=True) for name, value in kept.items()}
    if picture.mask is not None:
        mask = torch.tensor(sample.transform.mask(picture.mask)).float()[None, None] / 255
        entry["mask"] = F.interpolate(mask, size=mean.shape[-2:], mode="area")[0].half()
    return entry
