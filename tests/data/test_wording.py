"""Wordings: finitely many for each picture, fixed by (seed, key, v), and the kept tags stay."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_pipeline.data.captioned import Item
from ldm_pipeline.data.sources import FileBytes
from ldm_pipeline.data.wording import (
    Wording,
    caption_for,
    count,
    pick,
    reword,
    texts_to_encode,
    wording,
)
from ldm_pipeline.errors import UserError

TAGS = tuple("abcdefgh")


def item(key: str = "a.png", *captions: str) -> Item:
    """A picture with captions; its file does not exist, for nothing here may read it."""
    return Item(key, FileBytes(Path("nowhere")), captions)


def wordings(item: Item, settings: Wording, seed: int) -> tuple[str, ...]:
    """All wordings of a picture, asked for from the last to the first."""
    backwards = [wording(item, settings, seed, v) for v in reversed(range(count(item, settings)))]
    return tuple(reversed(backwards))


def settings(rng: np.random.Generator) -> Wording:
    """Any settings that vary captions."""
    return Wording(
        dropout=float(rng.random()),
        shuffle_tags=bool(rng.integers(2)),
        tag_dropout=float(rng.uniform(0.1, 1)),
        keep_tags=int(rng.integers(0, len(TAGS) + 2)),
        variants=int(rng.integers(1, 6)),
    )


def test_a_wording_depends_on_seed_key_and_v_alone() -> None:
    varied = Wording(shuffle_tags=True, variants=8)
    words = ", ".join(TAGS)
    first = wordings(item("x", words), varied, 3)
    wordings(item("y", words), varied, 4)
    assert wordings(item("x", words), varied, 3) == first
    assert wordings(item("x", words), replace(varied, variants=3), 3) == first[:3]
    assert wordings(item("y", words), varied, 3) != first
    assert wordings(item("x", words), varied, 4) != first
    assert len(set(first)) == 8  # of 40,320 orders


def test_every_version_keeps_the_prefix_and_only_known_tags_each_once() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        chosen = settings(rng)
        version = reword(" ,".join(TAGS), chosen, rng)
        tags = version.split(", ") if version else []
        assert tuple(tags[: chosen.keep_tags]) == TAGS[: chosen.keep_tags]
        assert len(set(tags)) == len(tags)
        assert set(tags) <= set(TAGS)
        if not chosen.shuffle_tags:
            assert tags == sorted(tags)


def test_tags_fall_out_and_move_as_often_as_said() -> None:
    rng = np.random.default_rng(0)
    n = 4000
    chosen = Wording(shuffle_tags=True, tag_dropout=0.25, keep_tags=2)
    versions = [reword(",".join(TAGS), chosen, rng).split(", ") for _ in range(n)]
    counts = Counter(tag for version in versions for tag in version)
    deviation = np.sqrt(n * 0.25 * 0.75)
    for tag in TAGS[2:]:
        assert abs(counts[tag] - 0.75 * n) < 5 * deviation  # five standard errors
    third = Counter(version[2] for version in versions if len(version) > 2)
    expected = sum(third.values()) / 6
    assert all(abs(third[tag] - expected) < 5 * np.sqrt(expected) for tag in TAGS[2:])


def test_every_caption_has_its_versions_and_plain_ones_have_one() -> None:
    three = item("a", "one", "two, too", "three")
    assert wordings(three, Wording(), 0) == three.captions
    assert wordings(item("a"), Wording(), 0) == ("",)
    varied = wordings(three, Wording(shuffle_tags=True, variants=5), 0)
    assert len(varied) == 15
    assert Counter(map(len, varied)) == {3: 5, 8: 5, 5: 5}
    untouched = item("a", "a  b ,c,, ")
    assert wordings(untouched, Wording(dropout=0.5, keep_tags=1), 0) == untouched.captions


def test_what_training_asks_for_is_always_in_the_cache() -> None:
    rng = np.random.default_rng(0)
    items = [
        item("a", "one, two, three", "uno, due"),
        item("b", "four, five"),
        item("c"),
        item("d", "", "six, seven, eight, nine"),
    ]
    for seed in range(8):
        chosen = settings(rng)
        cached = texts_to_encode(items, chosen, seed)
        assert cached[0] == ""
        assert len(set(cached)) == len(cached)
        assert len(cached) <= 1 + sum(len(wordings(i, chosen, seed)) for i in items)
        asked = {caption_for(i, chosen, seed, rng) for i in items for _ in range(150)}
        assert asked <= set(cached)
        if chosen.dropout < 0.5:  # each of at most 10 wordings in 150 draws: missed once in 2000
            assert asked | {""} == set(cached)


def test_the_empty_text_comes_as_often_as_said_and_the_others_evenly() -> None:
    rng = np.random.default_rng(0)
    n = 6000
    picked = Counter(pick(3, Wording(dropout=0.1), rng) for _ in range(n))
    for which, share in ((None, 0.1), (0, 0.3), (1, 0.3), (2, 0.3)):
        assert abs(picked[which] - share * n) < 5 * np.sqrt(share * (1 - share) * n)
    assert pick(3, Wording(dropout=1.0), rng) is None
    assert pick(1, Wording(dropout=0.0), rng) == 0


def test_dropout_does_not_change_which_wording_would_have_come() -> None:
    """So that two runs that differ in dropout alone see the same words where both see words."""
    for seed in range(50):
        plain, some = (pick(5, Wording(dropout=p), np.random.default_rng(seed)) for p in (0.0, 0.5))
        assert some in (None, plain)


@pytest.mark.parametrize(
    "field,wrong",
    [("dropout", 1.1), ("dropout", float("nan")), ("tag_dropout", -0.1), ("keep_tags", -1),
     ("variants", 0)],
)  # fmt: skip
def test_values_out_of_range_are_refused(field: str, wrong: float) -> None:
    told: dict[str, Any] = {field: wrong}
    with pytest.raises(UserError, match=field):
        Wording(**told)
