"""Putting a trained model where it can be given away: whole, small, and silent about its maker."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from ldm_pipeline import LatentDiffusionPipeline
from ldm_pipeline.commands.info import read_licence
from ldm_pipeline.data.world import World
from ldm_pipeline.errors import UserError
from ldm_pipeline.lora import files
from ldm_pipeline.lora.inject import inject
from ldm_pipeline.lora.notes import LcmNote, read_note
from ldm_pipeline.lora.targets import LoraSettings
from ldm_pipeline.models import bundled
from ldm_pipeline.training import bundle as module
from ldm_pipeline.training.bundle import Parts, bundle


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The bundled model, as a training run of some machine leaves it."""
    folder = tmp_path / "model"
    shutil.copytree(bundled.folder(), folder)
    config = folder / "vae" / "config.json"
    told = json.loads(config.read_text("utf-8"))
    config.write_text(json.dumps({**told, "_name_or_path": "/somewhere/on/a/machine"}), "utf-8")
    return folder


def test_it_is_what_was_trained_and_says_nothing_of_where(model: Path, tmp_path: Path) -> None:
    out = bundle(Parts(model, model), tmp_path / "out")
    for config in out.rglob("config.json"):
        trained = json.loads((model / config.relative_to(out)).read_text("utf-8"))
        trained.pop("_name_or_path", None)
        assert json.loads(config.read_text("utf-8")) == trained
    for weights in out.rglob("*.safetensors"):
        assert weights.read_bytes() == (model / weights.relative_to(out)).read_bytes()
    assert "Not measured yet" in (out / "README.md").read_text("utf-8")


def test_new_words_are_heard(model: Path, tmp_path: Path) -> None:
    """As loud as those of the world's captions, of which not one bit changes."""
    file = Path("text_encoder", "model.safetensors")
    trained = load_file(model / file)
    name = next(name for name in trained if name.endswith("token_embedding.weight"))
    trained[name] = torch.nn.functional.normalize(trained[name].float(), dim=1).half()
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    told = tokenizer([World(0).told(i)[2] for i in range(500)]).input_ids
    known = sorted({token for tokens in told for token in tokens})
    new = tokenizer("qwertyuiop", add_special_tokens=False).input_ids
    marks = tokenizer("? ! ~", add_special_tokens=False).input_ids
    trained[name][[*new, *marks]] *= 0.1
    save_file(trained, model / file, {"format": "pt"})
    heard = load_file(bundle(Parts(model, model), tmp_path / "out") / file)
    for other in trained:
        assert other == name or torch.equal(heard[other], trained[other])
    assert torch.equal(heard[name][known], trained[name][known])
    assert torch.equal(heard[name][marks], trained[name][marks])
    # float16 has 11 bits.
    torch.testing.assert_close(heard[name][new], 10 * trained[name][new], rtol=3e-3, atol=1e-3)


def test_a_damaged_text_encoder_is_told(model: Path, tmp_path: Path) -> None:
    (model / "text_encoder" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="the bundle cannot be made"):
        bundle(Parts(model, model), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_does_not_fit_leaves_everything_as_it_was(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model_index.json").touch()
    monkeypatch.setattr(module, "MOST_BYTES", 1_000_000)
    with pytest.raises(UserError, match=r"takes .* MB; at most 1 fit"):
        bundle(Parts(model, model), out)
    shutil.rmtree(model / "clip")
    with pytest.raises(UserError, match="clip is missing"):
        bundle(Parts(model, model), out)
    assert [path.name for path in tmp_path.iterdir() if path != model] == ["out"]
    assert [path.name for path in out.iterdir()] == ["model_index.json"]


def test_adapter_and_small_decoder_come_beside_it_in_half_the_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = LatentDiffusionPipeline.bundled().unet
    adapter = inject({"unet": unet}, LoraSettings(rank=2), seed=0)
    note = LcmNote("bundled", 20, 5.0)
    own = files.save(tmp_path / "adapter", adapter.weights(), note.texts())
    small = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8)
    )
    small.save_pretrained(tmp_path / "small")
    figures = {"settings": {"prompts": 9, "seed": 0, "steps": 4, "guidance": 1.0, "lcm": "True"},
               "shares": {}, "psnr": 30.0, "aims": {}}  # fmt: skip
    (tmp_path / "few.json").write_text(json.dumps(figures), "utf-8")
    parts = Parts(
        model, model, lcm=own.parent, lcm_report=tmp_path / "few.json", decoder=tmp_path / "small"
    )
    out = bundle(parts, tmp_path / "out")
    kept, was = files.load(out / "lcm"), adapter.weights()
    assert kept.layouts == was.layouts
    assert read_note(out / "lcm") == note
    assert {t.dtype for t in kept.tensors.values()} == {torch.float16}
    assert all(torch.equal(kept.tensors[name], was.tensors[name].half()) for name in was.tensors)
    halved = AutoencoderTiny.from_pretrained(out / "decoder", torch_dtype=torch.float16)
    pairs = zip(halved.parameters(), small.parameters(), strict=True)
    assert all(torch.equal(a, b.half()) for a, b in pairs)
    card = (out / "README.md").read_text("utf-8")
    assert "--prompts 9 --seed 0 --steps 4 --lcm`" in card
    assert "| `decoder` | AutoencoderTiny" in card
    monkeypatch.setattr(module, "MOST_LCM_BYTES", 1000)
    with pytest.raises(UserError, match="few-step adapter takes"):
        bundle(parts, tmp_path / "out")
    assert (out / "lcm").is_dir()


def test_only_a_bundle_is_replaced(model: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    (runs / "unet" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="something else than a model"):
        bundle(Parts(model, model), runs)
    for out in (tmp_path, model):
        with pytest.raises(UserError, match="lies in it"):
            bundle(Parts(model, model), out)
    with pytest.raises(UserError, match="is a file"):
        bundle(Parts(model, model), model / "model_index.json")
    assert (runs / "unet" / "checkpoints").is_dir()
    assert (model / "unet").is_dir()


def test_a_bundle_that_cannot_be_put_in_place_leaves_the_old_one(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = bundle(Parts(model, model), tmp_path / "out")
    (out / "mark").touch()
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == ".out.unfinished":
            raise OSError(errno.EACCES, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(UserError, match=r"out cannot be written: Permission denied"):
        bundle(Parts(model, model), out)
    assert (out / "mark").is_file()
    monkeypatch.undo()
    (tmp_path / "out.before").mkdir()  # somebody's own
    out.rename(tmp_path / ".out.before")  # as a kill between the two leaves it
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    with pytest.raises(UserError, match="not what ldm evaluate writes"):
        bundle(Parts(model, model, report=broken), out)
    assert (out / "mark").is_file()
    shutil.copytree(out, tmp_path / ".out.before")  # as a kill at the very end leaves it
    bundle(Parts(model, model), out)
    assert not (out / "mark").exists()
    assert {path.name for path in tmp_path.iterdir()} == {
        "model", "out", "out.before", "broken.json",
    }  # fmt: skip


@pytest.mark.parametrize("part", ["report", "lcm", "decoder", "history"])
def test_a_part_that_cannot_be_read_is_named_and_nothing_is_left(
    part: str, model: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    told: dict[str, Any] = {part: broken}
    with pytest.raises(UserError, match="broken is missing"):
        bundle(Parts(model, model, **told), tmp_path / "out")
    broken.write_bytes(b"\xff not what it should be")
    with pytest.raises(UserError):
        bundle(Parts(model, model, **told), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "broken"}


def test_the_card_counts_and_tells_the_history(model: Path, tmp_path: Path) -> None:
    (tmp_path / "told.md").write_text("It saw {many} pictures.\n", "utf-8")
    out = bundle(Parts(model, model, history=tmp_path / "told.md", licence="mit"), tmp_path / "out")
    assert read_licence(out) == "mit"
    card = (out / "README.md").read_text("utf-8")
    assert "It saw {many} pictures." in card
    pipe = LatentDiffusionPipeline.bundled()
    for name in ("vae", "text_encoder", "unet"):
        n = sum(p.numel() for p in getattr(pipe, name).parameters())
        assert f"| {n / 1e6:.1f} M |" in card
