"""Shares and their intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ldm_pipeline.evaluation.metrics import Share


def test_a_share_counts_true_outcomes() -> None:
    share = Share.of([True, False, True, True])
    assert (share.k, share.n, share.value) == (3, 4, 0.75)


def test_no_trials_say_nothing() -> None:
    assert math.isnan(Share(0, 0).value)
    assert Share(0, 0).interval == (0.0, 1.0)


@pytest.mark.parametrize("k,n", [(0, 10), (10, 10), (1, 500), (250, 500)])
def test_the_interval_solves_wilsons_equation(k: int, n: int) -> None:
    """Its ends are the shares p from which k / n lies exactly z standard errors away."""
    for p in Share(k, n).interval:
        if 1e-9 < p < 1 - 1e-9:  # at an end that was held to 0 or 1 there is nothing to solve
            standard_error = math.sqrt(p * (1 - p) / n)
            # Ten digits: the equation is solved in closed form, only rounding is left.
            assert abs(k / n - p) / standard_error == pytest.approx(1.959964, rel=1e-10)


def test_the_interval_covers_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    truth, n, runs = 0.9, 200, 2000
    covered = 0
    for k in rng.binomial(n, truth, runs):
        low, high = Share(int(k), n).interval
        covered += low <= truth <= high
    # Five standard errors of a share of 0.95 over 2000 runs are 0.024.
    assert abs(covered / runs - 0.95) < 0.024
