"""Imports of stock parts without what transformers says meanwhile.

It says twice that torchvision is missing, which nothing here needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within the block transformers logs errors alone."""
    loudness = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(loudness)
