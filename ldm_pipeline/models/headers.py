"""The header of a safetensors file: names, shapes and texts, read without torch or any tensor.

A file is 8 bytes (the header's length, little-endian), the header (JSON), and the tensors' bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm_pipeline.errors import UserError

LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors format."""


@dataclass(frozen=True)
class FileHeader:
    """Each tensor's shape and dtype (as the format spells it: F32, BF16, …), and the texts."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    texts: Mapping[str, Any]


def read_header(file: Path) -> FileHeader:
    """The header of `file`; `UserError` where it is damaged, cut off or is something else."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(LARGEST_HEADER, size - 8):
                raise ValueError("its header is longer than the file")
            entries = json.loads(stream.read(length))
        texts = entries.pop("__metadata__", {})
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"it should have {8 + length + end} bytes and has {size}")
        return FileHeader(
            {key: tuple(int(side) for side in entry["shape"]) for key, entry in entries.items()},
            {key: str(entry["dtype"]) for key, entry in entries.items()},
            dict(texts),
        )
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError,
        struct.error,
    ) as error:  # fmt: skip
        raise UserError(
            f"{file} is no whole safetensors file, and no other files are opened: {error}"
        ) from error
