"""Laws of the recipe inside a picture: it survives the file, the shell, and forged contents.

The files are those of every format: .png, .webp and .jpg.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm_pipeline.cli import Parser
from ldm_pipeline.commands.generate import add_arguments
from ldm_pipeline.errors import UserError
from ldm_pipeline.metadata import SAMPLERS, Recipe, quote
from ldm_pipeline.picture_files import (
    CHUNK,
    FORMATS,
    LONGEST_EXIF,
    check_fits,
    is_whole,
    read_recipe,
    save_picture,
)
from ldm_pipeline.request import SAMPLER_NAMES

PLAIN = Recipe(("a red star",), 7, 25, 7.5, (128, 128), "cpu", "float32")
AWKWARD = (
    'it\'s "quoted" $HOME `id` \\ ; rm -rf *',
    "日本語の星 é ☂",
    "--steps 0",
    "",
    " two  spaces ",
    "two\nlines",
)


@pytest.mark.parametrize("prompt", AWKWARD)
@pytest.mark.parametrize("ending", [*FORMATS, ".JPG"])
def test_a_recipe_survives_the_file(ending: str, prompt: str, tmp_path: Path) -> None:
    recipe = replace(PLAIN, prompts=(prompt, "b"), negative=prompt, n=3, grid=True, sampler="ddim")
    path = tmp_path / f"a{ending}"
    save_picture(Image.new("RGB", (8, 8)), path, replace(recipe, weighted=True))
    assert read_recipe(path) == replace(recipe, weighted=True)
    with Image.open(path) as picture:
        assert picture.format == FORMATS[ending.lower()]
        assert settings_of(picture) == replace(recipe, weighted=True).settings()


def settings_of(picture: Image.Image) -> str:
    """What another tool reads: the chunk `parameters`, or the comment in EXIF's own encoding."""
    if picture.format == "PNG":
        return str(picture.info["parameters"])
    comment = picture.getexif().get_ifd(0x8769)[0x9286]
    assert comment.startswith(b"UNICODE\0")
    return str(comment[8:].decode("utf-16-be"))


def read_settings(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and values, as readers of this form find them."""
    *lines, last = text.split("\n")
    at = next(
        (i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines)
    )
    negative = "\n".join(lines[at:]).removeprefix("Negative prompt:").strip()
    found = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    values = {k: json.loads(v) if v.startswith('"') else v for k, v in found}
    return "\n".join(lines[:at]), negative, values


def test_other_tools_find_every_setting() -> None:
    recipe = Recipe(
        ("a (red:1.3) star,\nStars: many",), 7, 25, 0.1 + 0.2, (128, 64), "cpu", "float32",
        model="/models/SD, 1.5.safetensors", sampler="euler_a", negative="fog, night",
        loras=(("styles/ink.safetensors", 0.8), ("b", 1 / 3)), weighted=True,
    )  # fmt: skip
    prompt, negative, values = read_settings(recipe.settings())
    assert (prompt, negative) == (recipe.prompts[0], recipe.negative)
    assert values == {
        "Steps": "25", "Sampler": "Euler a", "CFG scale": "0.30000000000000004", "Seed": "7",
        "Size": "64x128", "Model": "SD, 1.5", "LoRA": "ink:0.8, b:0.3333333333333333",
    }  # fmt: skip
    assert "CFG scale: 7.5," in PLAIN.settings()
    assert set(SAMPLERS) == set(SAMPLER_NAMES)


def test_pixels_come_back(tmp_path: Path) -> None:
    """Exactly from PNG and WebP, nearly from JPEG."""
    picture = Image.effect_noise((32, 24), 60).convert("RGB")
    for ending in (".png", ".webp", ".jpg"):
        path = tmp_path / f"a{ending}"
        save_picture(picture, path, PLAIN)
        with Image.open(path) as found:
            off = [abs(a - b) for a, b in zip(found.tobytes(), picture.tobytes(), strict=True)]
        # Quality 95 quantises a coefficient by a few levels; pure noise is the worst case.
        assert max(off) <= (24 if ending == ".jpg" else 0)


def test_a_recipe_too_long_for_a_jpeg_is_refused(tmp_path: Path) -> None:
    def of(length: int) -> Recipe:
        return replace(PLAIN, prompts=("x" * length,))

    # Each letter stands once in the JSON, and as two bytes in the comment.
    most = (LONGEST_EXIF - 1000) // 3
    check_fits(tmp_path / "a.jpg", of(most))
    save_picture(Image.new("RGB", (8, 8)), tmp_path / "a.jpg", of(most))
    assert read_recipe(tmp_path / "a.jpg") == of(most)
    for path in (tmp_path / "b.png", tmp_path / "b.webp"):
        check_fits(path, of(most * 4))
        save_picture(Image.new("RGB", (8, 8)), path, of(most * 4))
        assert read_recipe(path) == of(most * 4)
    with pytest.raises(UserError, match=r"b\.jpg: the prompts are too long"):
        check_fits(tmp_path / "b.jpg", of(most * 4))
    with pytest.raises(UserError, match=r"b\.jpg"):
        save_picture(Image.new("RGB", (8, 8)), tmp_path / "b.jpg", of(most * 4))
    assert not (tmp_path / "b.jpg").exists()


@pytest.mark.parametrize("ending", [".png", ".webp", ".jpg"])
def test_a_cut_file_is_not_whole(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{ending}"
    assert not is_whole(path)
    save_picture(Image.effect_noise((64, 64), 60).convert("RGB"), path, PLAIN)
    assert is_whole(path)
    contents = path.read_bytes()
    for share in (0.0, 0.5, 0.9):
        path.write_bytes(contents[: int(len(contents) * share)])
        assert not is_whole(path)


@pytest.mark.parametrize("prompt", AWKWARD)
def test_the_command_means_the_recipe(prompt: str) -> None:
    recipe = replace(PLAIN, prompts=(prompt, "b"), negative=prompt, n=3, guidance=0.1 + 0.2)
    words = shlex.split(recipe.command("a b.png"))
    assert words[:2] == ["ldm", "generate"]
    parser = Parser("ldm generate", "")
    add_arguments(parser)
    args = parser.parse(words[2:])
    assert tuple(args.prompt) == recipe.prompts
    assert (args.negative, args.seed, args.n) == (prompt, recipe.seed, recipe.n)
    assert (args.steps, args.guidance) == (recipe.steps, recipe.guidance)
    assert (args.height, args.width) == recipe.size
    assert args.output == Path("a b.png")
    assert args.plain is True
    assert "--plain" not in replace(recipe, weighted=True).command("a.png")


def test_control_characters_reach_the_shell_but_not_the_terminal() -> None:
    word = "it's \x1b[31m red \\ \x07"
    assert quote(word).isprintable()
    echoed = subprocess.run(
        ["bash", "-c", f"printf %s {quote(word)}"], capture_output=True, check=True
    )
    assert echoed.stdout.decode() == word


@pytest.mark.parametrize("ending", FORMATS)
def test_the_same_recipe_gives_the_same_bytes(ending: str, tmp_path: Path) -> None:
    files = [tmp_path / f"{name}{ending}" for name in "ab"]
    for file in files:
        save_picture(Image.new("RGB", (8, 8)), file, PLAIN)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_failed_write_leaves_the_old_picture_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def half(self: Image.Image, file: object, **options: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]  # the open file that save_picture passes
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(UserError, match="No space left"):
        save_picture(Image.new("RGB", (8, 8)), path, PLAIN)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "[]",
        "{}",
        '{"format": 2}',
        '{"format": 1}',
        PLAIN.to_json().replace('"seed": 7', '"seed": "7; rm -rf ~"'),
        PLAIN.to_json().replace('"cpu"', "[1]"),
        PLAIN.to_json().replace("128, 128", "128"),
        PLAIN.to_json().replace('"seed"', '"sead"'),
        "[" * 20_000,
    ],
    ids=range(11),
)
def test_a_forged_or_missing_recipe_is_one_clear_error(text: str | None, tmp_path: Path) -> None:
    chunks, exif = PngInfo(), Image.Exif()
    if text is not None:
        chunks.add_itxt(CHUNK, text)
        exif[0x8769] = {0x927C: b"ldm\0" + text.encode()}
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=chunks)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=exif.tobytes())
    for name in ("a.png", "a.jpg"):
        with pytest.raises(UserError, match=name):
            read_recipe(tmp_path / name)


@pytest.mark.parametrize(
    "contents", [b"", b"words", b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR", b"\xff\xd8\xff\xe1\0\x10Exif"]
)
def test_a_file_that_is_no_picture_is_one_clear_error(contents: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(contents)
    with pytest.raises(UserError, match=r"a\.png"):
        read_recipe(tmp_path / "a.png")


@pytest.mark.parametrize("lcm", ["", "few steps.safetensors", "--steps 0"])
def test_few_steps_survive_the_file_and_the_shell(lcm: str) -> None:
    recipe = replace(PLAIN, lcm=lcm)
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert "lcm" not in PLAIN.to_json()
    parser = Parser("ldm generate", "")
    add_arguments(parser)
    args = parser.parse(shlex.split(recipe.command("a.png"))[2:])
    assert args.lcm == (lcm or True)
    assert tuple(args.prompt) == recipe.prompts
    assert "Sampler: LCM" in recipe.settings()
    with pytest.raises(ValueError, match="text"):
        Recipe.from_json(recipe.to_json().replace(f'"lcm": {json.dumps(lcm)}', '"lcm": 3'))
