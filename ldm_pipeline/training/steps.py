"""What a step of a run is made of: which samples each process takes, and what it may draw itself.

All of it is a function of the step's number, so that a run can go on from any of them.
"""

from __future__ import annotations

from torch.utils.data import Dataset

from ldm_pipeline.processes.ranks import Ranks
from ldm_pipeline.training.objective import Batch, Objective


class Steps(Dataset[list[Batch]]):
    """What one process does in each step, piece by piece, so that a loader can prepare ahead.

    A step's batch is cut into processes x accumulation pieces; each process takes `accumulation`
    neighbouring ones.
    """

    def __init__(self, objective: Objective, size: int, ranks: Ranks, accumulation: int) -> None:
        self.objective, self.size = objective, size
        self.accumulation = accumulation
        self.share = size // ranks.count
        self.piece = self.share // accumulation
        self.offset = ranks.index * self.share

    def __getitem__(self, step: int) -> list[Batch]:
        return [self.objective.batch(positions) for positions in self.positions(step)]

    def positions(self, step: int) -> list[range]:
        """The positions of this process's pieces in `step`."""
        first = step * self.size + self.offset
        return [
            range(start, start + self.piece)
            for start in range(first, first + self.share, self.piece)
        ]


def seed_of(seed: int, step: int, piece: int) -> int:
    """The seed of what a model draws itself (dropout) in one piece of one step of all processes."""
    return (seed * 0x9E3779B1 + step * 0x85EBCA6B + piece * 0xC2B2AE35) % 2**63
