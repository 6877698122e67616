"""Steps and guidance that the command takes where nobody names them."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from ldm_pipeline.commands.steps import settle_steps
from ldm_pipeline.errors import UserError

UNET = "unet/config.json"
FAMILIES = {
    "StableDiffusionPipeline": (7.5, 7.5),
    "StableDiffusionXLPipeline": (5.0, 7.5),
    "StableDiffusionXLImg2ImgPipeline": (5.0, 7.5),
}
"""What stock pipelines of a folder's class take, and where a part of a picture is painted."""


def settled(model: str, *, lcm: bool | str = False, painting: bool = False) -> tuple[int, float]:
    args = Namespace(model=model, steps=None, guidance=None, sampler=None, lcm=lcm)
    settle_steps(args, painting)
    return args.steps, args.guidance


def write(folder: Path, **files: dict[str, Any]) -> None:
    """The settings of a model, as a folder in Diffusers layout has them."""
    (folder / "unet").mkdir(parents=True, exist_ok=True)
    for name, contents in zip(("model_index.json", UNET), files.values(), strict=True):
        (folder / name).write_text(json.dumps(contents))


@pytest.mark.parametrize("kind", FAMILIES)
def test_of_a_folder_they_are_its_familys(tmp_path: Path, kind: str) -> None:
    """As stock pipelines take them; without guidance in few steps, unless the UNet hears it."""
    drawing, painting = FAMILIES[kind]
    write(tmp_path, index={"_class_name": kind}, unet={"cross_attention_dim": 64})
    assert settled(str(tmp_path)) == (25, drawing)
    assert settled(str(tmp_path), painting=True) == (25, painting)
    assert settled(str(tmp_path), lcm=True, painting=True) == (4, 1.0)
    write(tmp_path, index={"_class_name": kind}, unet={"time_cond_proj_dim": 256})
    assert settled(str(tmp_path), lcm=True) == (4, drawing)
    assert settled(str(tmp_path), lcm=True, painting=True) == (4, painting)
    assert settled(str(tmp_path), lcm="a file") == (4, 1.0)


@pytest.mark.parametrize("kind", FAMILIES)
def test_of_a_hub_model_they_are_the_same_before_it_was_ever_downloaded(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says of itself is fetched first, once, and nothing else of it; offline it is refused,
    unless it is in the cache."""
    snapshot = tmp_path / "models--somebody--model" / "snapshots" / ("a" * 40)
    refs = snapshot.parent.parent / "refs"
    write(tmp_path / "hub", index={"_class_name": kind}, unet={"time_cond_proj_dim": 256})
    asked: list[str] = []

    def download(hub_id: str, name: str) -> str:
        assert hub_id == "somebody/model"
        asked.append(name)
        for file in (snapshot / name, refs / "main"):
            file.parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_bytes((tmp_path / "hub" / name).read_bytes())
        (refs / "main").write_text(snapshot.name)
        return str(snapshot / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="not in the cache: HF_HUB_OFFLINE forbids downloading it"):
        settled("somebody/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    first = settled("somebody/model"), settled("somebody/model", lcm=True)
    assert first == ((25, FAMILIES[kind][0]), (4, FAMILIES[kind][0]))
    assert asked == ["model_index.json", UNET]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert (settled("somebody/model"), settled("somebody/model", lcm=True)) == first
    assert len(asked) == 2


def test_a_hub_model_that_cannot_be_fetched_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(hub_id: str, name: str) -> str:
        raise OSError("no route to the hub\nmore")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"could not be fetched \(no route to the hub\); name a"):
        settled("somebody/model")


def test_of_the_bundled_model_they_are_its_own() -> None:
    """Weaker than others'; fewer steps with its adapter."""
    assert settled("bundled") == (25, 2.0)
    assert settled("bundled", painting=True) == (25, 2.0)
    assert settled("bundled", lcm=True) == (4, 1.0)


NAMED: list[tuple[dict[str, Any], str | None]] = [
    ({}, "lcm"),
    ({"steps": 50}, "lcm"),
    ({"steps": 51}, None),
    ({"guidance": 7.5}, None),
    ({"guidance": 2.0}, None),
    ({"sampler": "ddim"}, "ddim"),
    ({"sampler": "ddim", "guidance": 7.5}, "ddim"),
    ({"image": "picture.png"}, None),
    ({"lcm": True}, None),
    ({"lcm": "a file"}, None),
    ({"model": "another"}, None),
]


@pytest.mark.parametrize(("named", "sampler"), NAMED)
def test_fresh_noise_goes_with_the_bundled_models_own_guidance_alone(
    named: dict[str, Any], sampler: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In as many steps as there are levels for it, and where no picture is begun with."""
    monkeypatch.chdir(tmp_path)
    kind = {"_class_name": "StableDiffusionPipeline"}
    write(Path("another"), index=kind, unet={"cross_attention_dim": 64})
    silent = {"steps": None, "guidance": None, "sampler": None, "lcm": False, "image": None}
    args = Namespace(**silent | {"model": "bundled"} | named)
    settle_steps(args)
    assert args.sampler == sampler
