"""The families of models that LoRA files are made for, and how a file tells which is its own.

Kohya's layout needs to know, since its names and its header differ from one family to the next,
and so do LyCORIS' products, which do not say what is a convolution.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ldm_pipeline.errors import UserError, choose


@dataclass(frozen=True)
class Family:
    """A family, and what kohya's header and Stability's (modelspec) call it.

    `sgm` says whether the UNet's modules have their first names, and the text encoders numbers;
    `linear` whether a transformer's projections are linear rather than convolutions.
    """

    title: str
    version: str
    architecture: str
    resolution: int
    prediction: str = "epsilon"
    sgm: bool = False
    linear: bool = True

    @property
    def prefixes(self) -> Mapping[str, str]:
        """What a key begins with, by component."""
        if self.sgm:
            return {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
        return {"unet": "lora_unet", "text_encoder": "lora_te"}


FAMILIES: Mapping[str, Family] = {
    "sd1": Family("Stable Diffusion 1.x", "sd_v1", "stable-diffusion-v1", 512, linear=False),
    "sd2": Family("Stable Diffusion 2.x", "sd_v2", "stable-diffusion-v2-512", 512),
    "sd2-v": Family(
        "Stable Diffusion 2.x (v)", "sd_v2_v", "stable-diffusion-v2-768-v", 768, prediction="v"
    ),
    "sdxl": Family("SDXL", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base", 1024, sgm=True),
}

WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
"""Channels of the text that a UNet is told, of the published models."""

TOLD = re.compile(r"attn2[._]to_[kv]\b.*?(lora_A\.weight|down\.weight|hada_w1_b)$")
"""Keys of what reads the text: their A has one column for each of its channels."""

ONLY_SDXL = ("text_encoder_2.", "lora_te2_", "input_blocks", "output_blocks")
"""Not `lora_te1_`: stock diffusers writes it for every family."""
PROJECTION = re.compile(r"proj_(in|out)\.lora[._](A|down)\.weight$")
MATRIX = re.compile(r"proj_(in|out)\.(hada_|lokr_)")
"""Keys of LyCORIS' products beside projections, which are matrices whatever the module is."""


def family_named(name: str) -> Family:
    """The family that a person names; `UserError` for one that is not known."""
    return FAMILIES[choose("--base", name, FAMILIES)]


def family_of(shapes: Mapping[str, tuple[int, ...]], texts: Mapping[str, Any]) -> Family | None:
    """The family that a file's header and the shapes of its tensors (by key) speak of, or None."""
    version = str(texts.get("ss_base_model_version", ""))
    architecture = str(texts.get("modelspec.architecture", "")).partition("/")[0]
    for family in FAMILIES.values():
        if family.version == version or family.architecture == architecture:
            return family
    if any(part in key for key in shapes for part in ONLY_SDXL) or _deep(shapes):
        return FAMILIES["sdxl"]
    for key, shape in shapes.items():
        if TOLD.search(key) and len(shape) > 1 and shape[1] in WIDTHS:
            return FAMILIES[WIDTHS[shape[1]]]
    for key, shape in shapes.items():
        if PROJECTION.search(key) and len(shape) == 4:
            return FAMILIES["sd1"]
    return None


def is_asked_for(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a file leaves to its family what is a convolution."""
    return any(MATRIX.search(key) for key in shapes)


def required(family: Family | None) -> Family:
    """`family`; `UserError` where nothing told it."""
    if family is None:
        raise UserError(
            "names and convolutions differ from one family of models to the next, and nothing tells"
            f" this file's; say --base, one of {', '.join(FAMILIES)}"
        )
    return family


def _deep(keys: Iterable[str]) -> bool:
    """Whether a transformer has more than one block, as only SDXL's have."""
    return any(re.search(r"transformer_blocks[._][1-9]", key) for key in keys)
