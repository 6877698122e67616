"""Models of every kind through the command: what it draws with nothing said of them is what the
pipeline draws that `load` opens."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler
from PIL import Image

import ldm_pipeline
from ldm_pipeline.commands import evaluate, generate
from ldm_pipeline.models import bundled
from ldm_pipeline.models.original.convert import to_file
from tests.conftest import tiny_scheduler
from tests.models.original.models import KINDS, plain
from tests.models.original.models import pipeline as original
from tests.parity.pairs import mask, picture
from tests.test_cli import Ldm, ldm

__all__ = ["ldm"]

PAINTING: tuple[list[str], dict[str, Any]] = (
    ["--image=a.png", "--mask=hole.png", "--no-keep"],
    {"image": "a.png", "mask_image": "hole.png"},
)
ASKED: dict[str, tuple[list[str], dict[str, Any]]] = {
    "sd1": ([], {}),
    "sd1-inpaint": PAINTING,
    "sd1-lcm": (["--lcm"], {"lcm": True}),
    "sd2": ([], {}),
    "sdxl": ([], {}),
    "sdxl-inpaint": PAINTING,
    "refiner": (["--image=a.png", "--strength=0.7"], {"image": "a.png", "strength": 0.7}),
}
"""What each kind of model is asked for: of the command, and of the pipeline."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with each kind of model: as a folder, with weights in fp16 alone, and as a file of
    ours and of others."""
    place = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        pipe = original(kind)
        pipe.save_pretrained(place / kind / "folder")
        to_file(place / kind / "folder", place / kind / "file.safetensors")
        plain(place / kind / "file.safetensors")
        pipe.to(dtype=torch.float16).save_pretrained(place / kind / "fp16", variant="fp16")
    return place


@pytest.mark.parametrize("form", ["folder", "file.safetensors", "file-plain.safetensors"])
@pytest.mark.parametrize("kind", ["sd1-inpaint", "sdxl-inpaint"])
def test_a_model_that_paints_asks_for_a_picture_before_it_loads(
    kind: str, form: str, ldm: Ldm, models: Path
) -> None:
    place = str(models / kind / form)
    code, out, err = ldm("generate", "a red star", "--model", place)
    assert (code, out) == (2, "")
    assert f"--model={place} paints into pictures" in err
    assert "seed" not in err, "which is told once the model is loaded"


@pytest.mark.parametrize("form", ["folder", "fp16", "file.safetensors", "file-plain.safetensors"])
@pytest.mark.parametrize("kind", ASKED)
def test_the_command_draws_what_the_pipeline_does(
    kind: str, form: str, ldm: Ldm, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = models / kind / form
    name = "tokenizer_2" if kind == "refiner" else "tokenizer"
    cache = models / kind / "cache"  # where the hub's own tools would put CLIP's vocabulary
    if not cache.exists():
        known = cache / "models--openai--clip-vit-large-patch14/snapshots"
        shutil.copytree(models / kind / "folder" / name, known / "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    picture(32, 32).save("a.png")
    mask(32, 32).save("hole.png")
    flags, told = ASKED[kind]
    words = ["generate", "a red star", "--steps=3", "--seed=5", "--plain", "--model", str(place)]
    sides = [] if "--image=a.png" in flags else ["--height=32", "--width=32"]
    code, _, err = ldm(*words, *flags, *sides, "-o", "b.png")
    assert code == 0, err
    opened: dict[str, Any] = {
        k: Image.open(v) if isinstance(v, str) else v for k, v in told.items()
    }
    opened |= {"height": 32, "width": 32}
    pipe = ldm_pipeline.load(place)
    (wanted,) = pipe("a red star", num_inference_steps=3, seed=5, **opened).images
    with Image.open("b.png") as found:
        assert np.array_equal(np.asarray(found), np.asarray(wanted))


@pytest.mark.parametrize("form", ["model", "model.safetensors"])
@pytest.mark.parametrize(
    "scheduler, most",
    [
        (tiny_scheduler(num_train_timesteps=20), 20),
        (tiny_scheduler(trained_betas=[0.01] * 30), 30),
        (LCMScheduler(original_inference_steps=40), 40),
    ],
)
def test_more_steps_than_the_model_has_levels_are_refused_before_it_loads(
    scheduler: Any, most: int, form: str, ldm: Ldm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what its scheduler says of itself, in a folder and in a file of ours."""

    def loaded(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "pick_device", loaded)
    pipe = original("sd1")
    pipe.scheduler = scheduler
    pipe.save_pretrained("model")
    assert ldm("convert", "model", "model.safetensors")[0] == 0
    told = ["generate", "x", "--model", form, "--steps"]
    code, out, err = ldm(*told, str(most + 1))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"--steps={most + 1} must lie between 1 and {most}, the noise levels" in err
    assert ldm(*told, str(most))[0] == 130, "it did not go on"


def test_evaluate_measures_with_the_adapter_that_it_is_told(
    ldm: Ldm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every setting of the steps reaches the pipeline."""
    asked: list[dict[str, Any]] = []

    class Spy:
        config = SimpleNamespace(_name_or_path=None)

        def set_progress_bar_config(self, **_: object) -> None: ...

        def __call__(self, prompts: list[str], **told: Any) -> Any:
            asked.append(told)
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "open_pipeline", lambda *_: Spy())
    assert ldm("evaluate", "--lcm", "--steps", "4", "--prompts", "2")[0] == 130
    assert ldm("evaluate", "--sampler", "tcd", "--eta", "0.2", "--prompts", "2")[0] == 130
    for model in ("bundled", str(bundled.folder())):  # by whatever name
        assert ldm("evaluate", "--prompts", "2", "--model", model)[0] == 130
    original("sd1-lcm").save_pretrained("distilled")
    assert ldm("evaluate", "--prompts", "2", "--model", "distilled")[0] == 130
    few, other, *usual, distilled = asked
    assert (few["lcm"], few["num_inference_steps"], few["guidance_scale"]) == (True, 4, 1.0)
    assert (other["lcm"], other["sampler"], other["eta"]) == (False, "tcd", 0.2)
    for own in usual:
        told = (own["num_inference_steps"], own["guidance_scale"], own["sampler"])
        assert told == (25, 2.0, "lcm")
    assert (distilled["guidance_scale"], distilled["sampler"]) == (7.5, None), "its own levels"
