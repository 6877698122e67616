"""Random numbers that depend on a seed and on words alone, in any process and any order."""

from __future__ import annotations

import hashlib

import numpy as np


def stream(seed: int, *words: object) -> np.random.Generator:
    """A generator of its own for (seed, words); what was drawn before does not matter."""
    digest = hashlib.sha256(repr((seed, *words)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))
