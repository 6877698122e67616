"""`ldm generate --image`: refusals before anything loads, known pixels, pictures that come back.

model   a folder with a tiny random pipeline of the real classes (see test_cli.py)
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm_pipeline import LatentDiffusionPipeline, LatentDiffusionXLPipeline
from ldm_pipeline.commands import generate
from ldm_pipeline.commands.pictures import read_sides
from ldm_pipeline.errors import UserError
from ldm_pipeline.images import grown
from ldm_pipeline.metadata import Origin, Recipe
from ldm_pipeline.picture_files import read_recipe, save_picture
from tests.parity.pairs import mask, picture
from tests.test_cli import Ldm, ldm, model, redraw

__all__ = ["ldm", "model"]

REFUSED = {
    "generate x --strength 0.5": "--strength needs a picture: pass --image FILE",
    "generate x --mask hole.png": "--mask needs a picture",
    "generate x --grow 8": "--grow needs a picture",
    "generate x --exact-steps": "--exact-steps needs a picture",
    "generate x --image a.png --no-keep": "--no-keep needs a mask",
    "generate x --image a.png --crop 4": "--crop needs a mask",
    "generate x --image a.png --strength 0": "--strength=0.0 would draw nothing",
    "generate x --image a.png --strength 1.5": "--strength=1.5 must be a finite number, from 0",
    "generate x --image a.png --strength nan": "--strength=nan",
    "generate x --image a.png --strength much": "--strength",
    "generate x --image nowhere.png": "--image=nowhere.png: there is no such file",
    "generate x --image a.png --mask nowhere.png": "--mask=nowhere.png: there is no such file",
    "generate x --image .": "--image=. is no file",
    "generate x --image words.txt": "--image=words.txt: ",
    "generate x --image cut.png": "--image=cut.png: truncated or damaged",
    "generate x --image a.png --mask words.txt": "--mask=words.txt: ",
    "generate x --image a.png --mask wide.png": "--mask=wide.png is 40x20 and --image=a.png 30x20",
    "generate x --image a.png --mask black.png": "--mask=black.png is black: nothing is to be",
    "generate x --image a.png --mask hole.png --crop -1": "--crop=-1",
    "generate x --image a.png --grow 8,8": "--grow='8,8' must be pixels",
    "generate x --image a.png --grow 0": "--grow='0' must be pixels",
    "generate x --image a.png --grow 99999999": "would be 200000028x200000018; a side has 16384",
    "generate x --image a.png --grow 0,0,16000,16000": "would be 16030x16020",
    "generate x --image a.png --grow 8 --crop 4": "--crop and --grow do not go together",
    "generate x --image a.png --height 30": "multiple of 8",
}


@pytest.fixture
def files(tmp_path: Path) -> None:
    """Pictures of 30 x 20 pixels, which is no multiple of anything, and files of other sorts."""
    picture(30, 20).save(tmp_path / "a.png")
    mask(30, 20).save(tmp_path / "hole.png")
    mask(60, 40).save(tmp_path / "large.png")
    mask(40, 20).save(tmp_path / "wide.png")
    Image.new("L", (30, 20), 100).save(tmp_path / "black.png")
    (tmp_path / "words.txt").write_text("a red star")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:300])


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("arguments", REFUSED)
def test_a_mistake_is_one_line_before_anything_loads(
    arguments: str, ldm: Ldm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("reached the loading of a model")

    monkeypatch.setattr(generate, "open_pipeline", loaded)
    monkeypatch.setattr(generate, "pick_device", loaded)
    code, out, err = ldm(*arguments.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert REFUSED[arguments] in err


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB"))


ASKED = {
    "out of a picture": "--image a.png --strength 0.6",
    "into it": "--image a.png --mask hole.png",
    "with a larger mask": "--image a.png --mask large.png --strength 0.5 --exact-steps",
    "a part of it": "--image a.png --mask hole.png --crop 2",
    "a part of it, larger": "--image a.png --mask hole.png --crop 2 --height 40 --width 48",
    "at another size": "--image a.png --mask hole.png --height 24",
    "around it": "--image a.png --grow 3,0,10,5",
    "around and into it": "--image a.png --grow 4 --mask hole.png --no-keep",
}
SIZES = {"at another size": (30, 24), "around it": (43, 25), "around and into it": (38, 28)}


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("how", ASKED)
def test_the_shown_command_draws_the_same_bytes(how: str, ldm: Ldm, model: Path) -> None:
    words = ["generate", "a red star", "--model", str(model), "--steps", "2", "-o", "b.png"]
    assert ldm(*words, *ASKED[how].split())[:2] == (0, "b.png\n")
    assert redraw(ldm, Path("b.png"), Path("c.png")) == Path("b.png").read_bytes()
    with Image.open("b.png") as drawn:
        assert drawn.size == SIZES.get(how, (30, 20))
        assert "Denoising strength: " in drawn.info["parameters"]


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("how", ["into it", "a part of it", "a part of it, larger"])
def test_pixels_outside_the_mask_stay_unless_told(how: str, ldm: Ldm, model: Path) -> None:
    words = ["generate", "a", "--model", str(model), "--steps", "1", "-o", "b.png", "--seed", "1"]
    stay = np.asarray(mask(30, 20)) < 128
    # Where a part is drawn, stock itself lays the picture over it wherever the mask is black.
    for more in ([], ["--no-keep"]) if how == "into it" else ([],):
        assert ldm(*words, *ASKED[how].split(), *more)[0] == 0
        same = (pixels("b.png") == pixels("a.png")).all(axis=-1)
        assert same[stay].all() == (not more)
        assert not same[~stay].all()


@pytest.mark.usefixtures("files")
def test_the_whole_picture_stays_where_it_grows(ldm: Ldm, model: Path) -> None:
    words = ["generate", "a", "--model", str(model), "--steps", "1", "-o", "b.png"]
    assert ldm(*words, *ASKED["around it"].split())[0] == 0
    assert (pixels("b.png")[:20, 3:33] == pixels("a.png")).all()


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    "xl,strengths,guidances",
    [(False, (0.8, 1.0), (7.5, 7.5)), (True, (0.3, 0.9999), (5.0, 7.5))],
)
def test_strength_and_guidance_that_nobody_named_are_those_of_the_model_s_kind(
    xl: bool,
    strengths: tuple[float, float],
    guidances: tuple[float, float],
    ldm: Ldm,
    tiny: Any,
    tiny_xl: Any,
    tmp_path: Path,
) -> None:
    """As its stock pipelines have it; the picture remembers it."""
    kind = LatentDiffusionXLPipeline if xl else LatentDiffusionPipeline
    kind(**(tiny_xl if xl else tiny)()).save_pretrained(tmp_path / "model")
    words = ["generate", "a", "--model", "model", "--steps", "4", "-o", "b.png", "--seed", "1"]
    for more, strength, guidance in zip(
        ([], ["--mask", "hole.png"]), strengths, guidances, strict=True
    ):
        assert ldm(*words, "--image", "a.png", *more)[0] == 0
        recipe = read_recipe(Path("b.png"))
        assert recipe.origin is not None
        assert (recipe.origin.strength, recipe.guidance) == (strength, guidance)
        assert redraw(ldm, Path("b.png"), Path("c.png")) == Path("b.png").read_bytes()


@pytest.mark.usefixtures("files")
def test_another_picture_is_told(ldm: Ldm, model: Path) -> None:
    """The command is shown all the same; what it would draw is another picture."""
    words = ["generate", "a", "--model", str(model), "--steps", "1", "-o", "b.png"]
    assert ldm(*words, *ASKED["into it"].split())[0] == 0
    assert ldm("show", "b.png")[2] == ""
    picture(30, 20, seed=8).save("a.png")
    Path("hole.png").unlink()
    code, out, err = ldm("show", "b.png")
    assert code == 0
    assert "--image=a.png" in out
    lines = err.splitlines()
    assert len(lines) == 2
    assert "a.png" in lines[0]
    assert "which is another file now" in lines[0]
    assert "hole.png" in lines[1]
    assert "which is not here" in lines[1]


@pytest.mark.usefixtures("files")
def test_a_turned_and_transparent_picture_is_seen_as_it_is_shown(ldm: Ldm, model: Path) -> None:
    """EXIF's orientation is applied, and what shows through is white."""
    clear = picture(30, 20).convert("RGBA")
    clear.putalpha(Image.new("L", (30, 20), 0))
    exif = Image.Exif()
    exif[274] = 6
    clear.save("clear.png", exif=exif)
    words = ["generate", "a", "--model", str(model), "--steps", "1", "-o", "b.png"]
    assert ldm(*words, "--image", "clear.png", "--grow", "8")[0] == 0
    assert pixels("b.png").shape == (46, 36, 3)
    assert (pixels("b.png")[8:-8, 8:-8] == 255).all()


# The parts --------------------------------------------------------------------------------------


def test_growing() -> None:
    image, hole = picture(5, 4), Image.new("L", (5, 4))
    hole.putpixel((2, 1), 255)
    canvas, painted = grown(image, 1, 2, 3, 0, mask=hole)
    assert canvas.size == painted.size == (9, 6)
    assert (np.asarray(canvas)[2:, 1:6] == np.asarray(image)).all()
    assert (np.asarray(canvas)[0, 0] == np.asarray(image)[0, 0]).all(), "continued by its edges"
    inside = np.asarray(painted)[2:, 1:6]
    assert (inside == np.asarray(hole)).all()
    assert np.asarray(painted).sum() == 255 * (9 * 6 - 5 * 4 + 1)
    assert np.asarray(grown(image, 1, mask=hole, painted=False)[1]).sum() == 255


@pytest.mark.parametrize("text", ["", "a", "1,2,3", "1,2,3,4,5", "-1", "1.5", "0,0,0,0"])
def test_sides_that_are_none(text: str) -> None:
    assert read_sides("7") == (7, 7, 7, 7)
    assert read_sides("0, 1,2 ,3") == (0, 1, 2, 3)
    with pytest.raises(UserError, match="must be pixels"):
        read_sides(text)


def test_an_origin_goes_through_json_and_a_forged_one_does_not(tmp_path: Path) -> None:
    origin = Origin(("it's a.png", "1f"), ("b.png", "2f"), 0.3, True, False, 4, (1, 2, 3, 4), 8, 16)
    recipe = Recipe(("a",), 1, 2, 3.0, (8, 16), "cpu", "float32", origin=origin)
    assert Recipe.from_json(recipe.to_json()) == recipe
    words = shlex.split(recipe.command("out.png"))
    assert "--image=it's a.png" in words
    assert "1,2,3,4" in words
    plain = Recipe(("a",), 1, 2, 3.0, (8, 16), "cpu", "float32")
    assert "origin" not in plain.to_json()
    for good, forged in (
        ('"strength": 0.3', '"strength": "rm"'),
        ('"b.png"', "7"),
        ('"crop": 4', '"crop": "4"'),
        ('"grow": [1, 2, 3, 4]', '"grow": [1, 2]'),
    ):
        text = recipe.to_json()
        assert good in text
        with pytest.raises((ValueError, TypeError)):
            Recipe.from_json(text.replace(good, forged))
    save_picture(picture(8, 8), tmp_path / "x.png", recipe)
    assert read_recipe(tmp_path / "x.png") == recipe


def test_a_forged_name_is_neither_read_without_end_nor_printed(ldm: Ldm, tmp_path: Path) -> None:
    for name in ("/dev/zero", "a\x1b[31m.png"):
        recipe = Recipe(
            ("a",), 1, 2, 3.0, (8, 8), "cpu", "float32", origin=Origin((name, "\x1b[0m"))
        )
        save_picture(picture(8, 8), tmp_path / "x.png", recipe)
        code, out, err = ldm("show", "x.png")
        assert code == 0
        assert "which is not here" in err
        assert "\x1b" not in out + err
