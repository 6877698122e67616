"""The world keeps its own rules: scenes, pictures and masks are what they say."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from ldm_pipeline.data.world import (
    COLOURS,
    HELD_OUT_PAIRS,
    KINDS,
    PATTERNS,
    SIZES,
    STYLES,
    Background,
    Scene,
    Thing,
    World,
    held_out_pair,
    masks,
    render,
    sample_scene,
)
from ldm_pipeline.data.world.render import backdrop
from ldm_pipeline.data.world.scene import (
    CANVAS,
    CASES,
    GAP,
    RADII,
    SIZE_JITTER,
    distance,
    relation_of,
    stands_out,
    tones,
)
from ldm_pipeline.errors import UserError


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = np.random.default_rng(1)
    return [sample_scene(rng) for _ in range(3000)]


def test_things_lie_apart_and_within_the_canvas(scenes: list[Scene]) -> None:
    for scene in scenes:
        for i, thing in enumerate(scene.things):
            for at in (thing.x, thing.y):
                assert thing.radius <= at <= CANVAS - thing.radius
            for other in scene.things[i + 1 :]:
                gap = max(abs(thing.x - other.x), abs(thing.y - other.y))
                # Positions and radii are rounded to 0.01 pixels, four of them make up the gap.
                assert gap - thing.radius - other.radius >= GAP - 0.04


def test_sizes_do_not_overlap_and_tilts_are_small(scenes: list[Scene]) -> None:
    for thing in (thing for scene in scenes for thing in scene.things):
        # 0.01: radii are rounded to two digits.
        assert abs(thing.radius - RADII[thing.size]) <= SIZE_JITTER * RADII[thing.size] + 0.01
        assert abs(thing.tilt) <= 8
    bounds = [(RADII[s] * (1 - SIZE_JITTER), RADII[s] * (1 + SIZE_JITTER)) for s in SIZES]
    assert bounds[0][1] < bounds[1][0]
    assert bounds[1][1] < bounds[2][0]


def test_every_thing_stands_out_from_its_background(scenes: list[Scene]) -> None:
    for scene in scenes:
        for thing in scene.things:
            assert thing.colour != scene.background.colour
            assert stands_out(thing.colour, scene.background)


def test_the_mix_of_cases_holds_every_kind_colour_pattern_and_number(scenes: list[Scene]) -> None:
    things = [thing for scene in scenes for thing in scene.things]
    for name, every in (("kind", KINDS), ("colour", tuple(COLOURS)), ("size", SIZES),
                        ("style", STYLES)):  # fmt: skip
        seen = Counter(getattr(thing, name) for thing in things)
        # No value is rarer than a quarter of an even share (large things fit only in ones and
        # twos): enough of each to learn from.
        assert min(seen[value] for value in every) > 0.25 * len(things) / len(every)
    assert {scene.background.pattern for scene in scenes} == set(PATTERNS)
    numbers = Counter(len(scene.things) for scene in scenes)
    assert set(numbers) == {0, 1, 2, 3, 4}
    # 35 % of 3000 scenes show one thing, give or take five standard errors (0.9 % each).
    assert abs(numbers[1] / len(scenes) - 0.35) < 0.045


def test_a_related_pair_stands_along_one_axis() -> None:
    rng = np.random.default_rng(2)
    for _ in range(300):
        first, second = sample_scene(rng, case="related pair").things
        assert relation_of(first, second) is not None


def test_a_count_is_of_one_thing() -> None:
    rng = np.random.default_rng(3)
    for _ in range(100):
        things = sample_scene(rng, case="count").things
        assert 2 <= len(things) <= 4
        assert len({(t.kind, t.colour, t.size, t.style) for t in things}) == 1


@pytest.mark.parametrize("case", CASES)
def test_the_caller_chooses_case_and_allowed_pairs(case: str) -> None:
    rng = np.random.default_rng(4)
    scene = sample_scene(rng, case=case, allowed=lambda kind, colour: colour in ("red", "blue"))
    assert {thing.colour for thing in scene.things} <= {"red", "blue"}


def test_held_out_pairs_are_five_per_cent_and_leave_every_kind_and_colour() -> None:
    share = len(HELD_OUT_PAIRS) / (len(KINDS) * len(COLOURS))
    assert 0.045 <= share <= 0.055  # 17 of 336: the nearest that whole pairs come to 5 %
    assert all(held_out_pair(*pair) for pair in HELD_OUT_PAIRS)
    assert max(Counter(kind for kind, _ in HELD_OUT_PAIRS).values()) == 1
    assert max(Counter(colour for _, colour in HELD_OUT_PAIRS).values()) <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_named_colour_dominates_and_the_mask_is_what_differs(kind: str) -> None:
    scene = Scene(Background("plain", "gray"), (Thing(kind, "red", "large", "flat", 64, 64, 33),))
    picture, mask = render(scene), masks(scene)[0]
    named = np.abs(picture.astype(int) - COLOURS["red"]).max(2) < 40
    assert named[mask].mean() >= 0.6
    differs = (picture != COLOURS["gray"]).any(2)
    assert (mask <= differs).all()
    # Pixels that are covered by less than half differ too, but only along the outline.
    outline = mask ^ np.roll(mask, 1, 0) | mask ^ np.roll(mask, 1, 1)
    assert (differs & ~mask).sum() <= 2 * outline.sum()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("size", SIZES)
def test_a_thing_fills_the_box_that_its_radius_says(size: str, style: str) -> None:
    for kind in KINDS:
        thing = Thing(kind, "blue", size, style, 60.3, 66.7, RADII[size], 5.0)
        rows, columns = np.nonzero(masks(Scene(Background("plain", "white"), (thing,)))[0])
        left, right = columns.min(), columns.max() + 1
        top, bottom = rows.min(), rows.max() + 1
        # A pixel each side: sharp tips cover less than half of the last pixels.
        assert abs((left + right) / 2 - thing.x) <= 1.5
        assert abs((top + bottom) / 2 - thing.y) <= 1.5
        assert abs(max(right - left, bottom - top) - 2 * thing.radius) <= 3


def test_masks_of_a_scene_do_not_overlap(scenes: list[Scene]) -> None:
    for scene in scenes[:200]:
        stack = masks(scene)
        assert stack.shape == (len(scene.things), CANVAS, CANVAS)
        assert stack.sum(0).max(initial=0) <= 1
        assert all(mask.any() for mask in stack)


def test_outside_the_masks_there_is_only_background(scenes: list[Scene]) -> None:
    for scene in scenes[:200]:
        if scene.background.pattern == "starry night":
            continue  # its stars are no things
        covered = np.zeros((CANVAS, CANVAS), dtype=bool)
        for thing in scene.things:
            reach = thing.radius + 1.5
            columns = slice(max(int(thing.x - reach), 0), int(thing.x + reach) + 1)
            covered[max(int(thing.y - reach), 0) : int(thing.y + reach) + 1, columns] = True
        untouched = render(scene) == backdrop(scene.background)
        assert untouched[~covered].all()


def test_flat_and_outlined_differ_on_every_background() -> None:
    for pattern in PATTERNS:
        background = Background(pattern, "blue" if pattern in PATTERNS[:3] else None)
        for colour in COLOURS:
            if not stands_out(colour, background):
                continue
            flat, outlined = (
                render(Scene(background, (Thing("circle", colour, "medium", s, 64, 64, 22),)))
                for s in STYLES
            )
            ring = np.linalg.norm(flat.astype(float) - outlined, axis=2)
            # The contour is at least 100 from the fill, over a ring 2.5 wide and 130 around.
            assert (ring > 60).sum() > 200


def test_no_two_palette_colours_are_close() -> None:
    values = list(COLOURS.values())
    closest = min(distance(a, b) for i, a in enumerate(values) for b in values[i + 1 :])
    assert closest > 80  # a wobble of 8 a channel moves a colour by 14


def test_every_background_has_its_own_look() -> None:
    plain = {tones(Background("plain", colour)) for colour in COLOURS}
    assert len(plain) == len(COLOURS)
    for colour in COLOURS:
        for pattern in ("stripes", "checks"):
            light, dark = tones(Background(pattern, colour))
            assert distance(light, dark) > 60


def test_samples_are_the_same_in_any_order_and_any_process() -> None:
    world = World(7, "train")
    forwards = [world[i] for i in range(12)]
    backwards = [World(7, "train")[i] for i in reversed(range(12))][::-1]
    for a, b in zip(forwards, backwards, strict=True):
        assert a == b
        assert np.array_equal(a.picture, b.picture)
    code = (
        "import hashlib; from ldm_pipeline.data.world import World\n"
        "for i in range(12):\n"
        "    s = World(7, 'train')[i]\n"
        "    print(hashlib.sha256(s.picture.tobytes()).hexdigest(), s.caption)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    mine = [f"{hashlib.sha256(s.picture.tobytes()).hexdigest()} {s.caption}" for s in forwards]
    assert run.stdout.splitlines() == mine


def test_seeds_and_splits_give_other_scenes() -> None:
    scenes = {World(seed, split)[3].scene for seed in (0, 1) for split in ("train", "test")}
    assert len(scenes) == 4


def test_the_world_refuses_what_it_does_not_have() -> None:
    with pytest.raises(UserError, match="did you mean 'train'"):
        World(0, "trian")
    with pytest.raises(UserError, match="seed"):
        World(-1)
    with pytest.raises(IndexError):
        World(0)[-1]
