"""Buckets: every size has one, the nearest in shape, and nothing is enlarged unless asked.

Pictures are noise of all shapes; the laws hold for each of many bucket settings.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from ldm_pipeline.data.buckets import Buckets, Size, aspect_buckets, cover, crop_at, one_size
from ldm_pipeline.errors import UserError

SETTINGS = [(512, 64), (1024, 64), (128, 8), (128, 64), (64, 64), (768, 32)]


def sizes(n: int = 60) -> Iterator[Size]:
    """Sizes from 1 to 5000 on each side, small and large alike, and a few that are extreme."""
    rng = np.random.default_rng(0)
    for width, height in np.exp(rng.uniform(0, np.log(5000), (n, 2))).astype(int):
        yield int(width), int(height)
    yield from ((1, 1), (1, 5000), (5000, 1), (512, 512), (511, 512), (4096, 256))


def apart(size: Size, bucket: Size) -> Fraction:
    """The factor, at least 1, between two aspect ratios; exact."""
    factor = Fraction(*size) / Fraction(*bucket)
    return max(factor, 1 / factor)


@pytest.mark.parametrize(("resolution", "step"), SETTINGS)
def test_buckets_keep_to_step_area_and_sides(resolution: int, step: int) -> None:
    buckets = aspect_buckets(resolution, step)
    areas = [max(w * h for w, h in family) for family in buckets.families]
    assert areas == sorted(set(areas), reverse=True)
    assert areas[0] == resolution**2
    assert (resolution, resolution) in buckets.families[0]
    low, high = max(step, resolution // 4 // step * step), 2 * resolution
    for family, area in zip(buckets.families, areas, strict=True):
        assert len(set(family)) == len(family)
        assert {(h, w) for w, h in family} == set(family)
        for width, height in family:
            assert width % step == height % step == 0
            assert low <= min(width, height)
            assert max(width, height) <= high
            # As large as the area allows: one step more on some side would be too much.
            assert width * height <= area < width * height + step * max(width, height)


@pytest.mark.parametrize(("resolution", "step"), SETTINGS)
@pytest.mark.parametrize("upscale", [False, True])
def test_every_size_gets_the_nearest_bucket_of_the_largest_family_it_fills(
    resolution: int, step: int, upscale: bool
) -> None:
    buckets = aspect_buckets(resolution, step, upscale=upscale)
    reported = 0
    for size in sizes():
        chosen = buckets.choose(size)
        assert chosen == buckets.choose(size)
        expected = None
        for family in buckets.families:
            least = min(apart(size, bucket) for bucket in family)
            nearest = [bucket for bucket in family if apart(size, bucket) == least]
            filled = [b for b in nearest if upscale or (size[0] >= b[0] and size[1] >= b[1])]
            if filled:
                expected = filled
                break
        if chosen is None:
            reported += 1
            assert expected is None
        else:
            assert expected is not None
            assert chosen in expected
    assert (reported == 0) == upscale


@pytest.mark.parametrize(("resolution", "step"), SETTINGS)
def test_the_border_between_two_buckets_is_their_geometric_mean(resolution: int, step: int) -> None:
    """Half a percent to either side of it, the bucket of that side is chosen."""
    buckets = aspect_buckets(resolution, step)
    for (w, h), (wider, lower) in pairwise(sorted(buckets.families[0], key=lambda b: b[0] / b[1])):
        border = (w / h * wider / lower) ** 0.5
        if wider / lower > 1.02 * w / h:
            assert buckets.choose((round(border * 0.995 * 10**5), 10**5)) == (w, h)
            assert buckets.choose((round(border * 1.005 * 10**5), 10**5)) == (wider, lower)


@pytest.mark.parametrize("upscale", [False, True])
def test_pictures_are_covered_and_cut_inside_and_enlarged_only_if_asked(upscale: bool) -> None:
    rng = np.random.default_rng(1)
    enlarged = 0
    for buckets in (aspect_buckets(256, 32, upscale=upscale), one_size(96, 64, upscale=upscale)):
        for size in sizes():
            at = (float(rng.random()), float(rng.random()))
            transform = buckets.fit(size, at)
            if transform is None:
                continue
            (width, height), (w, h) = transform.resized, transform.bucket
            assert 0 <= transform.left <= width - w
            assert 0 <= transform.top <= height - h
            assert width == w or height == h, "larger than needed to cover the bucket"
            # Rounding to whole pixels is all that changes the shape.
            scale = Fraction(w, size[0]) if width == w else Fraction(h, size[1])
            assert abs(width - size[0] * scale) <= Fraction(1, 2) or height == h
            assert abs(height - size[1] * scale) <= Fraction(1, 2) or width == w
            grows = width > size[0] or height > size[1]
            enlarged += grows
            assert upscale or not grows
    assert bool(enlarged) == upscale


def test_a_small_picture_goes_to_the_largest_family_it_fills_or_is_reported() -> None:
    buckets = aspect_buckets(512)
    assert buckets.choose((500, 500)) == (448, 448)
    assert buckets.choose((512, 512)) == (512, 512)
    assert buckets.choose((255, 255)) is None
    assert one_size(512, 512).choose((500, 500)) is None
    assert aspect_buckets(512, upscale=True).choose((20, 20)) == (512, 512)


def test_a_fixed_resolution_is_one_bucket() -> None:
    buckets = one_size(512, 320)
    assert {buckets.choose(size) for size in sizes()} == {(512, 320), None}
    assert buckets == Buckets((((512, 320),),))


def test_pixels_and_masks_are_cut_from_the_same_place() -> None:
    """Each pixel tells its own place, so what comes back tells where it was cut."""
    rows, columns = np.mgrid[0:90, 0:70].astype(np.uint8)
    pixels = np.dstack([rows, columns, rows])
    transform = cover((70, 90), (70, 40), at=(0.5, 0.8))
    assert (transform.left, transform.top) == (0, 40)
    cut = transform.picture(pixels)
    assert np.array_equal(cut, pixels[40:80])
    assert np.array_equal(transform.mask(rows), cut[..., 0])
    # Halved: a resized ramp stays a ramp, to the rounding of a level and the filter's edge.
    half = cover((70, 90), (32, 40))
    shown, mask = half.picture(pixels), half.mask(rows)
    assert shown.shape == (40, 32, 3)
    assert mask.shape == (40, 32)
    assert np.abs(shown[3:-3, 3:-3, 0].astype(int) - mask[3:-3, 3:-3]).max() <= 1


def test_reduction_does_not_alias() -> None:
    """A one-pixel chequerboard averages to grey; picking pixels would leave black and white."""
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    small = cover((256, 256), (64, 64)).picture(np.dstack([board] * 3))
    assert np.abs(small.astype(int) - 127).max() <= 6  # the border sees half a filter


def test_resizing_is_pillows_lanczos() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    stock = Image.fromarray(pixels).resize((35, 45), Image.Resampling.LANCZOS)
    transform = cover((70, 90), (32, 45))
    assert transform.resized == (35, 45)
    assert np.array_equal(transform.picture(pixels), np.asarray(stock)[:, 2:34])


def test_equal_transforms_have_equal_keys_and_others_have_not() -> None:
    transforms = {
        cover(size, bucket, at)
        for size in ((100, 100), (200, 100), (400, 300))
        for bucket in ((64, 64), (96, 64))
        for at in ((0.0, 0.0), (0.5, 0.5), (0.99, 0.99))
    }
    by_pixels = {(t.resized, t.bucket, t.left, t.top) for t in transforms}
    assert len({t.key for t in transforms}) == len(by_pixels)
    assert cover((100, 90), (64, 64)).key == cover((100, 90), (64, 64)).key


def test_a_seeded_place_depends_on_seed_and_key_alone_and_reaches_everywhere() -> None:
    places = {(seed, key): crop_at(seed, key) for seed in range(20) for key in ("a", "b", "c")}
    assert len(set(places.values())) == 60
    assert places[7, "b"] == crop_at(7, "b")
    lefts = {cover((67, 64), (64, 64), at).left for at in places.values()}
    assert lefts == {0, 1, 2, 3}
    assert cover((67, 64), (64, 64), (1.0, 1.0)).left == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((500,), "resolution=500 must be a multiple of the step, 64"),
        ((32,), "resolution=32"),
        ((64_000_000,), "resolution=64000000 must be a multiple of the step, 64, up to 16384"),
        ((512, 12), "step=12 must be a multiple of 8"),
        ((512, 0), "step=0"),
    ],
)
def test_what_does_not_fit_together_is_refused(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        aspect_buckets(*arguments)
    with pytest.raises(UserError, match="height=60"):
        one_size(64, 60)
