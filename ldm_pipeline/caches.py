"""Where the package keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache(name: str) -> Path:
    """Our folder `name` in the user's cache (XDG_CACHE_HOME, or ~/.cache); it need not exist."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "ldm-pipeline" / name
