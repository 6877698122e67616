"""Ways to damage a safetensors file, by the dice that are given."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

NUMBERS = (0, -1, 1, 2, 3, 16, 2**31, 2**63, 10**30, 0.5, 1e308, float("nan"), float("inf"))
VALUES: tuple[Any, ...] = (
    *NUMBERS, None, True, "", "x", "é\x00\x1b", [], {}, [[]], {"x": {}}, "(a+)+$", {"(": 2},
    ["to_q"], {".*": 3}, {"(.*)*x": 3},
)  # fmt: skip
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "?", "")

Mutation = Callable[[bytes, random.Random], bytes]


def flip(contents: bytes, dice: random.Random) -> bytes:
    """Some bytes changed: anywhere, or in the header."""
    changed = bytearray(contents)
    (length,) = struct.unpack("<Q", contents[:8])
    end = dice.choice([len(changed), 8 + length, 8])
    for _ in range(dice.choice([1, 1, 2, 5])):
        changed[dice.randrange(end)] = dice.randrange(256)
    return bytes(changed)


def cut(contents: bytes, dice: random.Random) -> bytes:
    """A piece left out, or there twice, or something behind the end."""
    start, end = sorted(dice.randrange(len(contents) + 1) for _ in range(2))
    return dice.choice(
        [contents[:start], contents[:start] + contents[end:], contents[:end] + contents[start:],
         contents + bytes(dice.randrange(1, 20))]
    )  # fmt: skip


def header_of(contents: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", contents[:8])
    return json.loads(contents[8 : 8 + length]), contents[8 + length :]


def with_header(header: Any, tensors: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + tensors


def entry(contents: bytes, dice: random.Random) -> bytes:
    """A tensor's entry changed: its shape, dtype, place or name."""
    header, tensors = header_of(contents)
    keys = [key for key in header if key != "__metadata__"]
    key, other = dice.choice(keys), dice.choice(keys)
    shape = header[key]["shape"]
    what = dice.randrange(9)
    if what == 0 and shape:
        shape[dice.randrange(len(shape))] = dice.choice(NUMBERS)
    elif what == 1:
        header[key]["shape"] = dice.choice([shape[::-1], [*shape, 1], shape[1:], [1, *shape], []])
    elif what == 2:
        header[key]["dtype"] = dice.choice(DTYPES)
    elif what == 3:
        header[key]["data_offsets"][dice.randrange(2)] = dice.choice(NUMBERS)
    elif what == 4:
        header[key], header[other] = header[other], header[key]
    elif what == 5:
        header[mangled(key, dice)] = header.pop(key)
    elif what == 6:
        header[mangled(key, dice)] = header[key]
    elif what == 7:
        header[key] = dice.choice(VALUES)
    else:
        del header[key]
    return with_header(header, tensors)


def mangled(key: str, dice: random.Random) -> str:
    """A key with a piece taken from it, doubled or replaced."""
    pieces = key.split(".")
    place = dice.randrange(len(pieces))
    word = dice.choice(
        ["", "..", "x", "text_encoder_2", "alpha", "dora_scale", "0", "lora_A", "\x00"]
    )
    return ".".join(
        dice.choice(
            [[*pieces[:place], *pieces[place + 1 :]], [*pieces[:place], word, *pieces[place + 1 :]],
             [*pieces, word]]
        )
    )  # fmt: skip


def values(contents: bytes, dice: random.Random) -> bytes:
    """One number of a tensor that is none, or is very large or 0."""
    header, tensors = header_of(contents)
    spans = [value for key, value in header.items() if key != "__metadata__"]
    start, end = dice.choice(spans)["data_offsets"]
    number = dice.choice([float("nan"), float("inf"), 3e38, -1.0, 0.0])
    place = start + 4 * dice.randrange(max(1, (end - start) // 4))
    return with_header(header, tensors[:place] + struct.pack("<f", number) + tensors[place + 4 :])
