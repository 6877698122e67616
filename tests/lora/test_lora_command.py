"""Laws of `ldm lora`: what it writes draws the same, and what it refuses it refuses at once."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm_pipeline.cli import main
from ldm_pipeline.commands import lora as command
from ldm_pipeline.commands.sources import Source
from ldm_pipeline.lora.deltas import product
from ldm_pipeline.lora.files import inspect, load, save
from ldm_pipeline.lora.layouts.families import FAMILIES
from ldm_pipeline.lora.notes import LcmNote, read_note
from tests.lora import test_lycoris
from tests.lora.tiny_families import PIPELINES, lora, sd1
from tests.test_architecture import ROOT

Ldm = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ldm(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ldm:
    """ldm("info", "a.safetensors"): `ldm lora …` in an empty folder; code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def ldm(*arguments: str) -> tuple[int, str, str]:
        code = main(["lora", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return ldm


@pytest.fixture
def style(tmp_path: Path) -> str:
    """A LoRA in diffusers' layout."""
    save(tmp_path / "style.safetensors", lora(sd1(), every=6))
    return "style.safetensors"


def test_a_file_goes_through_every_layout(ldm: Ldm, style: str) -> None:
    steps = [("kohya", "k.safetensors"), ("peft", "p"), ("diffusers", "d.safetensors")]
    before, source = load(style), style
    for layout, out in steps:
        flags = ["--base", "sd1"] if layout == "kohya" else []
        assert ldm("convert", source, "--to", layout, "--out", out, *flags) == (0, f"{out}\n", "")
        assert inspect(out).layout == layout
        source = out
    after = load(source)
    for place in before.modules():
        assert torch.allclose(product(after, *place), product(before, *place), atol=1e-6)
    assert inspect("k.safetensors").texts["modelspec.title"] == "k"


def test_what_a_header_says_besides_is_carried_over(ldm: Ldm, tmp_path: Path) -> None:
    notes = {"ss_tag_frequency": '{"a": {"cactus": 3}}', "lcm": "{}", "ss_network_dim": "99"}
    file = tmp_path / "a.safetensors"
    save(file, lora(sd1(), every=9), notes)
    assert (
        ldm("convert", "a.safetensors", "--to=kohya", "--out=b.safetensors", "--base=sd1")[0] == 0
    )
    texts = inspect("b.safetensors").texts
    assert texts["ss_tag_frequency"] == notes["ss_tag_frequency"]
    assert texts["lcm"] == "{}"
    assert texts["ss_network_dim"] != "99"
    assert ldm("convert", "b.safetensors", "--to=diffusers", "--out=c.safetensors")[0] == 0
    assert "sshs_model_hash" not in inspect("c.safetensors").texts


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "peft"])
def test_how_an_adapter_was_distilled_stays_in_every_layout(layout: str, tmp_path: Path) -> None:
    note = LcmNote("some", 40, 5.0)
    place = tmp_path / ("a" if layout == "peft" else "a.safetensors")
    save(place, lora(sd1(), every=9), note.texts(), layout, FAMILIES["sd1"])
    assert inspect(place).layout == layout
    assert read_note(place) == note


@pytest.mark.parametrize(("base", "sides"), [("sd1", 4), ("sd2", 2)])
def test_the_family_says_what_is_a_convolution(
    base: str, sides: int, ldm: Ldm, tmp_path: Path
) -> None:
    """Of a product of LyCORIS', which is a matrix in either case; stock diffusers would not load
    the other."""
    name, parts, wanted = test_lycoris.CASES["LoHa of a 1 x 1 convolution"]
    file = test_lycoris.written(tmp_path, name, parts)
    code, out, err = ldm("convert", str(file), "--to=diffusers", "--out=a", f"--base={base}")
    assert (code, out) == (0, "a/pytorch_lora_weights.safetensors\n"), err
    weights = load("a")
    assert {tensor.ndim for tensor in weights.tensors.values()} == {sides}
    assert torch.allclose(product(weights, "unet", name).flatten(1), wanted, atol=1e-6)


def test_a_precision_may_be_chosen(ldm: Ldm, style: str) -> None:
    flags = ("--to=diffusers", "--dtype=float16", "--out=half.safetensors")
    assert ldm("convert", style, *flags)[0] == 0
    assert {t.dtype for t in load("half.safetensors").tensors.values()} == {torch.float16}


def test_info_tells_what_it_is(ldm: Ldm, tmp_path: Path) -> None:
    notes = {
        "ss_tag_frequency": '{"folder": {"cactus": 9, "red\\u001b[31m": 2}}',
        "ss_sd_model_name": "v1-5.safetensors",
    }
    weights = lora(sd1(), only=("attn2.to_q", "fc1"), dora=True)
    save(tmp_path / "a.safetensors", weights, notes, "kohya", FAMILIES["sd1"])
    code, out, _ = ldm("info", "a.safetensors")
    assert code == 0
    size = (tmp_path / "a.safetensors").stat().st_size
    assert f"a.safetensors: DoRA in kohya layout, {size / 1000:.1f} kB" in out
    assert "base model: v1-5.safetensors, Stable Diffusion 1.x" in out
    assert "trained words: cactus (9), red [31m (2)" in out
    assert "\x1b" not in out
    assert re.search(r"unet: \d+ modules, rank 1 to 3, alpha .*, scale ", out)
    assert "targets: to_q (" in out
    assert "text_encoder: 3 modules" in out


def test_info_tells_a_few_step_adapter(ldm: Ldm, tmp_path: Path) -> None:
    note = LcmNote("mine\x1b[31m", 40, 8.0)
    save(tmp_path / "a.safetensors", lora(sd1(), every=30), note.texts())
    told = ldm("info", "a.safetensors")[1]
    assert (
        "few steps: draws with --lcm; distilled from mine [31m, original_steps 40,"
        " timestep_scaling 8, spacing even" in told.splitlines()
    )
    save(tmp_path / "b.safetensors", lora(sd1(), every=30), {})
    assert "few steps" not in ldm("info", "b.safetensors")[1]


def test_info_tells_whether_it_fits(ldm: Ldm, style: str, tmp_path: Path) -> None:
    sd1().save_pretrained(tmp_path / "model")
    code, out, _ = ldm("info", style, "--model", "model")
    assert (code, "model: fits" in out) == (0, True)
    save(tmp_path / "b.safetensors", lora(PIPELINES["sdxl"](), every=30))
    code, out, _ = ldm("info", "b.safetensors", "--model", "model")
    assert code == 1
    assert "model: does not fit" in out
    assert re.search(r"unexpected: unet\.\S+, nearest unet\.\S+", out)


def test_files_are_merged_with_weights(ldm: Ldm, style: str, tmp_path: Path) -> None:
    save(tmp_path / "b.safetensors", lora(sd1(), seed=1, every=4))
    code, out, _ = ldm("merge", f"{style}:0.8", "b.safetensors:-0.5", "--out", "both.safetensors")
    assert (code, out) == (0, "both.safetensors\n")
    one, other, both = load(style), load("b.safetensors"), load("both.safetensors")
    for place in both.modules():
        wanted = sum(
            (
                w * product(x, *place)
                for x, w in ((one, 0.8), (other, -0.5))
                if place in set(x.modules())
            ),
            torch.zeros(()),
        )
        assert torch.allclose(product(both, *place), wanted, atol=1e-5)
    assert (
        inspect("both.safetensors").texts["modelspec.merged_from"]
        == f"{style}:0.8, b.safetensors:-0.5"
    )


def test_files_are_merged_into_a_model_and_extracted_again(
    ldm: Ldm, style: str, tmp_path: Path
) -> None:
    sd1().save_pretrained(tmp_path / "model")
    assert ldm("merge", f"{style}:0.5", "--into", "model", "--out", "new")[:2] == (0, "new\n")
    code, out, err = ldm("extract", "new", "model", "--rank", "3", "--out", "back.safetensors")
    assert (code, out) == (0, "back.safetensors\n")
    assert "100.00 % of the energy kept" in err
    assert "base model: model" in ldm("info", "back.safetensors")[1]
    before, after = load(style), load("back.safetensors")
    for place in before.modules():
        assert torch.allclose(product(after, *place), 0.5 * product(before, *place), atol=1e-5)


def test_merged_files_are_drawn_with_as_the_few_step_adapter_among_them(
    ldm: Ldm, style: str, tmp_path: Path
) -> None:
    """What differs in the base's name alone is kept without it."""
    for name, note in {
        "a": LcmNote("some", 40, 5.0, "angle"),
        "b": LcmNote("other", 40, 5.0, "angle"),
        "c": LcmNote("some", 40, 10.0),
    }.items():
        save(tmp_path / f"{name}.safetensors", lora(sd1(), every=9), note.texts())
    a, b, c = (f"{name}.safetensors" for name in "abc")
    for files, base in ((style, a), "some"), ((a, a), "some"), ((a, b), None):
        out = f"{len(list(tmp_path.iterdir()))}.safetensors"
        assert ldm("merge", *files, "--out", out)[0] == 0
        assert read_note(out) == LcmNote(base, 40, 5.0, "angle")
    assert ldm("merge", style, style, "--out", "plain.safetensors")[0] == 0
    assert "lcm" not in inspect("plain.safetensors").texts
    before = sorted(tmp_path.iterdir())
    code, out, err = ldm("merge", a, style, c, "--out", "d.safetensors")
    assert (code, out) == (2, "")
    assert "a.safetensors 40 steps spaced angle, timestep_scaling 5;" in err
    assert "c.safetensors 40 steps spaced even, timestep_scaling 10" in err
    assert sorted(tmp_path.iterdir()) == before


def test_the_base_that_merged_files_share_is_named(ldm: Ldm, tmp_path: Path) -> None:
    """And where they differ or one of them says none, none is."""
    for name, base in (("a", "v1-5"), ("b", "v1-5"), ("c", "v1-4"), ("d", None)):
        notes = {} if base is None else {"ss_sd_model_name": base}
        save(tmp_path / f"{name}.safetensors", lora(sd1(), every=30), notes)
    for other, told in (("b", "v1-5, Stable Diffusion 1.x"), ("c", "Stable"), ("d", "Stable")):
        out = f"a{other}.safetensors"
        flags = ("--out", out, "--base", "sd1")
        assert ldm("merge", "a.safetensors", f"{other}.safetensors", *flags)[0] == 0
        assert f"base model: {told}" in ldm("info", out)[1]


def test_a_single_file_is_to_be_made_a_folder(
    ldm: Ldm, style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "find", lambda name: Source(name, None, Path(name)))
    code, _, err = ldm("info", style, "--model", "model.safetensors")
    assert (code, err.count("\n")) == (2, 1)
    assert "ldm convert model.safetensors FOLDER" in err


def test_dora_is_merged_where_the_model_is_named(ldm: Ldm, style: str, tmp_path: Path) -> None:
    sd1().save_pretrained(tmp_path / "model")
    save(tmp_path / "dora.safetensors", lora(sd1(), every=20, dora=True))
    words = ("merge", "dora.safetensors", style, "--out", "both.safetensors")
    code, _, err = ldm(*words)
    assert code == 2
    assert "--model" in err
    assert ldm(*words, "--model", "model")[0] == 0


def test_a_lower_rank_says_what_it_kept(ldm: Ldm, style: str) -> None:
    code, out, err = ldm("resize", style, "--rank", "1", "--out", "small.safetensors")
    assert (code, out) == (0, "small.safetensors\n")
    assert re.search(r"\d+ modules, rank 1: \d\d\.\d\d % of the energy kept", err)
    ranks = {
        s.rank
        for layout in load("small.safetensors").layouts.values()
        for s in layout.slots.values()
    }
    assert ranks == {1}


def test_a_stranger_s_file_of_one_matrix_is_described(ldm: Ldm, tmp_path: Path) -> None:
    key = "lora_unet_mid_block_attentions_0_proj_in"
    w = {
        f"hada_w{k}": torch.ones(4, 1) if k.endswith("a") else torch.ones(1, 4)
        for k in ("1_a", "1_b", "2_a", "2_b")
    }
    save_file(
        {f"{key}.{part}": t for part, t in w.items()},
        tmp_path / "a.safetensors",
        {"ss_tag_frequency": "[["},
    )
    code, out, _ = ldm("info", "a.safetensors")
    assert code == 0
    assert "LoHa in kohya layout" in out
    assert "trained words: cannot be read" in out


REFUSED = {
    "": "kind",
    "convrt a": "did you mean 'convert'",
    "convert --to kohya --out x.safetensors": "needs a file",
    "convert a.safetensors b --to kohya --out x.safetensors": "takes no 'b'",
    "convert a.safetensors --out x.safetensors": "needs --to",
    "convert a.safetensors --to koya --out x.safetensors": "did you mean 'kohya'",
    "convert a.safetensors --to kohya --out x.safetensors": "--base, one of sd1, sd2",
    "convert a.safetensors --to kohya --base sd3 --out x.safetensors": "--base='sd3'",
    "convert a.safetensors --to peft --out x.safetensors": "is a folder",
    "convert a.safetensors --to diffusers --out a.safetensors": "there already",
    "convert a.safetensors --to diffusers --out no/where.safetensors": "no folder no",
    "convert a.safetensors --to diffusers --dtype float8 --out x.safetensors": "--dtype='float8'",
    "convert b.safetensors --to diffusers --out x.safetensors": "nothing tells this file's; say",
    "convert a.safetensors --to diffusers --out x.pt": "as .safetensors only, alone or in a folder",
    "convert nowhere --to kohya --out x.safetensors": "there is no LoRA file nowhere",
    "info a.safetensors --rank 3": "takes no --rank",
    "info a.safetensors --model nowhere": "nowhere",
    "merge a.safetensors:nan --out x.safetensors": "is nan",
    "merge a.safetensors:x --out x.safetensors": "no weight",
    "merge a.safetensors --into . --to kohya --out x": "--to does not go together with --into",
    "merge a.safetensors --into . --out x.safetensors": "is a folder, not a .safetensors file",
    "resize a.safetensors --out x.safetensors": "--rank 8, or --energy",
    "resize a.safetensors --rank 0 --out x.safetensors": "--rank=0",
    "resize a.safetensors --energy 1.5 --out x.safetensors": "--energy=1.5",
    "extract one --rank 3 --out x.safetensors": "two models",
}


def unknown_family(folder: Path) -> None:
    """a.safetensors, b.safetensors: a LoRA and a LoKr whose family nothing tells."""
    ones = torch.ones(2, 2)
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = {f"{key}.lora_A.weight": ones, f"{key}.lora_B.weight": ones.clone()}
    save_file(lora, folder / "a.safetensors")
    key = "lora_unet_mid_block_attentions_0_proj_in"
    lokr = {f"{key}.lokr_w1": ones, f"{key}.lokr_w2": ones.clone()}
    save_file(lokr, folder / "b.safetensors")


@pytest.mark.parametrize("arguments", REFUSED)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: str, ldm: Ldm, tmp_path: Path) -> None:
    unknown_family(tmp_path)
    code, out, err = ldm(*arguments.split())
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert REFUSED[arguments] in err
    assert not list(tmp_path.glob("x*"))


def test_refusals_and_help_import_nothing_heavy(tmp_path: Path) -> None:
    unknown_family(tmp_path)
    script = (
        "import sys; from ldm_pipeline.cli import main\n"
        "assert all(main(['lora', *a.split()]) == 2 for a in sys.argv[1:])\n"
        "assert main(['lora', '--help']) == 0\n"
        "print([m for m in ('torch', 'safetensors', 'peft', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *REFUSED],
        capture_output=True, text=True, check=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[]"
