"""Captions are true, closed in vocabulary, many, and split cleanly; folders round-trip."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_pipeline.data.world import (
    KINDS,
    VOCABULARY,
    Description,
    Mention,
    Scene,
    Thing,
    World,
    among_strangers,
    caption_of,
    describe,
    hard_negatives,
    held_out_caption,
    held_out_pair,
    phrase,
    sample_scene,
    write_folder,
)
from ldm_pipeline.data.world.captions import words_of
from ldm_pipeline.data.world.scene import place_of, relation_of
from ldm_pipeline.errors import UserError

SPLITS = ("train", "test", "unseen pairs")


def _fits(thing: Thing, mention: Mention) -> bool:
    return (
        thing.kind == mention.kind
        and mention.colour in (None, thing.colour)
        and mention.size in (None, thing.size)
        and mention.style in (None, thing.style)
        and mention.place in (None, place_of(thing.x, thing.y))
    )


def _true(description: Description, scene: Scene) -> bool:
    """Whether every claim holds, and the mentions are all that there is."""
    groups = [[t for t in scene.things if _fits(t, m)] for m in description.mentions]
    if any(len(g) != m.count for g, m in zip(groups, description.mentions, strict=True)):
        return False
    if sum(map(len, groups)) != len(scene.things):
        return False
    told = description.relation
    if told is not None and relation_of(groups[0][0], groups[1][0]) != told:
        return False
    return description.background in (None, scene.background)


@pytest.fixture(scope="module", params=SPLITS)
def told(request: pytest.FixtureRequest) -> tuple[str, list[tuple[Scene, Description, str]]]:
    world = World(11, request.param)
    return request.param, [world.told(i) for i in range(1500)]


def test_every_claim_is_true_of_the_scene(
    told: tuple[str, list[tuple[Scene, Description, str]]],
) -> None:
    for scene, description, caption in told[1]:
        assert _true(description, scene), caption


def test_captions_are_closed_in_vocabulary_and_short(
    told: tuple[str, list[tuple[Scene, Description, str]]],
) -> None:
    known = set(VOCABULARY)
    for _, _, caption in told[1]:
        words = words_of(caption)
        assert set(words) <= known, caption
        assert 1 <= len(words) <= 40
        assert caption == caption.lower().strip()
        assert "  " not in caption
        assert not set(caption) - set("abcdefghijklmnopqrstuvwxyz234,' ")


def test_splits_hold_what_they_promise(
    told: tuple[str, list[tuple[Scene, Description, str]]],
) -> None:
    split, samples = told
    for scene, _, caption in samples:
        unseen = any(held_out_pair(thing.kind, thing.colour) for thing in scene.things)
        assert unseen == (split == "unseen pairs")
        if split != "unseen pairs":
            assert held_out_caption(caption) == (split == "test")


def test_five_per_cent_of_captions_are_held_out() -> None:
    rng = np.random.default_rng(5)
    captions: set[str] = set()
    while len(captions) < 4000:
        scene = sample_scene(rng)
        captions.add(phrase(describe(scene, rng), rng))
    share = np.mean([held_out_caption(caption) for caption in captions])
    assert abs(share - 0.05) < 0.0175  # five standard errors of 4000 draws (0.35 % each)


def test_background_is_told_in_about_six_of_ten_captions() -> None:
    samples = [World(2).told(i) for i in range(1500)]
    share = np.mean([description.background is not None for _, description, _ in samples])
    assert abs(share - 0.61) < 0.065  # five standard errors (1.3 % each); empty scenes always tell


def test_one_description_has_many_phrasings() -> None:
    rng = np.random.default_rng(6)
    description = Description(
        (Mention("cat's face", "purple"), Mention("car", "gray", size="small")), "above"
    )
    captions = {phrase(description, rng) for _ in range(300)}
    assert len(captions) > 60
    for words in ("kitty face", "automobile", "violet", "grey", "tiny", "over"):
        assert any(words in caption for caption in captions), words


def test_articles_fit_the_words_that_follow() -> None:
    for _, _, caption in (World(8).told(i) for i in range(1500)):
        words = words_of(caption)
        for article, word in pairwise(words):
            if article in ("a", "an"):
                assert (article == "an") == (word[0] in "aeiou"), caption


def test_hard_negatives_are_false_and_different() -> None:
    rng = np.random.default_rng(7)
    counted = 0
    for i in range(400):
        scene, description, _ = World(9, "test").told(i)
        negatives = hard_negatives(description, rng, 6)
        counted += len(negatives)
        assert len(set(negatives)) == len(negatives)
        assert not any(_true(negative, scene) for negative in negatives)
        for negative in negatives:
            assert set(words_of(phrase(negative, rng))) <= set(VOCABULARY)
    assert counted >= 0.99 * 6 * 400  # nearly every description has six near misses


def test_hard_negatives_swap_and_reverse() -> None:
    rng = np.random.default_rng(8)
    first, second = Mention("star", "red"), Mention("house", "blue")
    negatives = hard_negatives(Description((first, second), "above"), rng, 40)
    pairs = [{(m.kind, m.colour) for m in negative.mentions} for negative in negatives]
    assert {("star", "blue"), ("house", "red")} in pairs
    assert Description((first, second), "below") in negatives
    assert any(m.kind not in ("star", "house") for n in negatives for m in n.mentions)


def test_strange_words_come_before_after_and_between_and_take_nothing_away() -> None:
    """All of a caption's words stay, in their order, beside at least one that no caption has."""
    rng, caption = np.random.default_rng(4), "a red star above two small blue houses"
    before = between = after = 0
    seen: set[str] = set()
    for _ in range(400):
        words = re.findall("[a-z]+", among_strangers(caption, rng))
        strange = [i for i, word in enumerate(words) if word not in VOCABULARY]
        known = " ".join(word for word in words if word in VOCABULARY)
        assert strange
        assert caption in known, known
        seen.update(words[i] for i in strange)
        first, last = words.index("red"), words.index("houses")
        before += all(i < first for i in strange)
        after += all(i > last for i in strange)
        between += all(first < i < last for i in strange)
    assert min(before, between, after) > 60
    assert len(seen) > 380  # hardly ever the same one twice


def test_caption_of_respects_the_hold_out() -> None:
    rng = np.random.default_rng(9)
    scene = sample_scene(rng, case="related pair")
    for wanted in (False, True):
        worded = caption_of(scene, rng, held_out=wanted)
        assert worded is not None
        assert held_out_caption(worded[1]) == wanted


def test_every_kind_is_named_in_training() -> None:
    named = {m.kind for i in range(1500) for m in World(0).told(i)[1].mentions}
    assert named == set(KINDS)


def test_a_written_folder_holds_the_same_samples(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", 5, seed=3, split="test")
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 5
    for index, line in enumerate(lines):
        record, sample = json.loads(line), World(3, "test")[index]
        assert record["text"] == sample.caption
        with Image.open(folder / record["file_name"]) as picture:
            assert np.array_equal(np.asarray(picture), sample.picture)
        things = tuple(Thing(**thing) for thing in record["scene"]["things"])
        assert things == sample.scene.things


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="n=0"):
        write_folder(tmp_path, 0)
