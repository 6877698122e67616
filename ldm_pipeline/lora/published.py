"""Few-step adapters that others published, for the models that they were distilled from.

They are taken from the hub's cache on this machine, or from the hub itself unless HF_HUB_OFFLINE
forbids it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.files import FILE_NAME
from ldm_pipeline.lora.layouts.families import WIDTHS

LCM_LORAS = {
    "sd1": "latent-consistency/lcm-lora-sdv1-5",
    "sdxl": "latent-consistency/lcm-lora-sdxl",
}
"""LCM-LoRAs (2311.05556) by the family of their base."""


def lcm_lora(width: Any) -> str | None:
    """The hub id of the LCM-LoRA for a UNet that is told texts of `width` channels (its
    `cross_attention_dim`); None where none is known."""
    family = WIDTHS.get(width) if isinstance(width, int) else None
    return LCM_LORAS.get(family) if family is not None else None


def fetched(hub_id: str) -> Path:
    """The adapter's file on this machine; `UserError` where it is neither here nor to be had."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(hub_id, FILE_NAME))
    except (OSError, ValueError) as error:
        why = str(error).strip().partition("\n")[0]
        raise UserError(
            f"lcm=True draws with the adapter {hub_id}, which is not on this machine and could not"
            f" be fetched ({why}); download its {FILE_NAME} and name that file after lcm"
        ) from error
