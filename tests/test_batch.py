"""Laws of the batch: nothing lost, nothing twice, and the same bytes on any number of processes.

model    a folder with a tiny random pipeline of the real classes
batch    runs the program in this process; gives (exit code, stdout, stderr)
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm_pipeline import cli
from ldm_pipeline.batch import __main__ as program
from ldm_pipeline.batch.orders import KEYS, Order, once, read_orders, share
from ldm_pipeline.commands import steps
from ldm_pipeline.commands.digests import changed, digests_of
from ldm_pipeline.commands.sources import Source, find
from ldm_pipeline.errors import UserError
from ldm_pipeline.metadata import Recipe
from ldm_pipeline.picture_files import is_whole, read_recipe
from ldm_pipeline.processes.ranks import LostPeer

ROOT = Path(__file__).parent.parent
Batch = Callable[..., tuple[int, str, str]]

LINES: list[dict[str, Any]] = [
    {"prompt": "a (red:1.5) star", "n": 2},
    {"prompt": "a blue house", "seed": 7, "steps": 2, "negative": "fog", "width": 24},
    {"prompt": "a (red:1.5) star"},  # what the first line asks for, too
    {"prompt": "a blue house", "guidance": 1, "sampler": "euler_a"},
]
"""Four different pictures."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Any]) -> Path:
    """A saved tiny pipeline."""
    from ldm_pipeline import LatentDiffusionPipeline

    folder = tmp_path_factory.mktemp("model")
    LatentDiffusionPipeline(**tiny()).save_pretrained(folder)
    return folder


@pytest.fixture
def batch(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Batch:
    """The program, run in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = program.main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n")


def contents(folder: Path) -> dict[str, bytes]:
    """The name and bytes of everything in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Orders -----------------------------------------------------------------------------------------


@given(st.sets(st.integers(0, 999)), st.integers(1, 9))
def test_shares_lose_nothing_and_repeat_nothing(missing: set[int], ranks: int) -> None:
    shares = [share(sorted(missing), rank, ranks) for rank in range(ranks)]
    assert sorted(i for each in shares for i in each) == sorted(missing)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def orders(*told: str) -> list[Order]:
    return read_orders(program.parser().parse(["--out", "out", "--prompts", *told]))


def name(order: Order, device: str = "cpu", dtype: str = "float32") -> str:
    return order.name(order.recipe((), device, dtype))


def test_names_tell_contents_and_seeds_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    write_lines(file, LINES)
    first, second, third, again, fourth = orders(str(file))
    names = [name(order) for order in (first, second, third, again, fourth)]
    assert once(names) == [0, 1, 2, 4]
    assert names[0].endswith("-0")
    assert names[1].endswith("-1")
    assert names[0][:16] == names[1][:16], "the seed stands in the name alone"
    assert names[2].endswith("-7")
    assert name(first, device="cuda:1") == name(first, device="cpu") == names[0]
    changed: list[dict[str, Any]] = [
        {"negative": "x"}, {"steps": 3}, {"guidance": 1.5}, {"sampler": "ddim"}, {"height": 16},
        {"width": 16}, {"prompt": "y"},
    ]  # fmt: skip
    write_lines(file, [{"prompt": "x"}, *({"prompt": "x", **change} for change in changed)])
    told = [name(order) for order in orders(str(file))]
    elsewhere = ["--model", "elsewhere", "--guidance", "3"]  # else it is asked for its usual one
    told += [name(orders(str(file), *flags)[0]) for flags in (["--plain"], elsewhere)]
    told += [name(orders(str(file))[0], dtype="bfloat16")]
    assert len(set(told)) == len(changed) + 4
    assert name(orders(str(file), "--n", "3")[0]) == told[0]


def test_a_text_file_is_one_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# these\n\na red star\n  a blue house \n")
    found = orders(str(tmp_path / "prompts.txt"), "--n", "2", "--seed", "5")
    assert [(order.prompt, order.seed) for order in found] == [
        ("a red star", 5), ("a red star", 6), ("a blue house", 5), ("a blue house", 6),
    ]  # fmt: skip


def test_what_is_usual_of_a_model_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not for every line."""
    read: list[str] = []

    def counted(name: str) -> Source:
        read.append(name)
        return find(name)

    monkeypatch.setattr(steps, "find", counted)
    write_lines(tmp_path / "prompts.jsonl", LINES)
    told = [order.args for order in orders(str(tmp_path / "prompts.jsonl"))]
    assert read == ["bundled"]
    assert [(own.steps, own.guidance, own.sampler) for own in told] == [
        (25, 2.0, "lcm"),
        (25, 2.0, "lcm"),
        (2, 2.0, "lcm"),
        (25, 2.0, "lcm"),
        (25, 1.0, "euler_a"),
    ]


REFUSED = {
    '{"prompt": "x"}\n\n{"promt": "x"}': "line 3: unknown key 'promt'; a line may set "
    + ", ".join(KEYS)
    + "; did you mean 'prompt'?",
    "{": "line 1: no JSON",
    "[" * 20_000: "line 1: no JSON",
    "[]": "line 1: must be an object",
    '{"seed": 1}': "line 1: there is no prompt",
    '{"prompt": 3}': "line 1: prompt=3 must be a text",
    '{"prompt": "x", "steps": "many"}': "line 1: steps='many' must be a number",
    '{"prompt": "x", "steps": 2.5}': "line 1: steps=2.5 must be a whole number",
    '{"prompt": "x", "n": 0}': "line 1: n=0 must be",
    '{"prompt": "x", "seed": -1}': "line 1: seed=-1 must be",
    '{"prompt": "x", "sampler": "dimm"}': "did you mean 'ddim'",
    '{"prompt": "x", "guidance": NaN}': "line 1: guidance=nan",
    '{"prompt": "x", "height": 12}': "line 1: height=12 is not a multiple of 8",
    "\n": "there is no prompt in",
}


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_a_mistake_in_a_line_is_told_with_the_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(text)
    with pytest.raises(UserError) as refused:
        orders(str(tmp_path / "prompts.jsonl"))
    assert REFUSED[text] in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--prompts p.txt", "--out"),
        ("--out out", "--prompts"),
        ("--prompts nowhere.txt --out out", "nowhere.txt"),
        ("--prompts p.txt --out p.txt", "--out=p.txt"),
        ("--prompts p.txt --out out --format gif", "--format='gif'"),
        ("--prompts p.txt --out out --model ./nowhere", "nowhere"),
        ("--prompts p.txt --out out --stpes 3", "did you mean '--steps'"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(arguments: str, said: str, batch: Batch) -> None:
    Path("p.txt").write_text("a red star\n")
    code, out, err = batch(*arguments.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert os.listdir() == ["p.txt"]


# Drawing ----------------------------------------------------------------------------------------


def test_an_adapter_that_was_trained_again_draws_again(
    batch: Batch, model: Path, tiny: Callable[..., Any], tmp_path: Path
) -> None:
    """At the same place; `ldm show` then says of the older picture that it is another file."""
    from ldm_pipeline.lora.files import save
    from ldm_pipeline.lora.inject import inject
    from ldm_pipeline.lora.targets import LoraSettings

    (tmp_path / "p.txt").write_text("a red star\n")
    told = ["--prompts", "p.txt", "--model", str(model), "--steps", "1", "--quiet"]
    told += ["--lora", "run", "--out", "out"]
    pictures: list[Path] = []
    for seed in (0, 0, 1):
        adapter = inject({"unet": tiny()["unet"]}, LoraSettings(["mid_block"]), seed=seed)
        save(tmp_path / "run", adapter.weights())
        code, _, err = batch(*told)
        assert code == 0, err
        pictures += [path for path in Path("out").iterdir() if path not in pictures]
    assert len(pictures) == 2, "one for each adapter, and none twice"
    said = [changed(read_recipe(path)) for path in pictures]
    assert "drawn with run (SHA-256 " in said[0][0]
    assert "which is another file now" in said[0][0]
    assert said[1] == []
    (tmp_path / "run/pytorch_lora_weights.safetensors").unlink()
    (tmp_path / "run").rmdir()
    assert "which is not here" in changed(read_recipe(pictures[1]))[0]


def test_a_decoder_is_told_by_what_lies_in_its_folder(tmp_path: Path) -> None:
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (tmp_path / name).write_text("1")
    hub = Source("somebody/model", None)
    first = digests_of(hub, (), False, str(tmp_path))
    (tmp_path / "notes.txt").write_text("")
    assert digests_of(hub, (), True, str(tmp_path)) == first
    (tmp_path / "diffusion_pytorch_model.safetensors").write_text("2")
    assert digests_of(hub, (), False, str(tmp_path)) != first
    assert digests_of(hub, (), True, "small") == {}


def test_the_bundled_model_is_told_by_its_weights_too() -> None:
    """Which change between releases; `ldm show` finds it, whatever the folder is."""
    (told,) = digests_of(find("bundled"), (), True, "small").items()
    assert told[0] == "bundled"
    recipe = Recipe(("x",), 0, 1, 1.0, (8, 8), "cpu", "float32", digests=dict([told]))
    assert changed(recipe) == []
    (line,) = changed(replace(recipe, digests={"bundled": "0"}))
    assert line == "drawn with bundled (SHA-256 0), which is another file now"


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_model_that_was_trained_again_draws_again(
    kind: str, batch: Batch, tiny: Callable[..., Any], tmp_path: Path
) -> None:
    """At the same place, and nothing else of it needs to have changed."""
    import torch

    from ldm_pipeline.models.original.convert import to_file
    from tests.models.original.models import pipeline

    pipe = pipeline("sd1")
    (tmp_path / "p.txt").write_text("a red star\n")
    name = "model" if kind == "folder" else "model.safetensors"
    told = ["--prompts", "p.txt", "--model", name, "--steps", "1", "--quiet", "--out", "out"]
    drawn: list[Path] = []
    for change in (0.0, 0.0, 0.1):
        with torch.no_grad():
            pipe.unet.conv_in.bias.add_(change)
        pipe.save_pretrained(tmp_path / "model")
        if kind == "file":
            to_file(tmp_path / "model", tmp_path / name)
        code, _, err = batch(*told)
        assert code == 0, err
        drawn += [path for path in Path("out").iterdir() if path not in drawn]
    assert len(drawn) == 2, "one for each model, and none twice"
    said = [changed(read_recipe(path)) for path in drawn]
    assert [len(lines) for lines in said] == [1, 0]
    assert said[0][0].startswith(f"drawn with {name} (SHA-256 ")


def test_two_processes_draw_what_one_draws_and_the_rest_is_kept(
    batch: Batch, model: Path, tmp_path: Path
) -> None:
    """`accelerate launch` on a CPU with 2 processes, and one process here, byte for byte. No flag
    is taken for one of the launcher's, not even one that some of those begin with."""
    write_lines(tmp_path / "prompts.jsonl", LINES)
    told = ["--prompts", "prompts.jsonl", "--model", str(model), "--steps", "1", "--n", "1"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    done = subprocess.run(
        [*launch, "-m", "ldm_pipeline.batch", *told, "--out", "two"],
        cwd=tmp_path,
        env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "two"
    said = "5 pictures asked for, 1 of them more than once; 4 to draw"
    assert f"{said} on 2 processes" in done.stderr
    code, out, err = batch(*told, "--out", "one")
    assert (code, out) == (0, "one\n"), err
    assert said in err
    drawn = contents(tmp_path / "one")
    assert len(drawn) == 4
    assert contents(tmp_path / "two") == drawn

    # Again, with one picture gone, one cut short, and what a killed process leaves.
    (gone, cut, *kept) = sorted((tmp_path / "one").iterdir())
    before = {path: path.stat().st_mtime_ns for path in kept}
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:200])
    (tmp_path / "one" / f".{gone.name}.123.tmp").write_bytes(b"half")
    (tmp_path / "one" / "mine.tmp").write_bytes(b"kept")
    code, out, err = batch(*told, "--out", "one")
    assert code == 0
    assert "2 are there; 2 to draw" in err
    assert contents(tmp_path / "one") == {**drawn, "mine.tmp": b"kept"}
    assert {path: path.stat().st_mtime_ns for path in kept} == before


def test_a_killed_batch_goes_on_where_it_was(batch: Batch, model: Path, tmp_path: Path) -> None:
    """Killed as by `kill -9` whenever another picture is there, and started again until it ends by
    itself: nothing is half-written, and nothing that was drawn is drawn again."""
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": "a red star", "n": 9}])
    told = ["--prompts", "prompts.jsonl", "--model", str(model), "--steps", "3", "--quiet"]
    out, killed = tmp_path / "killed", 0
    kept: dict[Path, int] = {}
    while len(kept) < 9:
        # Forked, as in tests/ranks.py: no package is imported again.
        run = get_context("fork").Process(target=program.main, args=([*told, "--out", "killed"],))
        run.start()
        while run.is_alive() and len(list(out.glob("[!.]*.png"))) <= len(kept):
            time.sleep(0.001)
        run.kill()
        run.join()
        killed += run.exitcode == -signal.SIGKILL
        found = {path: path.stat().st_mtime_ns for path in out.glob("[!.]*.png")}
        assert len(found) > len(kept), f"it ended with {run.exitcode} before it drew"
        assert {path: found[path] for path in kept} == kept, "drawn again"
        assert all(map(is_whole, found)), "a picture appears whole or not at all"
        kept = found
    assert killed, "each run ended by itself"
    assert batch(*told, "--out", "killed") == (0, "killed\n", ""), "what the last one left goes"
    assert batch(*told, "--out", "whole") == (0, "whole\n", "")
    assert len(contents(tmp_path / "whole")) == 9
    assert contents(out) == contents(tmp_path / "whole")


def test_a_process_that_is_left_alone_says_so() -> None:
    def closed() -> None:
        raise LostPeer("Connection closed by peer [127.0.0.1]:1234")

    with pytest.raises(UserError, match="another process has ended"):
        program._wait(closed)


def test_the_settings_in_a_picture_draw_it_again(
    batch: Batch, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(Path("prompts.jsonl"), LINES[1:2])
    told = ["--prompts", "prompts.jsonl", "--model", str(model), "--steps", "1"]
    assert batch(*told, "--out", "out", "--format", "webp", "--quiet") == (0, "out\n", "")
    (drawn,) = Path("out").iterdir()
    recipe = read_recipe(drawn)
    assert (recipe.prompts, recipe.seed, recipe.size) == (("a blue house",), 7, (32, 24))
    words = shlex.split(recipe.command("again.webp"))
    assert cli.main([*words[1:], "--quiet"]) == 0
    capsys.readouterr()
    assert Path("again.webp").read_bytes() == drawn.read_bytes()
