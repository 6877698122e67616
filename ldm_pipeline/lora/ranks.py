"""Which rank a LoRA shall have: checked without torch."""

from __future__ import annotations

from ldm_pipeline.errors import UserError


def check_rank(most: int | None, energy: float | None) -> None:
    """Raise `UserError` for a rank and a share of the energy that make no sense."""
    if most is None and energy is None:
        raise UserError("say which rank is wanted: --rank 8, or --energy 0.95")
    if most is not None and most < 1:
        raise UserError(f"--rank={most} must be at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"--energy={energy} must lie above 0 and not above 1, as 0.95")
