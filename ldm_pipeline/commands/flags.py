"""How the commands word what `Request` and the models refuse: by flags, not by fields."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ldm_pipeline.errors import UserError

FLAGS = {
    "num_inference_steps": "--steps",
    "num_images_per_prompt": "--n",
    "guidance_scale": "--guidance",
    "height": "--height",
    "width": "--width",
    "sampler": "--sampler",
    "eta": "--eta",
    "seed": "--seed",
    "strength": "--strength",
    "padding_mask_crop": "--crop",
    "decoder": "--decoder",
}
"""The command's name for each choice of the Python API."""


@contextmanager
def in_flags(flags: Mapping[str, str] = FLAGS) -> Iterator[None]:
    """Within the block, a refusal that begins with a field, `field=…`, names its flag instead."""
    try:
        yield
    except UserError as error:
        name, equals, rest = str(error).partition("=")
        raise UserError(f"{flags.get(name, name)}{equals}{rest}") from error
