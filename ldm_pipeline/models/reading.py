"""What is damaged, in one line: the libraries that read a model break at it in every way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ldm_pipeline.errors import UserError
from ldm_pipeline.too_large import is_out_of_memory

LONGEST = 600
"""Letters of a reason that are told; some readers list every tensor."""


@contextmanager
def reading(refusal: str) -> Iterator[None]:
    """Within the block, whatever a library raises is a `UserError`: the `refusal` and its reason.

    What does not fit into the memory is no damage, and is let pass.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        known = isinstance(error, OSError | ValueError)
        reason = " ".join(f"{'' if known else type(error).__name__ + ': '}{error}".split())
        if "ignore_mismatched_sizes" in reason:  # transformers lists them in its log alone
            reason = "weights of other shapes than its config.json says"
        raise UserError(f"{refusal}: {reason[:LONGEST]}") from error
