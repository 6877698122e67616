"""Tensors as stretches of bytes in safetensors files: renamed, cut and joined without being read.

A model of many gigabytes changes its layout in this way within a few megabytes of memory, and
whatever its dtype is, no bit of it changes.

Legend
    span     (file, first byte, end)
    rows     a tensor's first dimension; its bytes are those of its rows, one after the other
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_pipeline.errors import UserError
from ldm_pipeline.models.headers import BYTES, read_header
from ldm_pipeline.replacing import replacing

if TYPE_CHECKING:
    import torch

Span = tuple[Path, int, int]
PIECE = 16 * 2**20
"""Bytes that are copied at a time."""

TORCH = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""torch's names of the format's dtypes."""


@dataclass(frozen=True)
class Stored:
    """A tensor that lies in files. `turned` is a matrix whose bytes are those of its transpose."""

    dtype: str
    shape: tuple[int, ...]
    spans: tuple[Span, ...]
    turned: bool = False

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(end - begin for _, begin, end in self.spans)

    def shaped(self, shape: tuple[int, ...]) -> Stored:
        """The same numbers in another shape."""
        assert math.prod(shape) == math.prod(self.shape)
        return replace(self, shape=shape)

    def transposed(self) -> Stored:
        """The matrix with rows and columns exchanged."""
        return replace(self, shape=self.shape[::-1], turned=not self.turned)

    def thirds(self) -> tuple[Stored, Stored, Stored]:
        """Its rows in three parts of one height, as queries, keys and values are stacked."""
        shape, size = (self.shape[0] // 3, *self.shape[1:]), self.size // 3
        first, second, third = (
            replace(self, shape=shape, spans=_cut(self.spans, k * size, (k + 1) * size))
            for k in range(3)
        )
        return first, second, third


def _cut(spans: Iterable[Span], begin: int, end: int) -> tuple[Span, ...]:
    """The bytes from `begin` to `end` of all that is in `spans`."""
    found, at = [], 0
    for file, first, last in spans:
        low, high = max(begin - at, 0), min(end - at, last - first)
        if low < high:
            found.append((file, first + low, first + high))
        at += last - first
    return tuple(found)


def joined(parts: Iterable[Stored]) -> Stored:
    """Tensors of one dtype and width, one below the other."""
    parts = list(parts)
    height = sum(part.shape[0] for part in parts)
    spans = tuple(span for part in parts for span in part.spans)
    return replace(parts[0], shape=(height, *parts[0].shape[1:]), spans=spans)


def stored(file: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file, by name; `UserError` for any other file."""
    header = read_header(file)
    if unknown := sorted(set(header.dtypes.values()) - BYTES.keys()):
        raise UserError(f"{file} has numbers of a kind that is not known here: {unknown[0]}")
    return {
        key: Stored(header.dtypes[key], shape, ((file, *header.places[key]),))
        for key, shape in header.shapes.items()
    }


def write(file: Path, tensors: Mapping[str, Stored], texts: Mapping[str, str]) -> None:
    """Write a safetensors file, complete or not at all.

    Tensors lie in the order of the format's own library: larger dtypes first, then by name.
    """
    order = sorted(tensors, key=lambda key: (-BYTES[tensors[key].dtype], tensors[key].dtype, key))
    entries: dict[str, object] = {"__metadata__": dict(texts)} if texts else {}
    at = 0
    for key in order:
        tensor = tensors[key]
        place = [at, at + tensor.size]
        entries[key] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": place}
        at = place[1]
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    with replacing(file) as temporary, temporary.open("xb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        for key in order:
            for piece in _bytes(tensors[key]):
                out.write(piece)


def to_torch(tensor: Stored) -> torch.Tensor:
    """The tensor, read into memory on the CPU, in its own dtype."""
    import torch

    if tensor.dtype not in TORCH:
        raise UserError(f"torch has no dtype for {tensor.dtype}")
    raw = bytearray().join(_bytes(tensor))
    flat = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
    return flat.view(getattr(torch, TORCH[tensor.dtype])).reshape(tensor.shape)


def _bytes(tensor: Stored) -> Iterator[bytes | memoryview]:
    """The tensor's bytes in pieces."""
    if tensor.turned:
        yield _turned(tensor)
        return
    for file, begin, end in tensor.spans:
        with file.open("rb") as source:
            source.seek(begin)
            for at in range(begin, end, PIECE):
                yield source.read(min(PIECE, end - at))


def _turned(tensor: Stored) -> memoryview:
    """The bytes of a matrix that lies transposed in its file."""
    import numpy as np

    raw = b"".join(_bytes(replace(tensor, turned=False)))
    numbers = np.frombuffer(raw, dtype=f"V{BYTES[tensor.dtype]}").reshape(tensor.shape[::-1])
    return memoryview(np.ascontiguousarray(numbers.T).tobytes())
