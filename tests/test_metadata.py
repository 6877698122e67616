"""Laws of the recipe inside a picture: it survives the file, the shell, and forged contents."""

from __future__ import annotations

import json
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
from ldm_pipeline.metadata import CHUNK, Recipe, quote, read_recipe, save_png

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
def test_a_recipe_survives_the_file(prompt: str, tmp_path: Path) -> None:
    recipe = replace(PLAIN, prompts=(prompt, "b"), negative=prompt, n=3, grid=True, sampler="ddim")
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", recipe)
    assert read_recipe(tmp_path / "a.png") == recipe


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


def test_control_characters_reach_the_shell_but_not_the_terminal() -> None:
    word = "it's \x1b[31m red \\ \x07"
    assert quote(word).isprintable()
    echoed = subprocess.run(
        ["bash", "-c", f"printf %s {quote(word)}"], capture_output=True, check=True
    )
    assert echoed.stdout.decode() == word


def test_the_same_recipe_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save_png(Image.new("RGB", (8, 8)), tmp_path / name, PLAIN)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_failed_write_leaves_the_old_picture_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def half(self: Image.Image, file: object, **options: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]  # the open file that save_png passes
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(UserError, match="No space left"):
        save_png(Image.new("RGB", (8, 8)), path, PLAIN)
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
    ],
)
def test_a_forged_or_missing_recipe_is_one_clear_error(text: str | None, tmp_path: Path) -> None:
    chunks = PngInfo()
    if text is not None:
        chunks.add_itxt(CHUNK, text)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=chunks)
    with pytest.raises(UserError, match=r"a\.png"):
        read_recipe(tmp_path / "a.png")


@pytest.mark.parametrize("contents", [b"", b"words", b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR"])
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
