"""Laws of the command: refusals in one line before anything loads, and pictures that come back.

model   a folder with a tiny random pipeline of the real classes
ldm     runs the command in this process; gives (exit code, stdout, stderr)
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm_pipeline.cli import COMMANDS, main
from ldm_pipeline.commands import adapters, dataset, evaluate, generate, info, lora
from ldm_pipeline.commands.kinds import REQUIRED
from ldm_pipeline.grid import captioned_grid, columns_for, least_height
from ldm_pipeline.metadata import Recipe
from ldm_pipeline.models import bundled
from tests.conftest import tiny_small_vae

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
    "generate --prompts /dev/zero": "/dev/zero: more than 67,108,864 bytes",
    "generate x --sampler dimm": "did you mean 'ddim'",
    "generate x --stpes 3": "did you mean '--steps'",
    "generate x --step 3": "did you mean '--steps'",
    "generat x": "did you mean 'generate'",
    "generate x --steps 0": "--steps=0",
    "generate x --steps -1": "--steps=-1",
    "generate x --steps many": "--steps='many' must be a whole number",
    "generate x --guidance much": "--guidance='much' must be a number",
    "generate x --steps 1001": "--steps=1001 must lie between 1 and 1000",
    "generate x --lcm --steps 51": "--steps=51 must lie between 1 and 50",
    "generate x --sampler tcd --steps 51": "--steps=51 must lie between 1 and 50",
    "evaluate --steps 1001": "--steps=1001 must lie between 1 and 1000",
    "generate x --guidance nan": "--guidance=nan",
    "generate x --guidance inf": "--guidance=inf",
    "generate x --eta 0.5": "--sampler ddim or --sampler tcd",
    "generate x --eta 0.5 --lcm words.txt": "--eta=0.5 does nothing with --lcm",
    "generate x --eta 0.5 --sampler euler": "--eta=0.5",
    "generate x --eta 2 --sampler tcd": "--eta=2.0",
    "generate x --decoder nowhere": "--decoder='nowhere' is no folder",
    "evaluate --decoder nowhere": "--decoder='nowhere'",
    "generate x --height 100": "multiple of 8",
    "generate x --width 12": "multiple of 8",
    "generate x --height 100000000 --width 8": "--height=100000000 is too large",
    "generate x --height 16384 --width 8192": "--height=16384 is too much with width=8192",
    "generate x --n 0": "--n=0",
    "generate x --n 99999999999": "--n=99999999999 is too large; at most 1000000",
    "generate x --seed -1": "--seed=-1",
    "generate x --device gpu": "--device",
    "generate x --device cpu:0": "--device",
    "generate x --dtype fp16": "--dtype",
    "generate x --model ./nowhere": "nowhere",
    "generate x --model some/hub-id": "HF_HUB_OFFLINE",
    "generate x --model=": "model='' must be a name or a path",
    "generate x --model no/where.safetensors": "there is no file no/where.safetensors",
    "generate x --model .": "model_index.json",
    "generate x --model words.txt": "is a file",
    "generate x --model damaged.safetensors": "no whole safetensors",
    "convert nowhere new": "there is no nowhere",
    "convert words.txt new.safetensors": "must be a folder",
    "convert . new": "must end in .safetensors",
    "convert . words.txt": "is there already",
    "generate x -o nowhere/x.png": "nowhere",
    "generate x -o /proc/x.png": "/proc/x.png",
    "generate x -o words.txt/x.png": "words.txt",
    "generate x -o x.gif": "ends in .png, .webp, .jpg, .jpeg",
    "generate --prompts empty.txt": "empty.txt",
    "generate --prompts nowhere.txt": "nowhere.txt",
    "generate --prompts bytes.txt": "bytes.txt",
    "generate": "nothing to draw",
    "show nowhere.png": "nowhere.png",
    "show .": ". is a folder; name one picture in it",
    "show": "picture",
    "info nowhere": "nowhere",
    "info damaged.safetensors": "damaged.safetensors",
    "dataset world": "--out",
    "dataset wrold --out new": "did you mean 'world'",
    "dataset world --out new --n 0": "--n=0",
    "dataset world --out new --split tset": "did you mean 'test'",
    "dataset world --out .": "not empty",
    "dataset world --out new --batch-size 2": "takes no --batch-size",
    "dataset world elsewhere --out new": "--out",
    "dataset": "kind",
    "dataset check": "check DIR",
    "dataset check nowhere": "nowhere",
    "dataset check words.txt": "words.txt",
    "dataset check . --out new": "takes no --out",
    "dataset check . --btach-size 2": "did you mean '--batch-size'",
    "dataset check . --batch-size 0": "--batch-size=0",
    "dataset check . --resolution 500": "--resolution=500",
    "dataset check . --bucket-step 12": "--bucket-step=12",
    "dataset check . --tokenizer nowhere": "--tokenizer=nowhere",
    "dataset check . --model nowhere": "no model folder nowhere",
    "dataset check . --resolution 100 --fixed": "--resolution=100",
    "evaluate --prompts 0": "--prompts=0",
    "evaluate --prompts 99999999999999": "--prompts=99999999999999 must be from 1 to 100000",
    "evaluate --seed 9223372036854775800": "--seed=9223372036854775800 is too large",
    "evaluate --steps 0": "--steps=0",
    "evaluate --sampler eular": "--sampler='eular'",
    "evaluate --eta 0.5": "--eta=0.5 does nothing here",
    "evaluate --model ./nowhere": "nowhere",
    "evaluate --out=": "--out is empty; name a file or a folder",
    "generate x --output=": "-o/--output is empty",
    "generate x --image /dev/zero": "is no file; name a picture",
    "convert /dev/zero out": "is a file, but no .safetensors",
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


@pytest.mark.parametrize("prompts", [[""], ["   "], ["a star", "\n"]])
def test_a_prompt_without_words_is_nothing_to_draw(prompts: list[str], ldm: Ldm) -> None:
    code, out, err = ldm("generate", *prompts)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "nothing to draw" in err


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


@pytest.mark.parametrize("command", [lora, dataset], ids=["lora", "dataset"])
def test_the_help_lists_each_kind_with_its_own_flags(ldm: Ldm, command: Any) -> None:
    name = command.__name__.rpartition(".")[2]
    for asked in ("--help", f"{next(iter(command.KINDS))} --help"):
        _, out, _ = ldm(name, *asked.split())
        for kind, told in command.KINDS.items():
            (section,) = [part for part in out.split("\n\n") if part.startswith(f"{kind}: ")]
            lines = section.splitlines()[1:]
            assert [line.split()[0] for line in lines] == [f"--{flag}" for flag in told.defaults]
            needed = [line.split()[0][2:] for line in lines if line.endswith("(required)")]
            assert needed == [flag for flag, value in told.defaults.items() if value is REQUIRED]


def test_a_failing_disk_is_one_line(ldm: Ldm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever file it was, and whichever command; words of several lines become one."""
    for error, told in (
        (OSError(5, "Input/output error", "a/b"), "ldm: a/b: Input/output error\n"),
        (OSError("no space\nleft"), "ldm: no space left\n"),
    ):
        monkeypatch.setattr(info, "list_components", lambda *_, error=error: raise_(error))
        assert ldm("info") == (2, "", told)


def raise_(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_dataset_is_written_whole_or_not_at_all(
    error: BaseException, ldm: Ldm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save, saved = Image.Image.save, []

    def fails_late(picture: Image.Image, place: Path, *more: Any) -> None:
        saved.append(place)
        if len(saved) == 3:
            raise error
        save(picture, place, *more)

    monkeypatch.setattr(Image.Image, "save", fails_late)
    code, out, err = ldm("dataset", "concept", "--name", "cactus", "--out", "new", "--n", "5")
    assert out == ""
    assert (code, err.strip()) in (
        (2, "ldm: cannot write new: No space left on device"),
        (130, "ldm: interrupted"),
    )
    assert len(saved) == 3
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("out", [".", "../{}"])
def test_a_folder_is_not_replaced_under_one_s_feet(out: str, ldm: Ldm, tmp_path: Path) -> None:
    code, _, err = ldm("dataset", "world", "--out", out.format(tmp_path.name), "--n", "2")
    assert (code, err.count("\n")) == (2, 1)
    assert "the folder that you are in; name a new one" in err
    assert not any(tmp_path.iterdir())


def test_a_model_of_other_pictures_is_not_judged(
    ldm: Ldm, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "open_pipeline", lambda *_: pytest.fail("loaded"))
    config = model / "unet/config.json"
    told = config.read_text()
    try:
        config.write_text(json.dumps({**json.loads(told), "sample_size": 64}))
        code, out, err = ldm("evaluate", "--model", str(model))
    finally:
        config.write_text(told)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "draws pictures of 512x512, and the judge reads those of the picture world" in err


def test_emulated_bfloat16_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch knows of it; float32, and a processor that has bfloat16, need no word."""
    import torch

    for able, dtype, told in (
        ({"avx512_bf16": False, "amx_bf16": False}, "bfloat16", True),
        ({"avx512_bf16": False, "amx_bf16": False}, "float32", False),
        ({"avx512_bf16": False, "amx_bf16": True}, "bfloat16", False),
        ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, "bfloat16", False),
        ({"architecture": "aarch64"}, "bfloat16", False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able)
        assert generate.pick_device("cpu", dtype) == ("cpu", dtype)
        assert ("emulates bfloat16" in capsys.readouterr().err) is told


def test_an_interrupt_is_130_without_a_traceback(ldm: Ldm, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "check_drawing", interrupted)
    code, _, err = ldm("generate", "x")
    assert code == 130
    assert "Traceback" not in err


@pytest.mark.parametrize("size", [2**50, None], ids=["torch", "python"])
@pytest.mark.parametrize(
    "words, place, advice",
    [
        ("generate x", "draw", "while a picture was drawn: try a smaller --height"),
        ("generate x", "open", "while the model was opened: try --dtype bfloat16"),
        ("evaluate --prompts 2", "draw", "while pictures were drawn: try a smaller --batch-size"),
        ("evaluate --prompts 2", "open", "while the model was opened: try --dtype bfloat16"),
        ("info", "info", "free some"),
    ],
)
def test_too_little_memory_of_the_computer_is_one_line(
    words: str, place: str, advice: str, size: int | None, ldm: Ldm, model: Path, monkeypatch: Any
) -> None:
    """torch says so by a plain RuntimeError on a CPU, Python by a MemoryError."""
    import torch
    from diffusers import DiffusionPipeline

    from ldm_pipeline import LatentDiffusionPipeline

    def too_large(*_: object, **__: object) -> None:
        if size is None:
            raise MemoryError
        torch.empty(size)

    places: dict[str, tuple[Any, str]] = {
        "draw": (LatentDiffusionPipeline, "__call__"),
        "open": (DiffusionPipeline, "from_pretrained"),
        "info": (info, "list_components"),
    }
    monkeypatch.setattr(*places[place], too_large)
    code, out, err = ldm(*words.split(), *([] if place == "info" else ["--model", str(model)]))
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("ldm: out of memory")
    assert advice in err.splitlines()[-1]


def redraw(ldm: Ldm, picture: Path, elsewhere: Path) -> bytes:
    """Run the command that `ldm show` prints, writing to another file; that file's bytes."""
    code, out, err = ldm("show", str(picture))
    assert (code, err) == (0, ""), "the same packages drew it, so nothing is to be said"
    words = shlex.split(out)
    assert words[0] == "ldm"
    words[words.index(str(picture))] = str(elsewhere)
    assert ldm(*words[1:], "-q")[0] == 0
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


@pytest.mark.parametrize("eta", ["0.0", "0.8"])
def test_a_small_decoder_and_gamma_come_back(ldm: Ldm, model: Path, eta: str) -> None:
    """They change the picture, and the shown command has them."""
    tiny_small_vae().save_pretrained("small-one")
    words = ["generate", "a star", "--model", str(model), "--steps", "3", "--seed", "1"]
    words += ["--sampler", "tcd", "-o", "a.png"]
    drawn = []
    for more in ([], ["--eta", eta], ["--eta", eta, "--decoder", "small-one"]):
        assert ldm(*words, *more)[0] == 0
        drawn.append(Path("a.png").read_bytes())
    pixels = []
    for png in drawn:
        with Image.open(io.BytesIO(png)) as opened:
            pixels.append(opened.tobytes())
    assert len(set(pixels)) == 3
    assert redraw(ldm, Path("a.png"), Path("b.png")) == drawn[-1]
    with Image.open("a.png") as opened:
        assert "VAE: small-one, Eta: " in opened.info["parameters"]


def test_few_steps_without_an_adapter_are_refused_before_anything_loads(
    ldm: Ldm, model: Path, tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By what the model's UNet says of itself; a small decoder that is not there is, too."""

    def loaded(*_: object) -> None:
        raise ZeroDivisionError("reached the loading of a model")

    for module in (generate, evaluate):
        monkeypatch.setattr(module, "open_pipeline", loaded)
    monkeypatch.setattr(bundled, "ASSETS", tmp_path / "none")
    for words in (["generate", "x"], ["evaluate"]):
        code, out, err = ldm(*words, "--model", str(model), "--lcm")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "no few-step adapter for this model" in err
    config = model / "unet/config.json"
    told = config.read_text()
    try:
        config.write_text(json.dumps({**json.loads(told), "cross_attention_dim": 768}))
        code, out, err = ldm("generate", "x", "--model", str(model), "--lcm")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "latent-consistency/lcm-lora-sdv1-5" in err
        config.write_text(json.dumps({**json.loads(told), "time_cond_proj_dim": 32}))
        with pytest.raises(ZeroDivisionError):
            ldm("generate", "x", "--model", str(model), "--lcm")
    finally:
        config.write_text(told)
    (tmp_path / "none").mkdir()
    (tmp_path / "none/model_index.json").write_text("{}")
    for words in (["generate", "x"], ["evaluate"]):
        code, out, err = ldm(*words, "--decoder", "small")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "--decoder='small': this installation has no small decoder" in err


@pytest.mark.parametrize("ending", ["png", "webp", "jpg"])
@pytest.mark.parametrize("flags", [(), ("--plain",)])
def test_weighted_and_plain_prompts_come_back_from_every_format(
    flags: tuple[str, ...], ending: str, ldm: Ldm, model: Path
) -> None:
    words = [
        "generate",
        "a (red:1.7) star BREAK\n[blue] \\(house\\)",
        "--negative",
        "(x:2)",
        *flags,
    ]
    words += ["--model", str(model), "--steps", "1", "--seed", "3", "-o", f"a.{ending}"]
    assert ldm(*words)[:2] == (0, f"a.{ending}\n")
    drawn = Path(f"a.{ending}")
    assert redraw(ldm, drawn, Path(f"again.{ending}")) == drawn.read_bytes()


def test_a_prompt_is_read_with_weights_unless_it_is_plain(ldm: Ldm, model: Path) -> None:
    def drawn(prompt: str, *flags: str) -> bytes:
        words = ["generate", prompt, *flags, "--model", str(model), "--steps", "1", "--seed", "3"]
        assert ldm(*words, "-o", "a.png")[0] == 0
        with Image.open("a.png") as picture:
            return picture.tobytes()

    assert drawn("a (red:1.0) star") == drawn("a red star") == drawn("a red star", "--plain")
    assert drawn("a (red:3) star") != drawn("a red star")
    assert drawn(r"a \(red\) star") == drawn("a (red) star", "--plain") != drawn("a red star")


def test_what_is_not_understood_is_said_once(
    ldm: Ldm, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["generate", "a (red star", "--n", "3", "--model", str(model), "--steps", "1"]
    assert ldm(*words)[0] == 0
    (message,) = [m for m in caplog.messages if "prompt" in m]
    assert "'(' is never closed" in message


def test_prompts_too_long_for_a_jpeg_are_refused_before_a_model_loads(
    ldm: Ldm, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "open_pipeline", lambda *_: pytest.fail("loaded"))
    # A letter outside of ASCII takes more bytes than one of it: the second is the longer recipe.
    for prompts in (["x" * 70_000], ["x" * 20_000, "花" * 9_000]):
        code, out, err = ldm("generate", *prompts, "--model", str(model), "-o", "a.jpg")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "too long" in err


def test_a_grid_too_high_for_its_format_is_refused_before_a_model_loads(
    ldm: Ldm, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "open_pipeline", lambda *_: pytest.fail("loaded"))
    words = ["generate", "x", "--grid", "--n", "6000", "--model", str(model), "-o", "a.webp"]
    code, out, err = ldm(*words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "a WEBP holds 16383; give it a name that ends in .png" in err


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
    assert ldm(*words, "--seed", "7") == (0, "a-red-star-7.png\n", "")


def test_the_same_words_with_another_seed_do_not_replace_a_picture(ldm: Ldm, model: Path) -> None:
    words = ["generate", "A red *star*!", "--model", str(model), "--steps", "1"]
    named = {ldm(*words)[1].strip() for _ in range(2)}
    assert len(named) == 2
    assert all(re.fullmatch(r"a-red-star-\d+\.png", name) for name in named)
    assert all(Path(name).is_file() for name in named)


def test_what_is_no_number_becomes_no_picture(ldm: Ldm, model: Path) -> None:
    shutil.copytree(model, "wild")
    file = Path("wild/unet/diffusion_pytorch_model.safetensors")
    weights = load_file(file)
    weights["conv_out.bias"].fill_(3e38)
    save_file(weights, file)
    code, out, err = ldm("generate", "x", "--model", "wild", "--steps", "1", "-o", "x.png")
    assert (code, out) == (2, "")
    assert "'x' with seed" in err.splitlines()[-1]
    assert "lower --guidance" in err.splitlines()[-1]
    assert not Path("x.png").exists()


def test_words_never_learnt_are_named_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["a (red:1.3) BREAK star <lora:x:1>", "a purpel house, Red"]
    generate.warn_of_unknown_words(prompts, weighted=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "'purpel'" in lines[0]
    assert "purple" in lines[0]
    generate.warn_of_unknown_words(prompts, weighted=True, taught={"purpel"})
    assert not capsys.readouterr().err


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


def test_a_model_of_the_hub_is_the_snapshot_that_its_cache_opens(
    ldm: Ldm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the cache lies, the one that `main` stands for, not the newest; and no name that
    the hub would refuse is looked for."""
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    for revision in ("first", "second"):
        snapshot = cache / "models--somebody--model" / "snapshots" / revision
        snapshot.mkdir(parents=True)
        (snapshot / "model_index.json").write_text(json.dumps({"_class_name": revision}))
        (snapshot / "README.md").write_text(f"---\nlicense: {revision}\n---\n")
    assert ldm("info", "somebody/model")[0] == 2
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("first")
    code, out, _ = ldm("info", "somebody/model")
    assert code == 0
    assert "licence: first" in out
    code, _, err = ldm("info", "somebody/a--model")
    assert code == 2
    assert "Cannot have -- or .. in repo_id" in err


def test_dataset_writes_an_image_folder(ldm: Ldm, tmp_path: Path) -> None:
    assert ldm("dataset", "world", "--out", "new", "--n", "3", "--seed", "1")[:2] == (0, "new\n")
    rows = [json.loads(line) for line in (tmp_path / "new/metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    for row in rows:
        assert row["text"]
        with Image.open(tmp_path / "new" / row["file_name"]) as picture:
            assert picture.size == (128, 128)


def test_dataset_check_reports_and_its_exit_code_tells_errors(ldm: Ldm, tmp_path: Path) -> None:
    ldm("dataset", "world", "--out", "new", "--n", "5")
    check = ("dataset", "check", "new", "--resolution", "128", "--batch-size", "2")
    code, out, err = ldm(*check)
    assert (code, err) == (0, "")
    assert ["128x128", "5", "1"] in [line.split() for line in out.splitlines()]
    assert ldm("dataset", "--resolution", "128", "--batch-size", "2", "check", "new")[1] == out
    assert ldm(*check, "--strict")[0] == 0
    (tmp_path / "new/stray.txt").write_text("of no picture")
    assert ldm(*check)[0] == 0
    assert ldm(*check, "--strict")[0] == 1
    assert ldm("dataset", "check", "new")[0] == 1, "128 pixels fill no bucket of the default 512"
    assert ldm("dataset", "check", "new", "--upscale")[0] == 0
    (tmp_path / "new/000003.png").write_bytes(b"")
    code, out, _ = ldm(*check)
    assert code == 1
    assert "error: new/000003.png: is empty" in out


def test_dataset_check_tells_what_training_takes(ldm: Ldm, model: Path) -> None:
    """More for larger batches; of Stable Diffusion 1.x unless a model is named."""
    ldm("dataset", "world", "--out", "new", "--n", "3")
    check = ("dataset", "check", "new", "--resolution", "128", "--fixed")

    def lines(*flags: str) -> dict[str, str]:
        code, out, _ = ldm(*check, *flags)
        assert code == 0
        return dict(line.split(maxsplit=1) for line in out.splitlines() if line[:1].islower())

    usual, more, own = lines(), lines("--batch-size", "8"), lines("--model", str(model))
    memory = r"about ([\d.]+ [kMG]B) in a step of a LoRA in (float32|bf16), [\d.]+ [kMG]B with"
    found = [re.match(memory, said["memory"]) for said in (usual, more, own)]
    assert all(found)
    assert len({match[1] for match in found if match}) == 3
    assert usual["cache"].endswith("Stable Diffusion 1.x")
    assert own["cache"].endswith(str(model))


def test_dataset_check_counts_tokens_with_a_tokenizer(ldm: Ldm, model: Path) -> None:
    ldm("dataset", "world", "--out", "new", "--n", "2")
    Path("new/metadata.jsonl").write_text(
        '{"file_name": "000000.png", "text": "red"}\n'
        f'{{"file_name": "000001.png", "text": "{"zebra " * 30}"}}\n'
    )
    check = ("dataset", "check", "new", "--resolution", "128", "--strict")
    assert ldm(*check)[0] == 0
    for flags in (("--tokenizer", str(model / "tokenizer")), ("--model", str(model))):
        code, out, _ = ldm(*check, *flags)
        assert code == 1
        assert "more than 77 tokens" in out
    code, _, err = ldm(*check, "--tokenizer", ".")
    assert (code, err.count("\n")) == (2, 1)
    assert "--tokenizer=." in err


def test_a_grid_shows_every_picture_and_never_overlaps() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9), (200, 0, 200)]
    pictures = [Image.new("RGB", (128, 64), colour) for colour in colours]
    grid = captioned_grid(pictures, ["a", "w " * 300, "x" * 300, "", "日本語"])
    counts = {colour: count for count, colour in grid.getcolors(1 << 24) or []}
    # The enlargement is a whole factor, here 2, so each picture fills four times its pixels.
    assert [counts.get(colour) for colour in colours] == [4 * 128 * 64] * 5


@pytest.mark.parametrize(("prompts", "n", "columns"), [(5, 1, 3), (1, 5, 3), (4, 5, 5), (1, 1, 1)])
def test_the_height_that_a_grid_has_at_least_is_below_its_own(
    prompts: int, n: int, columns: int
) -> None:
    assert columns_for(prompts, n) == columns
    pictures = [Image.new("RGB", (256, 224))] * (prompts * n)
    grid = captioned_grid(pictures, [""] * len(pictures), columns)
    assert 0.8 * grid.height < least_height(prompts, n) < grid.height


# --lora -------------------------------------------------------------------------------------------


def write_safetensors(path: Path, *keys: str) -> None:
    """A safetensors file with a 2 x 2 float32 matrix of zeros under each of `keys`."""
    entries = {
        key: {"dtype": "F32", "shape": [2, 2], "data_offsets": [16 * k, 16 * (k + 1)]}
        for k, key in enumerate(keys)
    }
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16 * len(keys)))


LORA_REFUSED = {
    "generate x --lora nowhere.safetensors": "there is no LoRA file nowhere.safetensors",
    "generate x --lora nowhere.safetensors:0.8": "there is no LoRA file nowhere.safetensors",
    "generate x --lora C:\\nowhere.safetensors": "there is no LoRA file C:\\nowhere.safetensors",
    "generate x --lora C:\\nowhere.safetensors:2": "there is no LoRA file C:\\nowhere.safetensors",
    "generate x --lora .": "there is no LoRA file pytorch_lora_weights.safetensors",
    "generate x --lora 0.8": "there is no LoRA file 0.8",
    "generate x --lora words.txt": "words.txt is no whole safetensors file",
    "generate x --lora cut.safetensors": "cut.safetensors is no whole safetensors file",
    "generate x --lora model.safetensors:1": "no LoRA in a layout that is known",
    "generate x --lora kohya.safetensors": "unet.mid_block has lora_up.weight, which is no whole",
    "generate x --lora style.safetensors:nan": "weight of style.safetensors is nan",
    "generate x --lora style.safetensors:-inf": "weight of style.safetensors is -inf",
    "generate x --lora style.safetensors:much": "'much' is no weight; write style.safetensors:0.8",
    "generate x --lora style.safetensors:": "'' is no weight",
    "generate x --lora style.safetensors --lora words.txt": "words.txt",
    "generate x --lora": "--lora",
    "generate x --lcm nowhere": "--lcm=nowhere: there is no such file; a prompt stands before",
    "generate x --lcm words.txt": "words.txt is no whole safetensors file",
    "generate x --lcm style.safetensors --sampler ddim": "--sampler='ddim' does not go with lcm",
    "evaluate --lcm nowhere": "--lcm=nowhere: there is no such file",
}


@pytest.fixture
def lora_files(tmp_path: Path) -> None:
    """Files of every sort, beside which the command is run."""
    (tmp_path / "words.txt").write_text("a red star\n")
    write_safetensors(tmp_path / "model.safetensors", "unet.conv_in.weight")
    write_safetensors(tmp_path / "kohya.safetensors", "lora_unet_mid_block.lora_up.weight")
    write_safetensors(tmp_path / "style.safetensors", "unet.x.lora_A.weight")
    whole = (tmp_path / "style.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-1])


@pytest.mark.usefixtures("lora_files")
@pytest.mark.parametrize("arguments", LORA_REFUSED)
def test_a_lora_that_cannot_be_meant_is_refused_before_anything_loads(
    arguments: str, ldm: Ldm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("reached the loading of a model")

    monkeypatch.setattr(generate, "open_pipeline", loaded)
    monkeypatch.setattr(generate, "pick_device", loaded)
    code, out, err = ldm(*arguments.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert LORA_REFUSED[arguments] in err


@pytest.mark.usefixtures("lora_files")
def test_refusing_a_lora_imports_nothing_heavy(tmp_path: Path) -> None:
    script = (
        "import sys; from ldm_pipeline.cli import main\n"
        "assert all(main(a.split()) == 2 for a in sys.argv[1:])\n"
        "print([m for m in ('torch', 'safetensors', 'peft', 'diffusers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *LORA_REFUSED],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("text", "file", "weight"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a.safetensors:-1e-1", "a.safetensors", -0.1),
        ("a.safetensors:0", "a.safetensors", 0.0),
        ("C:\\b\\a.safetensors", "C:\\b\\a.safetensors", 1.0),
        ("C:\\b\\a.safetensors:0.5", "C:\\b\\a.safetensors", 0.5),
        ("a:0.5:2", "a:0.5", 2.0),
    ],
)
def test_only_a_number_after_the_last_colon_is_a_weight(
    text: str, file: str, weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "inspect", lambda file: None)
    assert adapters.read_loras([text]) == ((file, weight),)
    recipe = Recipe(("x",), 7, 25, 7.5, (8, 8), "cpu", "float32", loras=((file, weight),))
    assert Recipe.from_json(recipe.to_json()) == recipe
    (again,) = [w for w in shlex.split(recipe.command("a.png")) if w.startswith("--lora=")]
    assert adapters.read_loras([again.removeprefix("--lora=")]) == ((file, weight),)


def test_pictures_from_before_there_were_loras_are_read_and_written_as_before() -> None:
    recipe = Recipe(("x",), 7, 25, 7.5, (8, 8), "cpu", "float32")
    assert "lora" not in recipe.to_json()
    assert Recipe.from_json(recipe.to_json()).loras == ()
    forged = json.loads(recipe.to_json())
    for loras in ([["a", "b; rm -rf ~"]], [[1, 1.0]], ["ab"], 3):
        with pytest.raises((ValueError, TypeError)):
            Recipe.from_json(json.dumps({**forged, "loras": loras}))


def test_loras_draw_and_their_picture_comes_back(
    ldm: Ldm, model: Path, tiny: Callable[..., Any], tmp_path: Path
) -> None:
    import torch

    from ldm_pipeline.lora.files import save
    from ldm_pipeline.lora.inject import inject
    from ldm_pipeline.lora.targets import LoraSettings

    adapter = inject({"unet": tiny()["unet"]}, LoraSettings(["mid_block"]), seed=0)
    with torch.no_grad():
        for parameter in adapter.parameters.values():
            parameter.add_(0.3)
    file = save(tmp_path / "a style.safetensors", adapter.weights())
    wide = {name: torch.cat([t, t], -1) for name, t in adapter.parameters.items()}
    save(tmp_path / "wide.safetensors", adapter.weights(wide))
    folder = save(tmp_path / "run", adapter.weights()).parent
    words = ["generate", "a red star", "--model", str(model), "--steps", "1", "--seed", "3"]

    def drawn(name: str, *loras: str) -> bytes:
        flags = [flag for lora in loras for flag in ("--lora", lora)]
        code, out, err = ldm(*words, *flags, "-o", name)
        assert (code, out) == (0, f"{name}\n"), err
        with Image.open(name) as picture:
            return picture.tobytes()

    plain = drawn("plain.png")
    both = drawn("both.png", f"{file}:0.8", str(folder))
    assert drawn("none.png", f"{file}:0") == plain
    assert len({plain, both, drawn("one.png", str(file))}) == 3
    assert redraw(ldm, Path("both.png"), Path("again.png")) == Path("both.png").read_bytes()
    code, out, err = ldm(*words, "--lora", "wide.safetensors", "-o", "wide.png")
    assert (code, out) == (2, "")
    assert "wide.safetensors does not fit this model: 0 keys matched, 0 missing" in err
    assert not Path("wide.png").exists()


def test_few_steps_and_their_picture_comes_back(
    ldm: Ldm, model: Path, tiny: Callable[..., Any], tmp_path: Path
) -> None:
    """With the steps and guidance that --lcm stands for, beside a style; without it as before."""
    import torch

    from ldm_pipeline.lora.files import save
    from ldm_pipeline.lora.inject import inject
    from ldm_pipeline.lora.targets import LoraSettings

    adapter = inject({"unet": tiny()["unet"]}, LoraSettings(["mid_block"]), seed=0)
    with torch.no_grad():
        for parameter in adapter.parameters.values():
            parameter.add_(0.3)
    file = save(tmp_path / "few steps", adapter.weights())
    words = ["generate", "a red star", "--model", str(model), "--seed", "3"]

    def drawn(name: str, *flags: str) -> bytes:
        code, out, err = ldm(*words, *flags, "-o", name)
        assert (code, out) == (0, f"{name}\n"), err
        with Image.open(name) as picture:
            return picture.tobytes()

    few = drawn("few.png", "--lcm", str(file.parent))
    assert drawn("told.png", "--lcm", str(file), "--steps=4", "--guidance=1") == few
    assert drawn("other.png", "--sampler=lcm", "--steps=4", "--guidance=1") != few
    assert drawn("both.png", "--lcm", str(file), "--lora", f"{file}:0.5") != few
    for name in ("few.png", "both.png"):
        assert redraw(ldm, Path(name), Path("again.png")) == Path(name).read_bytes()
    code, out, err = ldm(*words, "--lcm")
    assert (code, out) == (2, "")
    assert "there is no few-step adapter for this model here" in err
