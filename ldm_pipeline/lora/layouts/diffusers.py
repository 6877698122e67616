"""Diffusers' layout: one file for all components, what decides its meaning as JSON in the header.

A file is `pytorch_lora_weights.safetensors`: one tensor for each learnt matrix, and in the header,
under `lora_adapter_metadata`, the fields of PEFT's configuration. Without them a reader has to
assume alpha = rank.

Legend: a key is unet.mid_block.attentions.0.to_q.lora_A.weight.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.layouts.reading import tensors_of
from ldm_pipeline.lora.targets import COMPONENTS, TEXT_MODEL, Layout, Slot
from ldm_pipeline.lora.weights import LORA_A, LORA_B, MAGNITUDE, Header, LoraWeights, split
from ldm_pipeline.models.headers import FileHeader

if TYPE_CHECKING:
    from torch import Tensor

METADATA = "lora_adapter_metadata"

SPELLINGS = {
    LORA_A: (LORA_A, "lora.down.weight", "lora_linear_layer.down.weight"),
    LORA_B: (LORA_B, "lora.up.weight", "lora_linear_layer.up.weight"),
    MAGNITUDE: (MAGNITUDE, f"{MAGNITUDE}.weight"),
}
"""How releases of diffusers have spelled the parts. For a text encoder only the last spellings
are read whatever is adapted: the first fail for `fc1` alone, and transformers 5 loses DoRA's."""

HARMLESS_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of PEFT's `init_lora_weights` that leave the model's own weights alone."""

LONGEST_PATTERN, LOOSEST_PATTERN = 256, 4
"""Characters, and repetitions (`*`, `+`, `{`), of a pattern for module names. A pattern is run as
PEFT runs it, and one with repetitions in repetitions takes longer than anybody waits."""


# Reading ----------------------------------------------------------------------------------------


def parse(key: str) -> tuple[str, str, str] | None:
    """(component, name, part) of a key in any of diffusers' spellings; None for other keys."""
    component, _, rest = key.partition(".")
    for part, spellings in SPELLINGS.items():
        for spelling in spellings:
            name = rest.removesuffix(f".{spelling}")
            if component in COMPONENTS and name not in ("", rest):
                return component, name.removeprefix(TEXT_MODEL), part
    return None


def inspect(file: Path, found: FileHeader) -> Header:
    """The header of a file whose keys all `parse`; `UserError` where it makes no sense."""
    return checked(
        Header(
            file, "diffusers", found.shapes, _metadata(file, found.texts), found.texts, {"": file}
        )
    )


def checked(header: Header) -> Header:
    """`header`; `UserError` for tensors that are there twice, and for changes to the base."""
    if len({parse(key) for key in header.shapes}) < len(header.shapes):
        raise UserError(f"{header.path} holds some of its tensors twice, in two spellings")
    for component, fields in header.metadata.items():
        start = fields.get("init_lora_weights")
        if isinstance(start, list | dict) or start not in HARMLESS_STARTS:
            raise UserError(
                f"{header.path} is refused: init_lora_weights={start!r} in its header changes the"
                f" {component}'s own weights"
            )
        bias = fields.get("bias", "none")
        if bias != "none" or fields.get("lora_bias"):
            raise UserError(
                f"{header.path} is refused: it learnt biases of the {component} as well"
            )
    return header


def read(header: Header) -> LoraWeights:
    """The weights behind a header; `UserError` where it and the tensors disagree on a rank."""
    tensors = {}
    for key, tensor in tensors_of(header).items():
        parsed = parse(key)
        assert parsed is not None, key
        tensors[".".join(parsed)] = tensor
    layouts = {
        component: _layout(header.path, component, tensors, header.metadata.get(component))
        for component in COMPONENTS
        if any(key.startswith(f"{component}.") for key in tensors)
    }
    promised = {
        component: tuple(map(str, fields["target_modules"]))
        for component, fields in header.metadata.items()
        if isinstance(fields.get("target_modules"), list)
    }
    return LoraWeights(tensors, layouts, promised)


# Writing ----------------------------------------------------------------------------------------


def spell(component: str, path: str, part: str) -> str:
    """The key under which diffusers reads a part of the module at `path`."""
    spelling = part if component == "unet" else SPELLINGS[part][-1]
    return f"{component}.{path}.{spelling}"


def spelled(weights: LoraWeights) -> dict[str, Tensor]:
    """The tensors by diffusers' keys, text encoders' with the `text_model.` that tools want."""
    tensors = {}
    for key, tensor in weights.tensors.items():
        component, name, part = split(key)
        text = component != "unet" and not name.startswith("text_projection")
        tensors[spell(component, f"{TEXT_MODEL}{name}" if text else name, part)] = tensor
    return tensors


def texts(weights: LoraWeights) -> dict[str, str]:
    """What the header says: alphas and ranks included."""
    fields = {
        f"{component}.{name}": value
        for component, layout in weights.layouts.items()
        for name, value in layout.peft_fields().items()
    }
    return {"format": "pt", METADATA: json.dumps(fields, indent=2, sort_keys=True)}


# What lies in a header --------------------------------------------------------------------------


def _metadata(file: Path, texts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """PEFT's fields of each component, from the header's texts; empty where there are none."""
    text = texts.get(METADATA)
    if not text:
        return {}
    try:
        flat = json.loads(text).items()
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: {METADATA} in its header is no JSON object") from error
    found: dict[str, dict[str, Any]] = {}
    for key, value in flat:
        component, _, name = key.partition(".")
        found.setdefault(component, {})[name] = value
    return found


def _layout(
    file: Path, component: str, tensors: Mapping[str, Tensor], fields: Mapping[str, Any] | None
) -> Layout:
    """How a file adapts a component: ranks from the shapes, the rest from PEFT's `fields`.

    Without fields alpha = rank, as diffusers assumes.
    """
    ranks: dict[str, int] = {}
    dora = False
    for key, tensor in tensors.items():
        owner, name, part = split(key)
        if owner == component and part == LORA_A and tensor.ndim > 1:
            ranks[name] = tensor.shape[0]
        elif owner == component and part == LORA_B and tensor.ndim > 1:
            ranks.setdefault(name, tensor.shape[1])
        dora |= owner == component and part == MAGNITUDE
    empty = [name for name, rank in ranks.items() if rank < 1]
    if empty:
        raise UserError(f"{file}: {component}.{empty[0]} has rank 0")
    if fields is None:
        return Layout({name: Slot(rank, rank) for name, rank in ranks.items()}, dora)
    try:
        slots = {}
        for name, rank in ranks.items():
            told = _value(fields.get("rank_pattern"), name, fields.get("r", 8))
            if told != rank:
                raise UserError(f"{file}: its header says rank {told} for {name}, which has {rank}")
            alpha = _value(fields.get("alpha_pattern"), name, fields.get("lora_alpha", 8))
            if not math.isfinite(alpha):
                raise UserError(f"{file}: its header says alpha {alpha} for {name}")
            slots[name] = Slot(rank, alpha)
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, OverflowError, re.error) as error:
        raise UserError(f"{file}: the metadata of {component} cannot be read: {error}") from error
    return Layout(slots, dora or bool(fields.get("use_dora")), bool(fields.get("use_rslora")))


def _value(patterns: Mapping[str, Any] | None, name: str, otherwise: Any) -> Any:
    """What PEFT's rank_pattern or alpha_pattern has for a module, by PEFT's rule."""
    for pattern, value in (patterns or {}).items():
        repeated = sum(pattern.count(sign) for sign in "*+{")
        if (
            len(pattern) > LONGEST_PATTERN
            or repeated > LOOSEST_PATTERN
            or re.search(r"\)[*+{]", pattern)
        ):
            raise ValueError(f"the pattern {pattern[:40]!r} is too involved")
        if any(re.match(rf"(.*\.)?({pattern})$", path) for path in (name, TEXT_MODEL + name)):
            return value
    return otherwise
