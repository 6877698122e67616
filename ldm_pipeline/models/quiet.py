"""Stock parts without their warnings: on import transformers says twice that torchvision is
missing, which nothing here needs, and diffusers warns of what one line of ours says already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Within the block diffusers logs errors alone."""
    with _errors_alone(diffusers_logging):
        yield


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within the block transformers logs errors alone."""
    with _errors_alone(transformers_logging):
        yield


@contextmanager
def _errors_alone(logging: Any) -> Iterator[None]:
    loudness = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(loudness)
