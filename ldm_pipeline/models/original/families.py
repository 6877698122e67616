"""The families of models that come as single files: which parts a file has, under which prefixes.

A family is told from the keys alone: by the text encoders, whose places differ.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ldm_pipeline.errors import UserError
from ldm_pipeline.models.original.autoencoder import vae_names
from ldm_pipeline.models.original.clip import CLIP_NAMES, OpenClip
from ldm_pipeline.models.original.names import NameMap
from ldm_pipeline.models.original.unet import unet_names

UNET, VAE = "model.diffusion_model.", "first_stage_model."
FIRST = "input_blocks.0.0.weight"
PAINTING_CHANNELS = 9
"""What a UNet that paints into pictures reads: latents, the mask, and what stays."""


@dataclass(frozen=True)
class TextPart:
    """A text encoder of a family: its component, its prefix in a file, and what it is."""

    component: str
    prefix: str
    open_clip: bool
    projects: bool = False

    @property
    def mark(self) -> str:
        """A tensor that a file with this encoder has."""
        return self.prefix + ("model.ln_final.weight" if self.open_clip else "transformer.")

    @property
    def tokenizer(self) -> str:
        """The component that goes with it."""
        return self.component.replace("text_encoder", "tokenizer")


@dataclass(frozen=True)
class Family:
    """What models of one kind have in common.

    heads       of the UNet's attention; None is one for every 64 channels
    size        of a side of the latents, where nothing says otherwise
    scaling     of the autoencoder's latents
    spec        how Stability's model specification calls the architecture
    """

    name: str
    pipeline: str
    texts: tuple[TextPart, ...]
    heads: int | None
    size: int
    scaling: float
    prediction: str
    spec: str

    @property
    def is_xl(self) -> bool:
        """Whether an SDXL pipeline draws with it."""
        return any(part.component == "text_encoder_2" for part in self.texts)

    @property
    def components(self) -> tuple[str, ...]:
        """The components that have weights in a file."""
        return ("unet", "vae", *(part.component for part in self.texts))

    def prefix(self, component: str) -> str:
        """What the names of a component's tensors begin with."""
        own = {part.component: part.prefix for part in self.texts}
        return {"unet": UNET, "vae": VAE, **own}[component]

    def specification(self, prediction: str) -> str:
        """What Stability's model specification calls the architecture of a model."""
        return self.spec.replace("768-v", "512") if prediction == "epsilon" else self.spec

    def layout(self, component: str, config: Mapping[str, Any]) -> NameMap:
        """How a component with `config` names its tensors."""
        if component == "unet":
            return unet_names(config)
        if component == "vae":
            return vae_names(config)
        part = next(part for part in self.texts if part.component == component)
        return OpenClip(config["num_hidden_layers"]) if part.open_clip else CLIP_NAMES


SD1 = Family(
    "Stable Diffusion 1.x",
    "StableDiffusionPipeline",
    (TextPart("text_encoder", "cond_stage_model.", open_clip=False),),
    heads=8,
    size=64,
    scaling=0.18215,
    prediction="epsilon",
    spec="stable-diffusion-v1",
)
SD2 = Family(
    "Stable Diffusion 2.x",
    "StableDiffusionPipeline",
    (TextPart("text_encoder", "cond_stage_model.", open_clip=True),),
    heads=None,
    size=96,
    scaling=0.18215,
    prediction="v_prediction",
    spec="stable-diffusion-v2-768-v",
)
SDXL = Family(
    "SDXL",
    "StableDiffusionXLPipeline",
    (
        TextPart("text_encoder", "conditioner.embedders.0.", open_clip=False),
        TextPart("text_encoder_2", "conditioner.embedders.1.", open_clip=True, projects=True),
    ),
    heads=None,
    size=128,
    scaling=0.13025,
    prediction="epsilon",
    spec="stable-diffusion-xl-v1-base",
)
REFINER = replace(
    SDXL,
    name="SDXL's refiner",
    pipeline="StableDiffusionXLImg2ImgPipeline",
    texts=(TextPart("text_encoder_2", "conditioner.embedders.0.", open_clip=True, projects=True),),
    spec="stable-diffusion-xl-v1-refiner",
)
FAMILIES = (SD1, SD2, SDXL, REFINER)

LABELS = f"{UNET}label_emb."
"""What tells the UNets that hear pooled texts and sizes, as SDXL's, or pictures."""

_EDM = {
    "edm_mean": "Playground v2.5; take its folder in Diffusers layout",
    "edm_vpred.sigma_max": "CosXL; there is no pipeline for such models here",
}
"""Tensors of models whose noise levels are EDM's (2206.00364), beside SDXL's tensors."""

_OTHERS = {
    "double_blocks.": "a FLUX model",
    "joint_blocks.": "a Stable Diffusion 3 model",
    "lora_": "a LoRA: name it with --lora, beside a model",
    ".lora": "a LoRA: name it with --lora, beside a model",
    "control_model.": "a ControlNet",
}


def family_of(file: object, keys: Collection[str]) -> Family:
    """The family that a file with these keys is of; `UserError` where it is none."""
    if UNET + FIRST in keys:
        for family in FAMILIES:
            if all(any(key.startswith(part.mark) for key in keys) for part in family.texts):
                _check_levels_and_labels(file, keys, family)
                return family
    for sign, kind in _OTHERS.items():
        if any(sign in key for key in keys):
            raise UserError(
                f"{file} holds {kind}; single files are Stable Diffusion 1.x, 2.x, SDXL"
            )
    if UNET + FIRST in keys:
        raise UserError(
            f"{file} holds a UNet without its text encoders; take a file of the whole model"
        )
    raise UserError(
        f"{file} holds no model in the original layout of Stable Diffusion 1.x, 2.x or SDXL: it"
        f" has no tensor {UNET}{FIRST}"
    )


def _check_levels_and_labels(file: object, keys: Collection[str], family: Family) -> None:
    """Raise `UserError` for relatives of a family that have its tensors and draw otherwise."""
    for sign, which in _EDM.items():
        if sign in keys:
            raise UserError(f"{file} has {sign!r}: its noise levels are EDM's, as of {which}")
    labelled = any(key.startswith(LABELS) for key in keys)
    if labelled and not family.is_xl:
        raise UserError(
            f"{file} has {family.name}'s text encoder, and a UNet that hears more than texts"
            f" ({LABELS}…), as unCLIP's; there is no pipeline for such models here"
        )
    if family.is_xl and not labelled:
        raise UserError(
            f"{file} has {family.name}'s text encoders, and a UNet that does not hear sizes (no"
            f" {LABELS}…); take a file of one whole model"
        )


def family_for(parts: Collection[str], encoder: Mapping[str, Any]) -> Family:
    """The family of a folder, by the components it has and the config of its first text encoder."""
    if "text_encoder_2" in parts:
        return SDXL if "text_encoder" in parts else REFINER
    return SD1 if encoder.get("hidden_act", "quick_gelu") == "quick_gelu" else SD2
