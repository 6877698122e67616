"""What an encoder said, kept: named entries of tensors in safetensors shards.

An encoder is a third of a training step's work and always answers the same, so it runs once per
picture or caption. Of a picture the mean *and* standard deviation of its latents are kept: each
step draws a fresh latent from them.

Legend
    key      names an entry by everything that decides it (a picture's bytes, how it was cut); the
             folder of a cache is named by the encoder, see `key_of`
    entry    a few tensors by name, as {"mean": [C, h, w], "std": [C, h, w]}
    shard    a file with some hundreds of entries and the CRC-32 of each tensor

A shard appears whole or not at all, under a name of its own: an interrupted run goes on with what
is missing, and two writers at once only do some work twice. Whatever is damaged is named and made
again; what is whole beside it is kept. Processes that share the folder share the work, a minute's
at a time; those that do not each do all of it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from ldm_pipeline.data.writing import in_one_line, writing
from ldm_pipeline.errors import UserError

log = logging.getLogger(__name__)

MOST_ENTRIES = 1024
"""Entries of a shard; a shard is also closed after `MOST_SECONDS`, so that little is lost and
processes soon hear of each other."""
MOST_SECONDS = 60.0
SUMS = "crc32"
FORMAT = 2
"""Of what is kept; a change of what is encoded, and how, takes the next number."""

Entry = dict[str, Tensor]
Encode = Callable[[Sequence[int]], Sequence[Entry | None]]


@dataclass(frozen=True)
class Share:
    """Which of several processes this one is, and how they tell each other a text.

    `told` waits for all; it returns what each said, in their order, without empty texts.
    """

    rank: int = 0
    processes: int = 1
    told: Callable[[str], list[str]] = lambda text: [text] if text else []

    @contextmanager
    def alike(self) -> Iterator[None]:
        """Within the block each process works for itself; at its end all raise what one has.

        That is so of `UserError` and `OSError`. Without, the others would wait for one that is
        gone.
        """
        error: Exception | None = None
        try:
            yield
        except (UserError, OSError) as caught:
            error = caught
        why = "" if error is None else in_one_line(error)
        mistakes = self.told(why if isinstance(error, UserError) else "")
        failures = self.told(why if isinstance(error, OSError) else "")
        if error is not None:
            raise error
        if mistakes:
            raise UserError(mistakes[0])
        if failures:
            raise OSError(failures[0])


ALONE = Share()


def key_of(weights: Mapping[str, Tensor], *facts: object) -> str:
    """A hash of the encoder's weights and of whatever else decides its answers."""
    digest = hashlib.sha256(repr((FORMAT, *facts)).encode())
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class Cache:
    """The entries of one encoder's folder, read from memory-mapped shards when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards: dict[str, Any] = {}
        self._where: dict[str, tuple[str, list[str]]] = {}
        for leftover in folder.glob(".*.unfinished"):
            with suppress(FileNotFoundError):
                if time.time() - leftover.stat().st_mtime > 3600:  # of a killed run
                    leftover.unlink()
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def __getitem__(self, key: str) -> Entry:
        """The entry's tensors; raises KeyError where there is none."""
        shard, parts = self._where[key]
        return _entry(self._shards[shard], key, parts)

    def add(self, entries: Mapping[str, Entry]) -> None:
        """Write the entries as one shard; raises `NotWritten` where the disk takes none."""
        if not entries:
            return
        tensors = {
            f"{key}/{part}": tensor.detach().cpu().contiguous()
            for key, entry in entries.items()
            for part, tensor in entry.items()
        }
        sums = {name: _sum(tensor) for name, tensor in tensors.items()}
        name = uuid.uuid4().hex
        path, unfinished = self.folder / f"{name}.safetensors", self.folder / f".{name}.unfinished"
        with writing(path, unfinished):
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, unfinished, metadata={SUMS: json.dumps(sums)})
            unfinished.replace(path)
        self.refresh()

    def refresh(self) -> None:
        """Find the shards that others wrote; every new one is checked, tensor by tensor."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in self._shards:
                self._take(path)

    def _take(self, path: Path) -> None:
        """Make a shard's entries known; of a damaged one those that are whole, written anew."""
        try:
            shard = safe_open(path, framework="pt")
            entries, damaged = _looked_through(shard)
        except OSError as error:  # nothing is known about its content
            log.warning("%s cannot be read (%s)", path, error)
            return
        except (SafetensorError, ValueError, AttributeError) as error:
            log.warning("%s is damaged and is made again (%s)", path, error)
            path.unlink(missing_ok=True)
            return
        if not damaged:
            self._shards[path.name] = shard
            self._where |= {key: (path.name, parts) for key, parts in entries.items()}
            return
        told = ", ".join(sorted(damaged)[:3]) + (", …" if len(damaged) > 3 else "")
        log.warning("%s: %d damaged, made again: %s", path, len(damaged), told)
        whole = {key: parts for key, parts in entries.items() if key not in damaged}
        rescued = {key: _entry(shard, key, parts) for key, parts in whole.items()}
        path.unlink(missing_ok=True)
        self.add(rescued)


def fill(
    cache: Cache,
    keys: Sequence[str],
    encode: Encode,
    share: Share = ALONE,
    *,
    batch_size: int = 64,
    what: str = "pictures",
) -> None:
    """Add the entries of `keys` that are missing; `encode` gives those of some indices of `keys`,
    None where there is none to be had.

    Processes that miss the same entries have one folder: each encodes a part, and all read the
    whole. What is then still missing is in a folder that this process does not see. After every
    shard they tell each other how far they are, so that the quicker one does more, and that none
    goes on for long where another has failed. Stopped at any moment, the same call goes on from
    there. Raises, in all processes, the `UserError` or `OSError` of any.
    """
    first: dict[str, int] = {}
    for index, key in enumerate(keys):
        first.setdefault(key, index)
    failed: set[str] = set()
    rounds, shared = 0, True
    with tqdm(desc=f"encoding {what}", dynamic_ncols=True, delay=0.1) as bar:
        while True:
            missing = [key for key in first if key not in cache and key not in failed]
            told = share.told(_digest(missing))
            if set(told) == {_digest([])}:
                return
            if rounds and shared and len(set(told)) > 1:
                log.warning("%s is not shared by all processes: each encodes for itself",
                            cache.folder)  # fmt: skip
                shared = False
            alike = [rank for rank, digest in enumerate(told) if digest == told[share.rank]]
            own = [first[key] for key in missing[alike.index(share.rank) :: len(alike)]]
            bar.total = bar.n + len(own)
            with share.alike():
                done = _encode(cache, keys, own, encode, batch_size, bar.update)
            bad = "\n".join(keys[i] for i in done if keys[i] not in cache)
            failed |= {key for answer in share.told(bad) for key in answer.split("\n")}
            cache.refresh()
            rounds += 1


def _digest(keys: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


def _encode(
    cache: Cache,
    keys: Sequence[str],
    own: Sequence[int],
    encode: Encode,
    batch_size: int,
    tick: Callable[[int], object],
) -> Sequence[int]:
    """Add one shard with entries of the keys at `own`; those that were asked for."""
    pending: dict[str, Entry] = {}
    began, asked = time.monotonic(), 0
    try:
        while asked < len(own) and len(pending) < MOST_ENTRIES:
            batch = own[asked : asked + batch_size]
            for index, entry in zip(batch, encode(batch), strict=True):
                if entry is not None:
                    pending[keys[index]] = entry
            asked += len(batch)
            tick(len(batch))
            if time.monotonic() - began > MOST_SECONDS:
                break
    finally:
        cache.add(pending)
    return own[:asked]


def _entry(shard: Any, key: str, parts: Sequence[str]) -> Entry:
    return {part: shard.get_tensor(f"{key}/{part}") for part in parts}


def _looked_through(shard: Any) -> tuple[dict[str, list[str]], set[str]]:
    """The parts of every entry of a shard, and the entries that are not as they were written."""
    sums = json.loads((shard.metadata() or {}).get(SUMS, "null"))
    entries: dict[str, list[str]] = {}
    damaged = set()
    for name, expected in sums.items():
        key, _, part = name.rpartition("/")
        entries.setdefault(key, []).append(part)
        if _sum(shard.get_tensor(name)) != expected:
            damaged.add(key)
    return entries, damaged


def _sum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's shape, type and bytes."""
    about = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    content: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return zlib.crc32(content, zlib.crc32(about))
