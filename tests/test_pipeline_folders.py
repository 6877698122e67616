"""Citizenship: folders, `from_pipe`, and the parts that stock pipelines and ours exchange."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

import ldm_pipeline
from ldm_pipeline import LatentDiffusionPipeline, LatentDiffusionXLPipeline
from ldm_pipeline.errors import UserError
from ldm_pipeline.models import bundled, folders
from tests.models.original.models import pipeline


def picture(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    drawn = pipe("a red star", num_inference_steps=3, generator=generator, output_type="pt")
    images: torch.Tensor = drawn.images
    return images


@pytest.fixture
def saved(ours: Any, tmp_path: Path) -> Path:
    """A folder that our pipeline wrote."""
    ours.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_our_folder_loads_in_stock_diffusers(ours: Any, saved: Path) -> None:
    """By the general loader too, which looks the class name up in diffusers."""
    contents = json.loads((saved / "model_index.json").read_text())
    assert contents["_class_name"] == "StableDiffusionPipeline"
    assert not list(saved.rglob("*.bin"))
    expected = picture(ours)
    for loader in (DiffusionPipeline, StableDiffusionPipeline):
        loaded = loader.from_pretrained(saved)
        assert type(loaded) is StableDiffusionPipeline
        assert torch.equal(picture(loaded), expected)


def test_stock_folder_loads_here(stock: Any, tmp_path: Path) -> None:
    stock.save_pretrained(tmp_path)
    expected = picture(stock)
    for loaded in (
        LatentDiffusionPipeline.from_pretrained(tmp_path),
        ldm_pipeline.load(tmp_path),
        ldm_pipeline.load(str(tmp_path)),
    ):
        assert type(loaded) is LatentDiffusionPipeline
        assert torch.equal(picture(loaded), expected)


def test_saved_twice_is_the_same(ours: Any, saved: Path, tmp_path: Path) -> None:
    """Load and save again: the same files, byte for byte."""
    again = tmp_path / "again"
    LatentDiffusionPipeline.from_pretrained(saved).save_pretrained(again)
    names = {file.relative_to(saved) for file in saved.rglob("*") if file.is_file()}
    assert names == {file.relative_to(again) for file in again.rglob("*") if file.is_file()}
    for name in names:
        if name.suffix == ".safetensors":
            assert (saved / name).read_bytes() == (again / name).read_bytes()


@pytest.mark.parametrize("old", [{"steps_offset": 0}, {"clip_sample": True}], ids=str)
def test_old_scheduler_configs(
    tiny: Callable[..., Any], tmp_path: Path, old: dict[str, Any]
) -> None:
    """A config that stock pipelines correct draws one picture here and there."""
    parts = tiny()
    parts["scheduler"].register_to_config(**old)
    StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(tmp_path)
    config = tmp_path / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **old}))
    ours = picture(LatentDiffusionPipeline.from_pretrained(tmp_path))
    assert torch.equal(ours, picture(StableDiffusionPipeline.from_pretrained(tmp_path)))


def test_from_pipe_both_ways(ours: Any, stock: Any) -> None:
    expected = picture(stock)
    from_stock = LatentDiffusionPipeline.from_pipe(stock)
    assert torch.equal(picture(from_stock), expected)
    back = StableDiffusionPipeline.from_pipe(from_stock)
    assert torch.equal(picture(back), expected)
    img2img = StableDiffusionImg2ImgPipeline.from_pipe(ours)
    assert img2img.unet is ours.unet


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_pipeline_over_the_parts_of_another_family_does_not_draw(kind: str) -> None:
    classes: dict[str, Any] = {"sd1": LatentDiffusionPipeline, "sdxl": LatentDiffusionXLPipeline}
    pipe = pipeline(kind)
    of_kind = classes.pop(kind)
    (of_other,) = classes.values()
    with pytest.raises(UserError, match=f"SDXL's; .* or use {of_kind.__name__}$"):
        of_other.from_pipe(pipe)("a star", height=32, width=32, num_inference_steps=1)


def test_what_is_no_pipeline_folder_or_component(ours: Any, saved: Path, tmp_path: Path) -> None:
    for wrong in (5, "bundled"):
        with pytest.raises(UserError, match="must be a pipeline that is loaded"):
            LatentDiffusionPipeline.from_pipe(wrong)
    with pytest.raises(UserError, match=r"component of dtype='vea' .*did you mean 'vae'"):
        LatentDiffusionPipeline.from_pretrained(saved, dtype={"vea": "float16"})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"save_directory=.* must be a folder"):
        ours.save_pretrained(tmp_path / "file")
    for opens in (ours.save_pretrained, ldm_pipeline.load):
        with pytest.raises(UserError, match="='' must be a name or a path"):
            opens("")


def test_components_are_the_constructor_s_names(ours: Any) -> None:
    names = {"vae", "text_encoder", "tokenizer", "unet", "scheduler"}
    optional = {"safety_checker", "feature_extractor", "image_encoder"}
    assert set(ours.components) == names | optional
    assert all(ours.components[name] is None for name in optional)
    again = LatentDiffusionPipeline(**ours.components, **ours.parameters)
    assert torch.equal(picture(again), picture(ours))


def test_a_pipeline_can_be_copied(ours: Any) -> None:
    """Also after a run: nothing of it stays on the object."""
    before = set(vars(ours))
    expected = picture(ours)
    assert set(vars(ours)) - before <= {"_progress_bar_config"}
    assert torch.equal(picture(copy.deepcopy(ours)), expected)


def test_components_may_be_passed(ours: Any, saved: Path) -> None:
    from diffusers import EulerDiscreteScheduler

    euler = EulerDiscreteScheduler.from_config(ours.scheduler.config)
    loaded = LatentDiffusionPipeline.from_pretrained(saved, scheduler=euler, unet=ours.unet)
    assert loaded.scheduler is euler
    assert loaded.unet is ours.unet


def test_half_precision_files_are_read_as_float32(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundled model's case, for plain file names and for those of a variant."""
    half = LatentDiffusionPipeline(**tiny()).to(torch.float16)
    for variant in (None, "fp16"):
        folder = tmp_path / str(variant)
        half.save_pretrained(folder, variant=variant)
        monkeypatch.setattr(bundled, "ASSETS", folder)
        for pipe in (LatentDiffusionPipeline.bundled(), ldm_pipeline.load()):
            assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
            assert torch.equal(pipe.unet.conv_in.weight, half.unet.conv_in.weight.float())
    kept = LatentDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16)
    assert kept.unet.dtype == kept.text_encoder.dtype == torch.float16


def test_no_bundled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "ASSETS", tmp_path)
    with pytest.raises(UserError, match="no bundled model"):
        LatentDiffusionPipeline.bundled()


def test_pickles_are_refused(saved: Path) -> None:
    weights = next((saved / "unet").glob("*.safetensors"))
    (saved / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"no matter")
    LatentDiffusionPipeline.from_pretrained(saved)  # a pickle beside safetensors is left alone
    weights.unlink()
    with pytest.raises(UserError, match="only pickled weights"):
        LatentDiffusionPipeline.from_pretrained(saved)


def test_code_in_a_folder_is_refused(saved: Path) -> None:
    index = saved / "model_index.json"
    contents = json.loads(index.read_text())
    (saved / "evil.py").write_text("raise SystemExit('ran')")
    index.write_text(json.dumps({**contents, "_class_name": ["evil", "Evil"]}))
    with pytest.raises(UserError, match="its own pipeline code"):
        LatentDiffusionPipeline.from_pretrained(saved)
    with pytest.raises(UserError, match="custom_pipeline='evil' is refused"):
        LatentDiffusionPipeline.from_pretrained(saved, custom_pipeline="evil")


def test_wrong_folders(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no model_index\.json"):
        LatentDiffusionPipeline.from_pretrained(tmp_path)
    for name in ("nobody/no-such-model", "nosuchfolder", "no such/folder"):
        with pytest.raises(UserError, match=f"^there is no model folder {name}, and as a hub id"):
            ldm_pipeline.load(name)
    index = saved / "model_index.json"
    contents = json.loads(index.read_text())
    index.write_text(json.dumps({**contents, "text_encoder_2": ["transformers", "CLIPTextModel"]}))
    with pytest.raises(UserError, match="'text_encoder_2', which this pipeline has not"):
        LatentDiffusionPipeline.from_pretrained(saved)
    with pytest.raises(UserError, match="'text_encoder_2' but has no such folder"):
        ldm_pipeline.load(saved)
    index.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        ldm_pipeline.load(saved)


def test_a_hub_model_is_read_from_the_cache(ours: Any, saved: Path, tmp_path: Path) -> None:
    """Offline, a hub id is found where huggingface_hub keeps it, and checked like a folder."""
    repository = tmp_path / "cache" / "models--somebody--model"
    snapshot = repository / "snapshots" / ("a" * 40)
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(saved, snapshot)
    cache: dict[str, Any] = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    loaded = LatentDiffusionPipeline.from_pretrained("somebody/model", **cache)
    assert loaded.name_or_path == "somebody/model"
    assert torch.equal(picture(loaded), picture(ours))
    weights = next((snapshot / "vae").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UserError, match="only pickled weights"):
        LatentDiffusionPipeline.from_pretrained("somebody/model", **cache)


def test_arguments_of_stock_loading(saved: Path) -> None:
    loaded = LatentDiffusionPipeline.from_pretrained(
        saved, safety_checker=None, requires_safety_checker=False, use_safetensors=True
    )
    assert loaded.unet.dtype == torch.float32
    for name in ("dtype", "torch_dtype"):
        half = LatentDiffusionPipeline.from_pretrained(
            saved, **dict[str, Any]({name: torch.bfloat16})
        )
        assert half.unet.dtype == half.text_encoder.dtype == torch.bfloat16
    wrongs: list[dict[str, Any]] = [
        {"use_safetensors": False},
        {"dtype": torch.float16, "torch_dtype": torch.float16},
        {"variant": "fp16"},
    ]
    for wrong in wrongs:
        with pytest.raises(UserError):
            LatentDiffusionPipeline.from_pretrained(saved, **wrong)


def test_a_missing_component_is_named(saved: Path) -> None:
    for file in (saved / "vae").iterdir():
        file.unlink()
    (saved / "vae").rmdir()
    with pytest.raises(UserError, match="'vae' but has no such folder"):
        LatentDiffusionPipeline.from_pretrained(saved)


def test_variants(tmp_path: Path) -> None:
    for name, files, variant in (
        ("plain", ["a.safetensors", "b.safetensors"], None),
        ("half", ["a.fp16.safetensors", "b.fp16.safetensors"], "fp16"),
        ("shards", ["a.fp16-00001-of-00002.safetensors"], "fp16"),
        ("mixed", ["a.fp16.safetensors", "a.safetensors"], None),
        ("none", [], None),
    ):
        (tmp_path / name / "unet").mkdir(parents=True)
        for file in files:
            (tmp_path / name / "unet" / file).touch()
        assert folders.only_variant(tmp_path / name) == variant
        one = folders.weight_files(tmp_path / name / "unet")
        wanted = [file for file in files if folders.variant_of(Path(file)) == (variant or "")]
        assert [path.name for path in one] == wanted
    (tmp_path / "half/unet/a.ema.safetensors").touch()
    one = folders.weight_files(tmp_path / "half/unet")
    assert [path.name for path in one] == ["a.ema.safetensors"], "nothing is counted twice"
