"""What does not fit into the memory, in one line that says where and what to do.

A step that does not fit is cut into smaller pieces by the engine; everything else ends here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ldm_pipeline.errors import UserError

ADVICE = "use smaller pictures, a smaller model or, on a GPU, run.mixed_precision=bf16"


@contextmanager
def in_memory(where: str, advice: str = ADVICE) -> Iterator[None]:
    """Within the block running out of memory is a UserError: `where` it was, and the `advice`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory {where}: {advice}") from error
