"""A small autoencoder in the place of a model's own: AutoencoderTiny, as TAESD is built.

In few steps the large decoder is much of the work; the small one does nearly the same in a fraction
of it. The whole autoencoder is replaced, so pictures to draw out of are read by the small one, too.
Finding and checking one imports no torch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_pipeline.errors import UserError
from ldm_pipeline.models import bundled
from ldm_pipeline.models.trust import SAFE, check_component, check_links, read_json

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderTiny

SMALL = "small"
"""The name of the bundled model's own."""

MAKER = "train/train_small_decoder.py makes one"


def find(name: str | os.PathLike[str], of_bundled: bool) -> Path:
    """The folder of the small autoencoder that `name` stands for: "small" is the one that comes
    with the bundled model, if that is the model (`of_bundled`).

    Raises `UserError` where there is none, for a folder of another kind, and for one that is not
    safe to open.
    """
    if name == SMALL:
        if not of_bundled:
            raise UserError(
                f"decoder={SMALL!r} is the bundled model's; name the folder of an AutoencoderTiny"
                " made for this model, such as TAESD"
            )
        place = bundled.small_decoder()
        if place is None:
            raise UserError(
                f"decoder={SMALL!r}: this installation has no small decoder; {MAKER}, and its"
                " folder goes here"
            )
        return place
    place = Path(name).expanduser()
    if not (place / "config.json").is_file():
        raise UserError(
            f"decoder={str(name)!r} is no folder of an AutoencoderTiny: there is no config.json;"
            f" {MAKER}"
        )
    check_links(place)
    check_component(place)
    kind = read_json(place / "config.json").get("_class_name")
    if kind != "AutoencoderTiny":
        raise UserError(f"decoder={str(name)!r} holds {kind!s:.80}, not an AutoencoderTiny")
    if not any(file.name.endswith(SAFE) for file in place.iterdir()):
        raise UserError(f"decoder={str(name)!r} has no {SAFE} file of weights")
    return place


def opened(place: Path, dtype: torch.dtype) -> AutoencoderTiny:
    """The small autoencoder in a folder that `find` gave; `UserError` where it cannot be loaded."""
    from diffusers import AutoencoderTiny

    from ldm_pipeline.models.quiet import quiet_diffusers

    told = {"use_safetensors": True, "local_files_only": True}
    try:
        with quiet_diffusers():  # warns of what its own save_pretrained wrote, and of an empty list
            return AutoencoderTiny.from_pretrained(place, **told).to(dtype).eval()
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the small decoder in {place} cannot be loaded: {reason}") from error


def check_fits(vae: AutoencoderTiny, unet: Any) -> None:
    """Raise `UserError` where the UNet's latents are not those that `vae` reads."""
    own, drawn = vae.config.latent_channels, unet.config.out_channels
    if own != drawn:
        raise UserError(
            f"the decoder reads latents of {own} channels, and this model draws {drawn}; name one"
            " that was made for it"
        )
