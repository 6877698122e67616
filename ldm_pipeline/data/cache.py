"""Latents computed once: the mean and spread of every picture's latents, in safetensors shards.

The autoencoder is a third of a training step's work and always answers the same, so it runs once
per picture. Mean *and* standard deviation are kept: each step draws a fresh latent from them.

Legend
    key      hash of everything that the latents depend on; it names the cache's folder
    shard    a file with `mean` and `std` of up to `SHARD` pictures, [n, C, h, w], float16

An interrupted run goes on with the first missing shard; a shard appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

SHARD = 1024

Encode = Callable[[range], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Share:
    """Which of several processes this one is, and how it waits for the others."""

    rank: int = 0
    processes: int = 1
    wait: Callable[[], None] = lambda: None


ALONE = Share()


def key_of(weights: Mapping[str, Tensor], *facts: object) -> str:
    """A hash of the encoder's weights and of whatever else decides the latents."""
    digest = hashlib.sha256(repr(facts).encode())
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def latents(
    folder: Path, n: int, encode: Encode, share: Share = ALONE, batch_size: int = 64
) -> tuple[Tensor, Tensor]:
    """(mean, std) of pictures 0 … n-1, each [n, C, h, w] in float16; what is missing is encoded.

    `encode(range)` gives both for some pictures. A shard that cannot be read is made again.
    Several processes each encode their `share` of the shards, and all read the whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pieces = [range(first, min(first + SHARD, n)) for first in range(0, n, SHARD)]
    own = pieces[share.rank :: share.processes]
    total = sum(map(len, own))
    with tqdm(total=total, desc="encoding pictures", unit="picture", dynamic_ncols=True) as bar:
        for piece in own:
            if _read(_path(folder, piece), len(piece)) is None:
                parts = [
                    encode(piece[i : i + batch_size]) for i in range(0, len(piece), batch_size)
                ]
                means, stds = zip(*parts, strict=True)
                shard = {"mean": torch.cat(means).half(), "std": torch.cat(stds).half()}
                unfinished = folder / f".{piece.start}-{os.getpid()}.unfinished"
                save_file(shard, unfinished)
                unfinished.replace(_path(folder, piece))
            bar.update(len(piece))
    share.wait()
    shards = [_read(_path(folder, piece), len(piece)) for piece in pieces]
    whole = [shard for shard in shards if shard is not None]
    assert len(whole) == len(pieces), "every process encoded its share"
    return torch.cat([s["mean"] for s in whole]), torch.cat([s["std"] for s in whole])


def _path(folder: Path, piece: range) -> Path:
    return folder / f"latents-{piece.start:08d}-{piece.stop:08d}.safetensors"


def _read(path: Path, n: int) -> dict[str, Tensor] | None:
    """A shard of `n` pictures, or None where it is missing or damaged."""
    if not path.is_file():
        return None
    try:
        shard = load_file(path)
    except (OSError, SafetensorError):
        tqdm.write(f"{path} is damaged and is made again")
        return None
    whole = shard.keys() == {"mean", "std"} and all(len(value) == n for value in shard.values())
    return shard if whole else None
