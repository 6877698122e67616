"""What `ldm lora info` prints of a LoRA. Texts of its header are strangers': they are cleaned."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ldm_pipeline.commands.info import size
from ldm_pipeline.lora.layouts.families import family_of
from ldm_pipeline.lora.notes import KEY as LCM
from ldm_pipeline.lora.notes import read_note
from ldm_pipeline.lora.targets import Layout
from ldm_pipeline.lora.weights import MAGNITUDE, Header, LoraWeights

WORDS = 12
"""Of the words that it was trained on, so many are shown."""

LONGEST = 200
"""Characters of one text of the header."""


def describe(header: Header, weights: LoraWeights) -> Iterator[str]:
    """The lines: what it is, its base, its words, and each component's ranks and targets."""
    total = sum(file.stat().st_size for file in header.files.values())
    count = sum(tensor.numel() for tensor in weights.tensors.values())
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in weights.tensors.values()})
    yield f"{header.path}: {kind(header, weights)} in {header.layout} layout, {size(total)}"
    yield f"parameters: {count:,}, {', '.join(dtypes)}"
    yield f"base model: {base_model(header)}"
    yield f"trained words: {trained_words(header.texts)}"
    if LCM in header.texts:
        note = read_note(header.path)
        base = "a model" if note.base is None else clean(note.base)
        yield (
            f"few steps: draws with --lcm; distilled from {base}, original_steps"
            f" {note.original_steps}, timestep_scaling {note.timestep_scaling:g}, spacing"
            f" {note.spacing}"
        )
    for component, layout in weights.layouts.items():
        yield f"{component}: {len(layout.slots)} modules, {numbers(layout)}"
        yield f"  targets: {targets(layout)}"


def kind(header: Header, weights: LoraWeights) -> str:
    """LoRA, DoRA, rsLoRA, or what LyCORIS made of it."""
    parts = {key.partition(".")[2] for key in header.shapes}
    if any(part.startswith("hada_") for part in parts):
        name = "LoHa"
    elif any(part.startswith("lokr_") for part in parts):
        name = "LoKr"
    elif any(layout.rslora for layout in weights.layouts.values()):
        name = "rsLoRA"
    else:
        name = "LoRA"
    dora = any(MAGNITUDE in key for key in weights.tensors) or "dora_scale" in parts
    return {"LoRA": "DoRA"}.get(name, f"{name} with DoRA") if dora else name


def base_model(header: Header) -> str:
    """What the file says of its base, and its family as far as that can be told."""
    names = ("ss_sd_model_name",)
    said = [header.texts.get(name) for name in names]
    said += [fields.get("base_model_name_or_path") for fields in header.metadata.values()]
    named = next((clean(name) for name in said if isinstance(name, str) and name), None)
    family = family_of(header.shapes, header.texts)
    known = [text for text in (named, family.title if family else None) if text]
    return ", ".join(known) or "not stated"


def trained_words(texts: Mapping[str, Any]) -> str:
    """The words that bring it out, as far as the header says: a phrase, or the commonest tags."""
    phrase = texts.get("modelspec.trigger_phrase")
    if isinstance(phrase, str) and phrase:
        return clean(phrase)
    counts: Counter[str] = Counter()
    try:
        for folder in json.loads(texts.get("ss_tag_frequency") or "{}").values():
            counts.update({str(tag).strip(): int(count) for tag, count in folder.items()})
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return "cannot be read"
    common = [f"{clean(tag)} ({count})" for tag, count in counts.most_common(WORDS)]
    more = f", and {len(counts) - WORDS} more" if len(counts) > WORDS else ""
    return ", ".join(common) + more if common else "not stated"


def numbers(layout: Layout) -> str:
    """Ranks, alphas and scales."""
    slots = layout.slots.values()
    scales = (layout.scale(name) for name in layout.slots)
    told = {
        "rank": (slot.rank for slot in slots),
        "alpha": (slot.alpha for slot in slots),
        "scale": scales,
    }
    return ", ".join(f"{name} {_span(values)}" for name, values in told.items())


def targets(layout: Layout) -> str:
    """The last words of the modules' names, with how many there are of each."""
    counts = Counter(".".join(_last_words(name)) for name in layout.slots)
    return ", ".join(f"{clean(name)} ({count})" for name, count in counts.most_common())


def clean(text: str) -> str:
    """A stranger's text without what a terminal would obey, and not too long."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text[:LONGEST])
    return shown + ("…" if len(text) > LONGEST else "")


def _last_words(name: str) -> list[str]:
    """The last word of a name, and the one before it where the last is a number or says little."""
    words = name.split(".")
    return words[-2:] if words[-1].isdigit() or words[-1] in ("proj", "conv") else words[-1:]


def _span(values: Iterable[float]) -> str:
    """One number, or the least and the largest."""
    found = sorted(float(value) for value in values)
    least, most = found[0], found[-1]
    return f"{least:g}" if least == most else f"{least:g} to {most:g}"
