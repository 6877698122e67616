"""The model that comes with the package, so that a first picture needs no network and no account.

It lies in `ldm_pipeline/assets` in the layout of Diffusers: `model_index.json` and one folder per
component. Its weights are stored in 16 bits to stay small and are read as 32 bits.
"""

from __future__ import annotations

from pathlib import Path

from ldm_pipeline.errors import UserError

ASSETS = Path(__file__).resolve().parent.parent / "assets"


def few_step_adapter() -> Path | None:
    """The folder of the bundled model's LCM adapter; None where this installation has none."""
    place = ASSETS / "lcm"
    return place if place.is_dir() else None


def small_decoder() -> Path | None:
    """The folder of the bundled model's small autoencoder; None where there is none here."""
    place = ASSETS / "decoder"
    return place if place.is_dir() else None


def folder() -> Path:
    """The folder of the bundled model; `UserError` where this installation has none."""
    if not (ASSETS / "model_index.json").is_file():
        raise UserError(
            f"this installation has no bundled model in {ASSETS};"
            " pass a model folder or a hub id instead"
        )
    return ASSETS
