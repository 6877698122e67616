"""LoRA files on the command line: FILE or FILE:WEIGHT, looked at before anything loads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.files import check_weight, inspect

TAUGHT = ("modelspec.trigger_phrase", "ss_tag_frequency")
"""Entries of a LoRA's header that hold words."""


def read_loras(texts: Sequence[str], flag: str = "--lora=") -> tuple[tuple[str, float], ...]:
    """The files and weights that `texts`, behind `flag`, name as FILE or FILE:WEIGHT.

    Only a number after the last colon is a weight, so that C:\\a.safetensors is a file. Raises
    `UserError` for a weight that is not finite and a file that is missing or no LoRA.
    """
    loras = []
    for text in texts:
        file, colon, last = text.rpartition(":")
        weight = number(last) if colon else None
        if weight is None:
            if colon and Path(file).is_file():
                raise UserError(f"{flag}{text}: {last!r} is no weight; write {file}:0.8")
            file, weight = text, 1.0
        if not file:
            raise UserError(f"{flag}{text} names no file; name a LoRA")
        check_weight(file, weight)
        inspect(file)
        loras.append((file, weight))
    return tuple(loras)


def taught_words(loras: Sequence[tuple[str, float]]) -> set[str]:
    """The words, in lower case, that the headers of LoRAs say they were trained on."""
    headers = [inspect(file).texts for file, _ in loras]
    told = (str(texts.get(key, "")) for texts in headers for key in TAUGHT)
    return set(re.findall(r"[^\W\d_]+", " ".join(told).lower()))


def number(text: str) -> float | None:
    """The number that `text` is, or None."""
    try:
        return float(text)
    except ValueError:
        return None
