"""What a LoRA file means, whatever layout it is written in.

Every layout is read into `LoraWeights` and written from it, so that nothing else knows layouts.

Legend
    key     `component.name.part`; see `targets` for the first two, and for A, B, rank and alpha
    part    what is learnt in one module: A, B, and the magnitudes of DoRA
    rows    of W, one for each output; columns, one for each input (and place of a kernel's)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_pipeline.lora.targets import Layout

if TYPE_CHECKING:
    from torch import Tensor

LORA_A, LORA_B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
COLUMNS = "lora_column_magnitude"
"""LyCORIS' other DoRA, which measures W's columns, [1, in] or [1, in, 1, 1]. PEFT has no such
adapter; `completed` turns it into a LoRA where the base's weights are at hand."""

PARTS = (LORA_A, LORA_B, MAGNITUDE, COLUMNS)


@dataclass(frozen=True)
class LoraWeights:
    """What a LoRA file holds: tensors by key, and each component's layout.

    A is [r, in], or [r, in, k, k] beside a convolution, B [out, r] or [out, r, 1, 1]; magnitudes
    are [out] or [1, out, 1, 1]. `promised` has, by component, what the header says is adapted, as
    PEFT's `target_modules`.
    """

    tensors: Mapping[str, Tensor]
    layouts: Mapping[str, Layout]
    promised: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def modules(self) -> Iterator[tuple[str, str]]:
        """The adapted modules, as (component, name)."""
        for component, layout in self.layouts.items():
            for name in layout.slots:
                yield component, name

    def parts(self, component: str, name: str) -> dict[str, Tensor]:
        """What is learnt in one module, by part."""
        keys = {part: f"{component}.{name}.{part}" for part in PARTS}
        return {part: self.tensors[key] for part, key in keys.items() if key in self.tensors}


@dataclass(frozen=True)
class Header:
    """What a LoRA says before its tensors are read.

    `shapes` are those of the tensors, by the key that they have in the file; `metadata` are PEFT's
    fields by component, where the layout has them; `texts` all texts of the header. `files` has
    the file of each component, or one under "" where a file holds them all.
    """

    path: Path
    layout: str
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, Mapping[str, Any]]
    texts: Mapping[str, Any]
    files: Mapping[str, Path]


def split(key: str) -> tuple[str, str, str]:
    """(component, name, part) of a key of `LoraWeights`."""
    for part in PARTS:
        if key.endswith(f".{part}"):
            component, _, name = key.removesuffix(f".{part}").partition(".")
            return component, name, part
    raise AssertionError(key)
