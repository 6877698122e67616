"""What goes through an encoder once: in which parts, and the texts' embeddings that are kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from ldm_pipeline.data.cache import Cache, Entry, Share, fill, key_of
from ldm_pipeline.models.conditioning import Conditioning
from ldm_pipeline.too_large import in_memory

T = TypeVar("T")
AT_ONCE = 8
"""Texts, or small pictures, that go through an encoder in one call."""


def parts(rows: Sequence[T], count: int) -> Iterator[tuple[list[T], list[T]]]:
    """`rows` in parts of `count`, and the same filled up to `count` with their last.

    What a network says of a row may depend, in its last bits, on how many rows there are, as matrix
    products of other sizes round otherwise; with as many in every call it is what it would be among
    others, so that an entry which is encoded anew has the same bits.
    """
    for first in range(0, len(rows), count):
        part = list(rows[first : first + count])
        yield part, part + part[-1:] * (count - len(part))


def cached_texts(
    texts: Sequence[str], folder: Path, conditioning: Conditioning, share: Share
) -> Cache:
    """What the text encoders say to every text, as the UNet is told it, under `text_key`.

    Always as many are encoded in a call, as of pictures.
    """
    encoders = conditioning.encoders
    rules = [
        (each.backend_tokenizer.to_str(), each.pad_token_id, each.model_max_length)
        for each in conditioning.tokenizers
    ]
    made = [(plain(each.config.to_dict()), str(each.dtype)) for each in encoders.values()]
    weights = {
        f"{component}.{name}": value
        for component, encoder in encoders.items()
        for name, value in encoder.state_dict().items()
    }
    key = key_of(weights, rules, made, conditioning.zero_empty_prompt)
    cache = Cache(folder / "texts" / key)

    @in_memory("while captions were encoded")
    @torch.no_grad()
    def encode(indices: Sequence[int]) -> list[Entry]:
        entries: list[Entry] = []
        for part, filled in parts([texts[i] for i in indices], AT_ONCE):
            told = conditioning.encode(conditioning.tokens(filled))
            for row in range(len(part)):
                entries.append(
                    {name: rows[row].to("cpu", copy=True) for name, rows in told.items()}
                )
        return entries

    fill(cache, [text_key(t) for t in texts], encode, share, batch_size=32, what="captions")
    return cache


def plain(config: Mapping[str, object]) -> list[tuple[str, object]]:
    """What of an encoder's configuration decides its answers, in a fixed order."""
    neutral = ("dtype", "torch_dtype", "transformers_version", "architectures")
    fields = {k: v for k, v in config.items() if not k.startswith("_") and k not in neutral}
    return sorted(fields.items())


def text_key(words: str) -> str:
    """The key of a text in a cache of embeddings."""
    return hashlib.sha256(words.encode()).hexdigest()[:32]
