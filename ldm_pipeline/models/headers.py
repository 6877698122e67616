"""The header of a safetensors file: names, shapes and texts, read without torch or any tensor.

A file is 8 bytes (the header's length, little-endian), the header (JSON), and the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm_pipeline.errors import UserError

LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors format."""

BYTES: Mapping[str, int] = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1),
}
"""Bytes of one number, by the format's name of its dtype."""

PICKLED = (b"PK\x03\x04", b"\x80")
"""How a pickle begins, as torch writes it today (a zip archive) and as it wrote it before."""


@dataclass(frozen=True)
class FileHeader:
    """Each tensor's shape, dtype (as the format spells it: F32, BF16, …) and place in the file
    (first byte, end), and the texts."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    texts: Mapping[str, Any]
    places: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def read_header(file: Path) -> FileHeader:
    """The header of `file`; `UserError` where it is damaged, cut off or is something else.

    Every tensor must have as many bytes as its shape and dtype say, and all of them together must
    fill the file, none twice.
    """
    try:
        if not file.is_file():
            raise ValueError("it is no file")
        size = file.stat().st_size
        if not size:
            raise ValueError("it is empty")
        with file.open("rb") as stream:
            start = stream.read(8)
            (length,) = struct.unpack("<Q", start)
            if length > min(LARGEST_HEADER, size - 8):
                if start.startswith(PICKLED):
                    raise ValueError("it is a pickle under this name, which can run any program")
                raise ValueError("its header is longer than the file")
            entries = json.loads(stream.read(length))
        texts = entries.pop("__metadata__", {})
        header = FileHeader(
            {key: tuple(int(side) for side in entry["shape"]) for key, entry in entries.items()},
            {key: str(entry["dtype"]) for key, entry in entries.items()},
            dict(texts),
            {key: _place(entry["data_offsets"], 8 + length) for key, entry in entries.items()},
        )
        _check_places(header, 8 + length, size)
        return header
    except RecursionError:
        raise UserError(f"{file} is no safetensors file: its header never ends") from None
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, struct.error,
    ) as error:  # fmt: skip
        raise UserError(
            f"{file} is no whole safetensors file, and no other files are opened: {error}"
        ) from error


def _place(offsets: Any, data: int) -> tuple[int, int]:
    begin, end = (int(offset) for offset in offsets)
    return data + begin, data + end


def _check_places(header: FileHeader, data: int, size: int) -> None:
    """ValueError where the tensors' bytes are not the file's, one after the other."""
    at = data
    for key, (begin, end) in sorted(header.places.items(), key=lambda item: item[1]):
        shape, dtype = header.shapes[key], header.dtypes[key]
        if min(shape, default=0) < 0:
            raise ValueError(f"{key!r} has shape {shape}")
        if begin != at:
            raise ValueError(f"{key!r} begins at byte {begin} and should at {at}")
        if dtype in BYTES and end - begin != math.prod(shape) * BYTES[dtype]:
            raise ValueError(f"{key!r} has {end - begin} bytes, which is not {shape} of {dtype}")
        at = end
    if at != size:
        raise ValueError(f"it should have {at} bytes and has {size}")
