"""In which order an epoch goes through the samples: shuffled, same shapes side by side.

A batch of one shape is one call of the network. So each epoch is cut into runs of one bucket that
begin where batches begin; what does not fill a run is put together at the epoch's two ends, sorted
by bucket. No sample is left out, none comes twice, and the order knows neither processes nor
accumulation: any way to cut a batch sees the same samples.

Legend
    epoch      its samples stand at positions epoch * n … (epoch + 1) * n - 1 of the run's stream
    run        how many neighbouring positions should share a bucket: the batch of an update
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def epoch_order(buckets: Sequence[int] | np.ndarray, run: int, epoch: int, seed: int) -> np.ndarray:
    """The samples 0 … n-1 in the order of this epoch; `buckets` names the bucket of each."""
    rng = np.random.default_rng([seed, 5, epoch])
    of = np.asarray(buckets)
    full: list[np.ndarray] = []
    rest: list[np.ndarray] = []
    for bucket in np.unique(of):
        members = rng.permutation(np.flatnonzero(of == bucket))
        filled = len(members) // run * run
        full += np.split(members[:filled], filled // run) if filled else []
        rest.append(members[filled:])
    order = rng.permutation(len(full))
    ends = np.concatenate([rest[i] for i in rng.permutation(len(rest))])
    head = -epoch * len(of) % run  # positions before the epoch's first batch begins
    runs = [full[i] for i in order]
    if len(ends) < head and runs:
        ends = np.concatenate([ends, runs.pop()])
    return np.concatenate([ends[:head], *runs, ends[head:]])
