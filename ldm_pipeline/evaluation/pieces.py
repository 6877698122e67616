"""The connected pieces of a mask, and the boxes of the things that they make up.

Legend: a piece is (left, top, right, bottom, area) in pixels; right and bottom are one beyond.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Piece = tuple[int, int, int, int, int]
SPECK = 42  # pixels; smaller pieces (the stars of a night, stray dots) are dropped
LEAST_AREA = 80  # pixels; a thing of the world covers at least twice this
JOIN = 2.0  # pieces whose boxes come nearer than this are one thing; things keep 5 apart


def boxes(foreground: np.ndarray) -> list[tuple[int, int, int, int]]:
    """The boxes of the pieces of a bool mask, big enough to be things, in reading order."""
    pieces = sorted(
        (piece for piece in label(foreground) if piece[4] >= SPECK), key=lambda piece: -piece[4]
    )
    whole: list[Piece] = []
    for piece in pieces:
        for i, other in enumerate(whole):
            if _belongs(piece, other):
                whole[i] = (min(piece[0], other[0]), min(piece[1], other[1]),
                            max(piece[2], other[2]), max(piece[3], other[3]),
                            piece[4] + other[4])  # fmt: skip
                break
        else:
            whole.append(piece)
    whole.sort(key=lambda piece: (piece[1], piece[0]))
    return [(piece[0], piece[1], piece[2], piece[3]) for piece in whole if piece[4] >= LEAST_AREA]


def _belongs(part: Sequence[int], whole: Sequence[int]) -> bool:
    """Whether a piece is a fragment of another: within its box, or small and close to it."""
    grow = JOIN if part[4] < LEAST_AREA else 1.0
    near = (part[0] <= whole[2] + grow and whole[0] <= part[2] + grow
            and part[1] <= whole[3] + grow and whole[1] <= part[3] + grow)  # fmt: skip
    within = (part[0] >= whole[0] - grow and part[2] <= whole[2] + grow
              and part[1] >= whole[1] - grow and part[3] <= whole[3] + grow)  # fmt: skip
    return within or (near and part[4] < LEAST_AREA)


def label(mask: np.ndarray) -> list[Piece]:
    """The 8-connected pieces of a bool mask [h, w]: (left, top, right, bottom, area) of each.

    Runs of each row are joined with the runs that they touch in the row above (union-find).
    """
    parent: list[int] = []
    runs: list[tuple[int, int, int]] = []
    above: list[int] = []
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for y, row in enumerate(edges):
        ends = np.flatnonzero(row).tolist()
        here = []
        for start, stop in zip(ends[::2], ends[1::2], strict=True):
            me = len(runs)
            runs.append((y, start, stop))
            parent.append(me)
            here.append(me)
            for other in above:
                if runs[other][1] <= stop and start <= runs[other][2]:
                    parent[root(other)] = root(me)
        above = here
    pieces: dict[int, Piece] = {}
    for i, (y, start, stop) in enumerate(runs):
        old = pieces.get(root(i), (start, y, stop, y + 1, 0))
        pieces[root(i)] = (min(old[0], start), old[1], max(old[2], stop), y + 1,
                           old[4] + stop - start)  # fmt: skip
    return list(pieces.values())
