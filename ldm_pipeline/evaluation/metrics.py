"""Shares with their uncertainty.

Legend: k of n trials succeeded; z is the two-sided 95 % point of the normal distribution.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Z95 = 1.959964


@dataclass(frozen=True)
class Share:
    """k of n, with Wilson's 95 % interval (1927), which stays sensible near 0 and 1."""

    k: int
    n: int

    @classmethod
    def of(cls, outcomes: Iterable[bool]) -> Share:
        """The share of true outcomes."""
        listed = list(outcomes)
        return cls(sum(listed), len(listed))

    @property
    def value(self) -> float:
        """k / n; NaN without trials."""
        return self.k / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the true share; (0, 1) without trials."""
        if not self.n:
            return 0.0, 1.0
        p, n, zz = self.value, self.n, Z95**2
        middle = (p + zz / (2 * n)) / (1 + zz / n)
        half = Z95 / (1 + zz / n) * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)

    def to_json(self) -> dict[str, Any]:
        """As plain values; without trials there is no value, as JSON has no NaN."""
        value = self.value if self.n else None
        return {"k": self.k, "n": self.n, "value": value, "interval": self.interval}

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f}  [{low:.3f}, {high:.3f}]  ({self.k} of {self.n})"
