"""What the engine trains: anything that turns positions into batches and batches into losses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import PIL.Image
from torch import Tensor, nn

if TYPE_CHECKING:
    from ldm_pipeline.training.updates import MovingAverage

Batch = dict[str, Any]
"""Tensors by name, [B, …]; lists and dictionaries of such may lie inside."""


@runtime_checkable
class Objective(Protocol):
    """What a training run optimises. Implementations are `torch.nn.Module`s.

    Parameters that require gradients are trained, the others are frozen and not saved.
    """

    def batch(self, positions: range) -> Batch:
        """The samples at these positions of the run's endless stream; no state, any process."""
        ...

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Scalar means over the batch; `loss` is minimised, the others are logged."""
        ...

    def validate(self) -> dict[str, float]:
        """Measures on samples that training never sees, with fixed noise.

        Every process is asked at the same time, and the first one's answer counts. The model with
        the least `loss`, if there is one among the measures, is kept as `best`.
        """
        ...

    def export(self, folder: Path, updates: int) -> None:
        """Write the trained model (the moving average is in place) in Diffusers layout; `updates`
        is how many made it, for its card."""
        ...


@runtime_checkable
class DrawsPictures(Protocol):
    """An objective that shows what it has learnt."""

    def picture(self) -> PIL.Image.Image | None:
        """One picture of the state of things, or None; only the first process is asked."""
        ...


@runtime_checkable
class Stoppable(Protocol):
    """An objective whose validation takes long: it looks in between whether the run is to stop."""

    def heed(self, stop: Sequence[int]) -> None:
        """Be shown what a signal fills. Then `validate` may end early in this process, though not
        without its collectives; its answer is thrown away, and it is asked again another time."""
        ...


@runtime_checkable
class Naming(Protocol):
    """An objective whose samples have names for people."""

    def name_of(self, position: int) -> str:
        """The name of the sample at a position."""
        ...


@runtime_checkable
class Sharing(Protocol):
    """An objective with a network whose frozen weights processes may share out (FSDP): it saves
    none of them, and in each step calls it equally often in all processes."""

    @property
    def shared(self) -> nn.Module:
        """The network."""
        ...


@runtime_checkable
class Compiling(Protocol):
    """An objective that itself knows which of its calls are worth compiling."""

    def compile_network(self) -> None:
        """Compile the network where it learns."""
        ...


@runtime_checkable
class Averaging(Protocol):
    """An objective that looks at the moving average of its weights while it trains."""

    def take_average(self, average: MovingAverage) -> None:
        """Be shown the average; it goes on moving."""
        ...


def named(objective: Objective, position: int) -> str:
    """How the objective calls a sample, its position where it has no name."""
    return objective.name_of(position) if isinstance(objective, Naming) else f"sample {position}"
