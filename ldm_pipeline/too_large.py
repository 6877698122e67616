"""What does not fit into the memory, in one line that says where and what to do.

An accelerator says so by a class of error of its own, a CPU by the words of a plain one. torch is
not imported for it: where it was not, none of its errors can be there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ldm_pipeline.errors import UserError

ADVICE = "use smaller pictures, a smaller model or, on a GPU, run.mixed_precision=bf16"
"""What a training can do."""

CPU = "DefaultCPUAllocator: "
"""How torch's allocator of a computer's own memory begins: "can't allocate memory" on Linux,
"not enough memory" on Windows."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory, of an accelerator or of a CPU, did not suffice."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and CPU in str(error)


@contextmanager
def in_memory(where: str, advice: str = ADVICE) -> Iterator[None]:
    """Within the block running out of memory is a UserError: `where` it was, and the `advice`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory {where}: {advice}") from error
