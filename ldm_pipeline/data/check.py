"""What there is to know about a dataset before any time is spent on it.

Every picture is decoded once, in threads. What would keep pictures from being learnt is an error;
what is likely a mistake is a warning.

Legend
    fill    how many pictures a bucket holds, and how many of them fill no batch of its own (they
            share a step with those of other buckets)
    pieces  words, digits and punctuation marks, as CLIP's tokenizer splits a text first; each
            becomes one token or more, so they are counted where no tokenizer is given
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ldm_pipeline.data.buckets import Buckets, Size
from ldm_pipeline.data.captioned import Item, is_picture, load, read_dataset
from ldm_pipeline.data.sources import BadDataset, BadPicture, list_folder

CLIP_TOKENS = 77
"""What CLIP reads, with the two tokens for begin and end."""

PIECES = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|(?:[^\s\w]|_)+", re.IGNORECASE)

NAMED = 5
"""Of many pictures with one problem, so many are named."""

Tokens = Callable[[str], int]


@dataclass(frozen=True)
class Encoded:
    """The size of what the model called `name` makes of pictures and texts, kept in 16 bits.

    `channels` has a place of the latents, which is 8 pixels wide and high, each with its mean and
    its spread; `text_width` has each token of a text.
    """

    name: str = "Stable Diffusion 1.x"
    channels: int = 4
    text_width: int = 768

    def bytes(self, pixels: int, texts: int) -> int:
        """Of the latents of so many pixels, and of so many texts."""
        return pixels // 64 * self.channels * 2 * 2 + texts * CLIP_TOKENS * self.text_width * 2


@dataclass(frozen=True)
class Report:
    """The findings; `str` is what a person reads.

    pictures            in the dataset, readable or not
    captions, masks     how many there are of them
    buckets             (size, pictures) of every bucket in use
    encoded             the model that training is estimated for
    cache_bytes         of the latents and the captions' embeddings, estimated, with one wording for
                        each caption
    memory              what a training step takes, as a person reads it; "" where nobody told
    errors, warnings    one line each
    """

    pictures: int = 0
    captions: int = 0
    masks: int = 0
    batch_size: int = 1
    buckets: tuple[tuple[Size, int], ...] = ()
    encoded: Encoded = Encoded()
    cache_bytes: int = 0
    memory: str = ""
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every picture that fits a bucket comes once; the last may be smaller."""
        return -(-sum(n for _, n in self.buckets) // self.batch_size)

    def __str__(self) -> str:
        lines = [
            f"pictures         {self.pictures}, {self.masks} with a mask",
            f"captions         {self.captions}",
            f"steps per epoch  {self.steps_per_epoch} at batch size {self.batch_size}",
            f"cache            about {self.cache_bytes / 1e6:.1f} MB, as for {self.encoded.name}",
        ]
        if self.memory:
            lines.append(f"memory           {self.memory}")
        if self.buckets:
            lines += ["", f"{'bucket':>11} {'pictures':>9} {'left over':>10}"]
        for (width, height), n in self.buckets:
            lines.append(f"{f'{width}x{height}':>11} {n:>9} {n % self.batch_size:>10}")
        lines += ["", *(f"error: {error}" for error in self.errors)]
        lines += [f"warning: {warning}" for warning in self.warnings]
        lines += [f"errors: {len(self.errors)}, warnings: {len(self.warnings)}"]
        # A file's name may hold anything, also what a terminal obeys.
        return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)


@dataclass(frozen=True)
class Facts:
    """What decoding told about one item: its size and a hash of its pixels, or what is wrong."""

    key: str
    size: Size = (0, 0)
    pixels: str = ""
    has_mask: bool = False
    counts_nowhere: bool = False
    problem: str | None = None


def check(
    source: str | Path,
    buckets: Buckets,
    batch_size: int = 1,
    tokens: Tokens | None = None,
    alpha_masks: bool = False,
    *,
    split: str | None = None,
    caption_key: str | None = None,
    encoded: Encoded = Encoded(),
) -> Report:
    """Read and decode the whole dataset at `source`, and report.

    `tokens` counts a caption's tokens exactly; `encoded` tells the size of the caches; the rest is
    as `read_dataset` has it. A damaged dataset is an error of the report; raises `UserError` only
    where `source` is no dataset at all.
    """
    try:
        items = read_dataset(source, alpha_masks=alpha_masks, split=split, caption_key=caption_key)
    except BadDataset as error:
        return Report(batch_size=batch_size, encoded=encoded, errors=(str(error),))
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        facts = list(threads.map(look, items))
    sound = [fact for fact in facts if fact.problem is None]
    chosen = {fact.key: buckets.choose(fact.size) for fact in sound}
    fill = Counter(bucket for bucket in chosen.values() if bucket is not None)
    errors = [fact.problem for fact in facts if fact.problem is not None]
    too_small = [key for key, bucket in chosen.items() if bucket is None]
    if sound and len(too_small) == len(sound):
        width, height = max((fact.size for fact in sound), key=prod)
        errors.append(
            f"every picture is too small (the largest has {width}x{height}); choose a smaller"
            " --resolution, or --upscale"
        )
    if items and not any(any(item.captions) for item in items):
        errors.append("no picture has a caption, in metadata.jsonl or in .txt files beside them")
    texts = {text for item in items for text in item.captions} | {""}
    pixels = sum(n * width * height for (width, height), n in fill.items())
    return Report(
        pictures=len(items),
        captions=sum(len(item.captions) for item in items),
        masks=sum(fact.has_mask for fact in sound),
        batch_size=batch_size,
        buckets=tuple(sorted(fill.items())),
        encoded=encoded,
        cache_bytes=encoded.bytes(pixels, len(texts)),
        errors=tuple(errors),
        warnings=(
            *_about("too small for every bucket, so left out", too_small),
            *_about_captions(items, tokens),
            *_about_pictures(sound),
            *_about("not used, as nothing belongs to it or names it", unused(source, items)),
        ),
    )


def look(item: Item) -> Facts:
    """Decode one item; what is wrong with it is told, not raised."""
    try:
        picture = load(item)
    except BadPicture as error:
        return Facts(item.key, problem=str(error))
    mask = picture.mask
    digest = hashlib.blake2b(repr(picture.size).encode(), digest_size=16)
    digest.update(picture.pixels.tobytes())
    nowhere = mask is not None and not mask.any()
    return Facts(item.key, picture.size, digest.hexdigest(), mask is not None, nowhere)


def least_tokens(text: str) -> int:
    """The fewest tokens that CLIP can make of `text`, begin and end included: one for a piece."""
    return len(PIECES.findall(text)) + 2


def unused(source: str | Path, items: Sequence[Item]) -> list[str]:
    """Pictures and .txt files in a folder that no item uses; [] for shards and tables."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return []
    files = list_folder(folder)
    used = {item.picture for item in items} | {item.mask for item in items}
    stems = {Path(item.key).with_suffix("") for item in items}
    return [
        name
        for name, file in files.items()
        if (is_picture(name) and file not in used)
        or (name.endswith(".txt") and Path(name).with_suffix("") not in stems)
    ]


def _about_captions(items: Sequence[Item], tokens: Tokens | None) -> Iterable[str]:
    yield from _about("without a caption", [item.key for item in items if not item.captions])
    empty = [item.key for item in items if item.captions and not all(item.captions)]
    yield from _about("with an empty caption", empty)
    count = tokens or least_tokens
    long = [item.key for item in items if any(count(t) > CLIP_TOKENS for t in item.captions)]
    more = "certainly " if tokens is None else ""
    yield from _about(
        f"with a caption of {more}more than {CLIP_TOKENS} tokens, whose end is not read", long
    )


def _about_pictures(sound: Sequence[Facts]) -> Iterable[str]:
    alike = defaultdict(list)
    for fact in sound:
        alike[fact.pixels].append(fact.key)
    groups = [" = ".join(keys) for keys in alike.values() if len(keys) > 1]
    yield from _about("groups of pictures with the same pixels", groups)
    nowhere = [fact.key for fact in sound if fact.counts_nowhere]
    yield from _about("with a mask that is black everywhere", nowhere)


def _about(what: str, keys: Sequence[str]) -> Iterable[str]:
    """One line that counts and names, or none where there is nothing to name."""
    if keys:
        names = ", ".join(keys[:NAMED]) + (", …" if len(keys) > NAMED else "")
        yield f"{len(keys)} {what}: {names}"
