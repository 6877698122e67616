"""Laws of the command: refusals in one line before anything loads, and pictures that come back.

model   a folder with a tiny random pipeline of the real classes
ldm     runs the command in this process; gives (exit code, stdout, stderr)
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ldm_pipeline.cli import COMMANDS, main
from ldm_pipeline.commands import generate
from ldm_pipeline.grid import captioned_grid

Ldm = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Any]) -> Path:
    """A saved tiny pipeline with a model card."""
    from ldm_pipeline import LatentDiffusionPipeline

    folder = tmp_path_factory.mktemp("model")
    LatentDiffusionPipeline(**tiny()).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    return folder


@pytest.fixture
def ldm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ldm:
    """The command, run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


REFUSED = {
    "generate x --sampler dimm": "did you mean 'ddim'",
    "generate x --stpes 3": "did you mean '--steps'",
    "generate x --step 3": "did you mean '--steps'",
    "generat x": "did you mean 'generate'",
    "generate x --steps 0": "--steps=0",
    "generate x --steps -1": "--steps=-1",
    "generate x --steps many": "--steps",
    "generate x --guidance nan": "--guidance=nan",
    "generate x --guidance inf": "--guidance=inf",
    "generate x --height 100": "multiple of 8",
    "generate x --width 12": "multiple of 8",
    "generate x --n 0": "--n=0",
    "generate x --seed -1": "--seed=-1",
    "generate x --device gpu": "--device",
    "generate x --device cpu:0": "--device",
    "generate x --dtype fp16": "--dtype",
    "generate x --model ./nowhere": "nowhere",
    "generate x --model some/hub-id": "HF_HUB_OFFLINE",
    "generate x --model .": "model_index.json",
    "generate x --model words.txt": "is a file",
    "generate x -o nowhere/x.png": "nowhere",
    "generate x -o /proc/x.png": "/proc/x.png",
    "generate x -o words.txt/x.png": "words.txt",
    "generate x -o x.jpg": ".png",
    "generate --prompts empty.txt": "empty.txt",
    "generate --prompts nowhere.txt": "nowhere.txt",
    "generate --prompts bytes.txt": "bytes.txt",
    "generate": "nothing to draw",
    "show nowhere.png": "nowhere.png",
    "show": "picture",
    "info nowhere": "nowhere",
    "info damaged.safetensors": "damaged.safetensors",
    "dataset world": "--out",
    "dataset wrold --out new": "did you mean 'world'",
    "dataset world --out new --n 0": "--n=0",
    "dataset world --out new --split tset": "did you mean 'test'",
    "dataset world --out .": "not empty",
    "evaluate --prompts 0": "--prompts=0",
    "evaluate --steps 0": "--steps=0",
    "evaluate --model ./nowhere": "nowhere",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_a_mistake_is_one_line_and_exit_code_2_before_anything_loads(
    arguments: str, ldm: Ldm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("reached the loading of a model")

    monkeypatch.setattr(generate, "open_pipeline", loaded)
    monkeypatch.setattr(generate, "pick_device", loaded)
    (tmp_path / "words.txt").write_text("a red star\n")
    (tmp_path / "empty.txt").write_text("\n# only a comment\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "damaged.safetensors").write_bytes(b"\xff" * 20)
    before = sorted(tmp_path.iterdir())
    code, out, err = ldm(*arguments.split())
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert REFUSED[arguments] in err
    assert sorted(tmp_path.iterdir()) == before, "a refused command left a file behind"


def test_help_and_refusals_import_nothing_heavy() -> None:
    script = (
        "import sys; from ldm_pipeline.cli import main\n"
        "for a in sys.argv[1:]: main(a.split())\n"
        "print([m for m in ('torch', 'numpy', 'diffusers', 'PIL') if m in sys.modules])"
    )
    helps = ["--help", *(f"{name} --help" for name in COMMANDS)]
    done = subprocess.run(
        [sys.executable, "-c", script, *helps, *REFUSED],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_an_interrupt_is_130_without_a_traceback(ldm: Ldm, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "check_drawing", interrupted)
    code, _, err = ldm("generate", "x")
    assert code == 130
    assert "Traceback" not in err


def redraw(ldm: Ldm, picture: Path, elsewhere: Path) -> bytes:
    """Run the command that `ldm show` prints, writing to another file; that file's bytes."""
    code, out, err = ldm("show", str(picture))
    assert (code, err) == (0, ""), "the same packages drew it, so nothing is to be said"
    words = shlex.split(out)
    assert words[0] == "ldm"
    words[words.index(str(picture))] = str(elsewhere)
    assert ldm(*words[1:], "--quiet")[0] == 0
    return elsewhere.read_bytes()


@pytest.mark.parametrize("sampler", [None, "ddim", "euler_a", "unipc"])
def test_the_shown_command_draws_the_same_bytes(
    sampler: str | None, ldm: Ldm, model: Path, tmp_path: Path
) -> None:
    words = ["generate", "it's a red $star", "--model", str(model), "--steps", "2", "-o", "a.png"]
    words += ["--negative=-blue", "--guidance", "3.3", "--height", "24"]
    words += ["--sampler", sampler] if sampler else []
    code, out, err = ldm(*words)
    assert (code, out) == (0, "a.png\n")
    assert "seed" in err
    assert redraw(ldm, Path("a.png"), Path("b.png")) == Path("a.png").read_bytes()


def test_every_picture_of_a_batch_has_its_own_command(ldm: Ldm, model: Path) -> None:
    words = ["generate", "a red star", "--model", str(model), "--steps", "2", "--n", "3"]
    code, out, _ = ldm(*words, "--seed", "5", "--sampler", "ddpm", "-o", "a.png")
    names = out.split()
    assert code == 0
    assert names == ["a-1.png", "a-2.png", "a-3.png"]
    pictures = [Path(name).read_bytes() for name in names]
    assert len(set(pictures)) == 3
    for name, picture in zip(names, pictures, strict=True):
        assert redraw(ldm, Path(name), Path("again.png")) == picture


def test_a_grid_comes_back_from_its_command_too(ldm: Ldm, model: Path) -> None:
    Path("prompts.txt").write_text("a red star\n\n# not this\na blue house\n")
    words = ["generate", "--prompts", "prompts.txt", "--grid", "--n", "2", "-o", "grid.png"]
    assert ldm(*words, "--model", str(model), "--steps", "1")[:2] == (0, "grid.png\n")
    assert redraw(ldm, Path("grid.png"), Path("again.png")) == Path("grid.png").read_bytes()


def test_quiet_prints_only_names(ldm: Ldm, model: Path) -> None:
    words = ["generate", "a red star", "--model", str(model), "--steps", "1", "--quiet"]
    assert ldm(*words) == (0, "a-red-star.png\n", "")


def test_words_never_learnt_are_named_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    generate.warn_of_unknown_words(["a red star", "a purpel house, Red"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "'purpel'" in lines[0]
    assert "purple" in lines[0]


def test_info_counts_what_torch_counts(ldm: Ldm, model: Path, tiny: Callable[..., Any]) -> None:
    code, out, _ = ldm("info", str(model))
    assert code == 0
    assert "licence: apache-2.0" in out
    rows = {line.split()[0]: line.split() for line in out.splitlines()}
    parts = tiny()
    for name in ("unet", "vae", "text_encoder"):
        assert rows[name][1] == type(parts[name]).__name__
        assert rows[name][2] == f"{sum(p.numel() for p in parts[name].parameters()):,}"
    assert "safety_checker" not in rows


def test_dataset_writes_an_image_folder(ldm: Ldm, tmp_path: Path) -> None:
    assert ldm("dataset", "world", "--out", "new", "--n", "3", "--seed", "1")[:2] == (0, "new\n")
    rows = [json.loads(line) for line in (tmp_path / "new/metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    for row in rows:
        assert row["text"]
        with Image.open(tmp_path / "new" / row["file_name"]) as picture:
            assert picture.size == (128, 128)


def test_a_grid_shows_every_picture_and_never_overlaps() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9), (200, 0, 200)]
    pictures = [Image.new("RGB", (128, 64), colour) for colour in colours]
    grid = captioned_grid(pictures, ["a", "w " * 300, "x" * 300, "", "日本語"])
    counts = {colour: count for count, colour in grid.getcolors(1 << 24) or []}
    # The enlargement is a whole factor, here 2, so each picture fills four times its pixels.
    assert [counts.get(colour) for colour in colours] == [4 * 128 * 64] * 5
