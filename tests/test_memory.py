"""Less memory, asked for on the command line: refusals, and pictures that come back.

model   a folder with a tiny random pipeline of the real classes (see test_cli.py)
"""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ldm_pipeline.batch import __main__ as batch
from ldm_pipeline.batch.orders import read_orders
from ldm_pipeline.cli import Parser
from ldm_pipeline.commands import generate
from ldm_pipeline.commands import memory as flags
from ldm_pipeline.errors import UserError
from ldm_pipeline.memory import ATTENTION, OFFLOAD, PLAIN, QUANTISE, Memory
from ldm_pipeline.metadata import Recipe
from ldm_pipeline.models import quantising
from ldm_pipeline.picture_files import read_recipe
from tests.test_cli import Ldm, ldm, model, redraw

__all__ = ["ldm", "model"]

RECIPE = Recipe(("a red star",), 7, 25, 7.5, (128, 128), "cpu", "float32")

REFUSED = {
    "--attention slicd": "--attention='slicd' is not known; choose one of auto, sdpa",
    "--offload layer": "--offload='layer' is not known; choose one of none, parts, layers; did you",
    "--quantise int9": "--quantise='int9' is not known",
    "--offload layers --compile": "--offload='layers' does not go with compile",
    "--offload parts --lcm": "--lcm does not go with --offload",
    "--quantise int8": "--quantise='int8' needs torchao",
    "--tilng": "did you mean '--tiling'",
}


@pytest.mark.parametrize("told", REFUSED)
def test_a_mistake_is_one_line_before_anything_loads(
    told: str, ldm: Ldm, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantising, "find_spec", lambda name: None)
    monkeypatch.setattr(generate, "check_lcm", lambda *_: None)
    monkeypatch.setattr(generate, "pick_device", lambda *_: pytest.fail("went on"))
    code, out, err = ldm("generate", "x", "--model", str(model), *told.split())
    assert (code, out) == (2, "")
    assert err.startswith("ldm: ")
    assert err.count("\n") == 1
    assert REFUSED[told] in err


@pytest.mark.parametrize(
    "told, words",
    [
        (["--offload", "parts"], "--offload='parts' keeps networks in the computer's memory until"),
        (["--compile"], "--compile needs a C++ compiler"),
    ],
)
def test_what_this_machine_cannot_do_is_said_before_the_model_loads(
    told: list[str], words: str, ldm: Ldm, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(generate, "open_pipeline", lambda *_: pytest.fail("loaded"))
    code, out, err = ldm("generate", "x", "--model", str(model), "--device", "cpu", *told)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_pictures_come_back(ldm: Ldm, model: Path) -> None:
    """Of 48 pixels, which are more than one tile; a plain one says nothing of all this."""

    def drawn(name: str, *told: str) -> bytes:
        words = ["generate", "a red star", "--model", str(model), "--steps=2", "--seed=3"]
        code, out, err = ldm(*words, "--height=48", "--width=48", *told, "-o", name)
        assert (code, out) == (0, f"{name}\n"), err
        assert redraw(ldm, Path(name), Path("again.png")) == Path(name).read_bytes()
        with Image.open(name) as picture:
            return picture.tobytes()

    plain = drawn("plain.png")
    assert read_recipe(Path("plain.png")).memory == PLAIN
    assert drawn("tiles.png", "--tiling") != plain
    drawn("slices.png", "--attention", "sliced")
    assert read_recipe(Path("tiles.png")).memory == replace(PLAIN, tiling=True)
    assert read_recipe(Path("slices.png")).memory == Memory(attention="sliced")
    shown = ldm("show", "tiles.png")[1]
    assert "--tiling" in shown
    assert "--attention" not in shown


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("attention", ATTENTION[1:])
@pytest.mark.parametrize("quantise", QUANTISE)
def test_the_command_means_the_recipe(
    device: str, attention: str, quantise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the attention is always named: there "auto" may be another one tomorrow."""
    monkeypatch.setattr(quantising, "find_spec", lambda name: name)
    memory = Memory(attention, "none", quantise == "int8", False, quantise, attention == "sdpa")
    recipe = replace(RECIPE, memory=memory, device=device)
    assert Recipe.from_json(recipe.to_json()) == recipe
    parser = Parser("ldm generate", "")
    generate.add_arguments(parser)
    read = flags.read(parser.parse(shlex.split(recipe.command("a.png"))[2:]))
    meant = replace(read, attention="sdpa") if read.attention == "auto" else read
    assert meant == memory
    assert read.attention != "auto" or device == "cpu"


def test_a_picture_drawn_plainly_is_written_as_before() -> None:
    assert "memory" not in json.loads(RECIPE.to_json())
    hidden = replace(RECIPE, memory=replace(PLAIN, offload="layers", slicing=True).seen)
    assert hidden == RECIPE, "where networks lie is not seen in a picture"


@pytest.mark.parametrize("name", ["tiling", "slicing", "compile"])
@pytest.mark.parametrize("value", ["yes", 1, None])
def test_a_switch_is_on_or_off(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"{name}={value!r} must be True or False"):
        Memory(**{name: value})


@pytest.mark.parametrize(
    "forged",
    [None, [], 3, {"attention": "x"}, {"attention": 3}, {"tiling": 1}, {"tiling": "yes"}, {"a": 1}],
)
def test_a_forged_memory_is_an_error(forged: Any) -> None:
    values = json.loads(RECIPE.to_json())
    Recipe.from_json(json.dumps({**values, "memory": asdict(PLAIN)}))
    with pytest.raises((ValueError, TypeError)):
        Recipe.from_json(json.dumps({**values, "memory": forged}))


def test_names_of_a_batch_tell_what_is_seen(tmp_path: Path) -> None:
    """And pictures that were drawn before there was a choice are found again."""
    (tmp_path / "p.txt").write_text("a red star\n")
    told = ["--prompts", str(tmp_path / "p.txt"), "--out", "out"]
    (order,) = read_orders(batch.parser().parse(told))

    def name(*memory: Memory) -> str:
        return order.name(order.recipe((), "cpu", "float32", *memory))

    assert name() == name(PLAIN)
    assert {name(replace(PLAIN, offload=how)) for how in OFFLOAD} == {name()}
    seen = [Memory("sliced"), replace(PLAIN, tiling=True), replace(PLAIN, quantise="int8")]
    assert len({name(), *map(name, seen)}) == 4


def test_a_batch_draws_so(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("a red star\n")
    told = ["--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "out"), "--steps", "1"]
    told += ["--model", str(model), "--device", "cpu"]
    assert batch.main([*told, "--attention", "sliced", "--quiet"]) == 0
    (file,) = (tmp_path / "out").iterdir()
    assert read_recipe(file).memory.attention == "sliced"
    assert batch.main([*told, "--attention", "slicd"]) == 2
    assert "did you mean 'sliced'" in capsys.readouterr().err
