"""Concepts are new, true to the world's rules, and split so that evaluation asks for new pictures.

samples   training samples of one concept
prompts   evaluation prompts of the same concept
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_pipeline.cli import main
from ldm_pipeline.commands import dataset
from ldm_pipeline.data.world import (
    COLOURS,
    KINDS,
    PLACES,
    VOCABULARY,
    Background,
    Description,
    Mention,
    Sample,
    Scene,
    Thing,
    World,
    held_out_pair,
    masks,
    phrase,
    render,
)
from ldm_pipeline.data.world.captions import words_of
from ldm_pipeline.data.world.concepts import (
    BURST,
    CONCEPTS,
    EVALUATION,
    RAYS,
    TRAINING,
    Side,
    backdrop,
    burst_of,
    comic,
    concept_prompts,
    concept_sample,
    write_concept,
)
from ldm_pipeline.data.world.scene import distance, place_of, tones
from ldm_pipeline.errors import UserError


@pytest.fixture(scope="module", params=CONCEPTS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def samples(name: str) -> list[Sample]:
    return [concept_sample(name, i) for i in range(70)]


@pytest.fixture(scope="module")
def prompts(name: str) -> tuple[Sample, ...]:
    return concept_prompts(name, 70)


def _told(description: Description) -> list[tuple[str, str | None]]:
    return sorted((mention.kind, mention.colour) for mention in description.mentions)


def _shown(scene: Scene) -> list[tuple[str, str | None]]:
    return sorted((thing.kind, thing.colour) for thing in scene.things)


def test_concepts_are_new_to_the_world() -> None:
    assert "cactus" not in KINDS
    assert not {"cactus", "cactuses", "comic", "style"} & set(VOCABULARY)
    assert not any(
        thing.kind == "cactus" for i in range(300) for thing in World(0).told(i)[0].things
    )


def test_knowing_the_concepts_changes_nothing_of_the_world() -> None:
    code = (
        "import hashlib, sys; from ldm_pipeline.data.world import VOCABULARY, World\n"
        "assert 'ldm_pipeline.data.world.concepts' not in sys.modules\n"
        "for i in range(8):\n"
        "    s = World(5, 'test')[i]\n"
        "    print(hashlib.sha256(s.picture.tobytes()).hexdigest(), s.caption)\n"
        "print(VOCABULARY)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = [World(5, "test")[i] for i in range(8)]
    mine = [f"{hashlib.sha256(s.picture.tobytes()).hexdigest()} {s.caption}" for s in here]
    assert run.stdout.splitlines() == [*mine, str(VOCABULARY)]


def test_the_two_sides_share_nothing_and_leave_nothing_out() -> None:
    for field, every in (("colours", COLOURS), ("places", PLACES), ("company", KINDS)):
        shown, asked = getattr(TRAINING, field), getattr(EVALUATION, field)
        assert not set(shown) & set(asked)
        assert {*shown, *asked} == set(every)


def _keeps(side: Side, sample: Sample, name: str) -> bool:
    """Whether all that a sample shows is on one side of the split."""
    scene = sample.scene
    things = list(scene.things)
    subject = things[0]
    colours = {thing.colour for thing in things} | {scene.background.colour} - {None}
    kinds = {thing.kind for thing in things} - {name}
    return (
        colours <= set(side.colours)
        and kinds <= set(side.company)
        and place_of(subject.x, subject.y) in side.places
    )


def test_each_sample_stays_on_its_side(
    name: str, samples: list[Sample], prompts: Sequence[Sample]
) -> None:
    assert all(_keeps(TRAINING, sample, name) for sample in samples)
    assert all(_keeps(EVALUATION, sample, name) for sample in prompts)
    assert not any(_keeps(EVALUATION, sample, name) for sample in samples)


def test_pairs_that_no_training_shows_stay_out(
    samples: list[Sample], prompts: Sequence[Sample]
) -> None:
    things = [thing for sample in (*samples, *prompts) for thing in sample.scene.things]
    assert not any(held_out_pair(thing.kind, thing.colour) for thing in things)


def test_a_small_folder_shows_each_colour_and_both_alone_and_in_company(
    samples: list[Sample],
) -> None:
    few = samples[:24]
    assert {sample.scene.things[0].colour for sample in few} == set(TRAINING.colours)
    assert [len(sample.scene.things) for sample in few] == 8 * [1, 2, 2]


def test_captions_tell_the_concept_and_every_colour_truly(
    name: str, samples: list[Sample], prompts: Sequence[Sample]
) -> None:
    for sample in (*samples, *prompts):
        assert name in words_of(sample.caption)
        assert _told(sample.description) == _shown(sample.scene), sample.caption
        extra = {"cactus"} if name == "cactus" else {"comic", "style", "in"}
        assert set(words_of(sample.caption)) <= {*VOCABULARY, *extra}, sample.caption
        for mention in sample.description.mentions:
            thing = next(t for t in sample.scene.things if t.kind == mention.kind)
            assert mention.place in (None, place_of(thing.x, thing.y))


def test_prompts_for_one_thing_tell_its_place(prompts: Sequence[Sample]) -> None:
    alone = [s.description.mentions[0] for s in prompts if len(s.description.mentions) == 1]
    assert alone
    assert {mention.place for mention in alone} == set(EVALUATION.places)


def test_the_subject_is_never_small(samples: list[Sample], prompts: Sequence[Sample]) -> None:
    assert all(sample.scene.things[0].size != "small" for sample in (*samples, *prompts))


def test_samples_depend_on_their_arguments_alone(name: str, samples: list[Sample]) -> None:
    again = concept_sample(name, 5)
    assert again == samples[5]
    assert np.array_equal(again.picture, samples[5].picture)
    assert concept_sample(name, 5, seed=1) != samples[5]
    assert concept_prompts(name, 3) == concept_prompts(name, 6)[:3]


def test_a_cactus_is_mostly_its_named_colour_and_fills_its_box() -> None:
    for size, radius in (("small", 14.0), ("medium", 22.0), ("large", 33.0)):
        thing = Thing("cactus", "blue", size, "flat", 60.3, 66.7, radius, 5.0)
        scene = Scene(Background("plain", "white"), (thing,))
        picture, mask = render(scene), masks(scene)[0]
        named = np.abs(picture.astype(int) - COLOURS["blue"]).max(2) < 40
        assert named[mask].mean() >= 0.6  # what the world asks of its own kinds
        rows, columns = np.nonzero(mask)
        high, wide = rows.max() + 1 - rows.min(), columns.max() + 1 - columns.min()
        assert abs(max(high, wide) - 2 * radius) <= 2  # edge pixels are less than half covered
        assert abs((rows.min() + rows.max() + 1) / 2 - thing.y) <= 1


def test_a_cactus_is_worded_like_any_thing() -> None:
    rng = np.random.default_rng(0)
    captions = {phrase(Description((Mention("cactus", "red", 2),)), rng) for _ in range(20)}
    assert all("red cactuses" in caption for caption in captions)


def test_a_comic_picture_is_outlined_things_on_rays() -> None:
    flat = Thing("star", "red", "medium", "flat", 40.0, 44.0, 22.0)
    scene = Scene(Background("plain", "white"), (flat,))
    picture, behind = comic(scene), backdrop(Background(BURST, "white"))
    covered = np.zeros((128, 128), dtype=bool)
    covered[21:68, 17:64] = True
    assert np.array_equal(picture[~covered], behind[~covered])
    inside = picture[21:68, 17:64].reshape(-1, 3).astype(float)
    for colour in (COLOURS["red"], (26, 24, 30)):  # its own colour, and the dark contour
        assert sum(distance(pixel, colour) < 8 for pixel in inside.tolist()) > 50


@pytest.mark.parametrize("colour", COLOURS)
def test_rays_are_two_tones_in_equal_parts(colour: str) -> None:
    light, dark = tones(Background(BURST, colour))
    picture = backdrop(burst_of(Background("plain", colour)))
    share = {tone: (picture == tone).all(2).mean() for tone in (light, dark)}
    # RAYS edges of at most 91 pixels each are mixtures, about a pixel and a half wide: under 10 %.
    assert sum(share.values()) > 0.9
    assert abs(share[light] - share[dark]) < 0.02
    assert np.array_equal(picture, np.rot90(picture, 2)), "half a turn is RAYS / 2 rays"
    around = picture[np.rint(63.5 + 40 * np.sin(_ANGLES)).astype(int),
                     np.rint(63.5 + 40 * np.cos(_ANGLES)).astype(int)]  # fmt: skip
    assert [tuple(pixel) for pixel in around.tolist()] == [light, dark] * (RAYS // 2)


_ANGLES = (np.arange(RAYS) + 0.5) * 2 * np.pi / RAYS


def test_a_written_folder_holds_the_same_samples(tmp_path: Path, name: str) -> None:
    folder = write_concept(tmp_path / "set", name, 4, seed=3)
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 4
    for index, line in enumerate(lines):
        record, sample = json.loads(line), concept_sample(name, index, 3)
        assert (record["text"], record["concept"]) == (sample.caption, name)
        with Image.open(folder / record["file_name"]) as picture:
            assert np.array_equal(np.asarray(picture), sample.picture)
        things = tuple(Thing(**thing) for thing in record["scene"]["things"])
        assert things == sample.scene.things


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'cactus'"):
        concept_sample("cactis", 0)
    with pytest.raises(UserError, match="index=-1"):
        concept_sample("comic", -1)
    with pytest.raises(UserError, match="seed=-2"):
        concept_prompts("comic", 3, seed=-2)
    with pytest.raises(UserError, match="n=0"):
        concept_prompts("comic", 0)
    for name, n, told in (("cubist", 1, "'cubist' is not known"), ("comic", 0, "n=0")):
        with pytest.raises(UserError, match=told):
            write_concept(tmp_path / "none", name, n)
    with pytest.raises(UserError, match="seed=-1"):
        write_concept(tmp_path / "none", "comic", 1, seed=-1)
    assert not (tmp_path / "none").exists(), "nothing is made before the arguments are right"


def test_the_command_writes_the_same_folder(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made"
    command = ["dataset", "concept", "--name", name, "--out", str(out), "--seed", "2"]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert len(list(out.glob("*.png"))) == 24, "the default of --n"
    written = write_concept(tmp_path / "written", name, 24, seed=2)
    for file in written.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()


def test_the_command_knows_every_concept() -> None:
    assert tuple(CONCEPTS) == dataset.CONCEPTS


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--out new", "needs --name"),
        ("--name cactus", "needs --out"),
        ("--name cactis --out new", "--name='cactis' is not known; choose one of cactus, comic"),
        ("--name comic --out new --n 0", "--n=0"),
        ("--name comic --out new --seed -1", "--seed=-1"),
        ("--name comic --out new --split test", "takes no --split"),
    ],
)
def test_the_command_refuses_mistakes_in_one_line(
    arguments: str,
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["dataset", "concept", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
