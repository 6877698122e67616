"""The order of an epoch: everything once, same buckets side by side, whatever cuts the batch."""

from __future__ import annotations

import numpy as np
import pytest

from ldm_pipeline.data.order import epoch_order

SIZES = [(13,), (5, 3), (16, 8, 1), (7, 7, 7, 7), (40, 2, 9), (1,), (3,), (8, 8)]


def mixed(buckets: np.ndarray, run: int, epochs: int) -> int:
    """How many batches of a stream of epochs hold more than one bucket."""
    stream = np.concatenate([buckets[epoch_order(buckets, run, e, 0)] for e in range(epochs)])
    batches = [stream[i : i + run] for i in range(0, len(stream), run)]
    return sum(len(np.unique(batch)) > 1 for batch in batches)


@pytest.mark.parametrize("run", [1, 4, 8])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_epoch_has_every_sample_once(sizes: tuple[int, ...], run: int) -> None:
    buckets = np.repeat(np.arange(len(sizes)), sizes)
    orders = [tuple(epoch_order(buckets, run, epoch, 0)) for epoch in range(6)]
    for order in orders:
        assert sorted(order) == list(range(len(buckets)))
    if len(buckets) > 4:
        assert len(set(orders)) == 6
    assert orders[2] == tuple(epoch_order(buckets, run, 2, 0))
    if len(buckets) > 4:
        assert orders[2] != tuple(epoch_order(buckets, run, 2, 1))


@pytest.mark.parametrize("run", [1, 4, 8])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_only_what_fills_no_run_is_mixed(sizes: tuple[int, ...], run: int) -> None:
    """At most the left-overs of an epoch, one broken run and one seam are in mixed batches."""
    buckets = np.repeat(np.arange(len(sizes)), sizes)
    left_over = sum(size % run for size in sizes)
    most = left_over / run + 2
    assert mixed(buckets, run, epochs=6) <= 6 * most
    shuffled = np.random.default_rng(0).permutation(buckets)
    if len(sizes) > 2 and run == 8 and left_over < 16:
        batches = shuffled[: len(shuffled) // run * run].reshape(-1, run)
        by_chance = sum(len(np.unique(batch)) > 1 for batch in batches)
        assert mixed(buckets, run, epochs=1) < by_chance


def test_buckets_that_fill_their_runs_are_never_mixed() -> None:
    buckets = np.repeat(np.arange(3), (8, 24, 16))
    assert mixed(buckets, 8, epochs=5) == 0


def test_left_overs_of_one_bucket_are_neighbours() -> None:
    """Within an epoch's ends each bucket stands in one block: few shapes in a batch."""
    buckets = np.repeat(np.arange(4), 3)
    order = buckets[epoch_order(buckets, 100, 0, 0)]
    assert np.count_nonzero(np.diff(order)) == 3
