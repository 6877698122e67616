"""What a run's time goes to, by the host's clock alone: nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic


class Clock:
    """Counts from its making; time spent `apart` does not count as training."""

    def __init__(self) -> None:
        self._began = self._since = monotonic()
        self._apart = 0.0

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Within the block something else than training happens."""
        began = monotonic()
        yield
        spent = monotonic() - began
        self._apart += spent
        self._since += spent

    def speed(self, samples: int) -> float:
        """Samples per second, for `samples` trained on since the last call (or the making)."""
        now = monotonic()
        seconds, self._since = now - self._since, now
        return samples / max(seconds, 1e-9)

    def __str__(self) -> str:
        """How long it has been, and which share of that was spent apart."""
        seconds = monotonic() - self._began
        share = 100 * self._apart / max(seconds, 1e-9)
        return f"{seconds:.0f} s; validation and pictures took {share:.1f} % of that"
