"""`load` picks the pipeline from what it finds: folders, variants, shards, hub ids, files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

import ldm_pipeline
from ldm_pipeline import LatentDiffusionPipeline, LatentDiffusionXLPipeline
from ldm_pipeline.errors import UserError
from ldm_pipeline.models.original.convert import to_file
from tests.models.original.models import pipeline

Opened = Callable[[Any], Any]


@pytest.fixture(scope="module")
def xl(tiny_xl: Callable[[], Any]) -> Any:
    """A stock SDXL pipeline."""
    return StableDiffusionXLPipeline(**tiny_xl(), add_watermarker=False)


def test_folders_files_and_hub_ids(xl: Any, ours: Any, tmp_path: Path) -> None:
    repository = tmp_path / "models--somebody--large"
    snapshot = repository / "snapshots" / ("a" * 40)
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    xl.save_pretrained(snapshot)
    ours.save_pretrained(tmp_path / "small")
    cache: dict[str, Any] = {"cache_dir": tmp_path, "local_files_only": True}
    for name, told, kind in (
        (snapshot, {}, LatentDiffusionXLPipeline),
        ("somebody/large", cache, LatentDiffusionXLPipeline),
        (tmp_path / "small", {}, LatentDiffusionPipeline),
        (str(tmp_path / "small"), {}, LatentDiffusionPipeline),
    ):
        assert type(ldm_pipeline.load(name, **told)) is kind
    with pytest.raises(UserError, match="offline, and not in the cache"):
        ldm_pipeline.load("somebody/other", **cache)


@pytest.mark.parametrize(
    "saving", [{"variant": "fp16"}, {"max_shard_size": "200KB"}], ids=["variant", "shards"]
)
def test_variants_and_shards(tmp_path: Path, saving: dict[str, Any]) -> None:
    """Loaded as they lie; and one file is made of them, the same as of the plain folder."""
    pipe = pipeline("sd2").to(torch.float16)
    pipe.save_pretrained(tmp_path / "plain")
    pipe.save_pretrained(tmp_path / "other", **saving)
    assert not (tmp_path / "other/unet/diffusion_pytorch_model.safetensors").exists()
    named = ldm_pipeline.load(tmp_path / "other", dtype="bfloat16")
    assert named.unet.dtype == named.text_encoder.dtype == torch.bfloat16
    loaded = ldm_pipeline.load(tmp_path / "other", dtype=torch.float16)
    for name in ("unet", "vae", "text_encoder"):
        wanted = getattr(pipe, name).state_dict()
        found = getattr(loaded, name).state_dict()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    for name in ("plain", "other"):
        to_file(tmp_path / name, tmp_path / f"{name}.safetensors")
    one, other = (tmp_path / f"{name}.safetensors" for name in ("plain", "other"))
    assert one.read_bytes() == other.read_bytes()


def test_parts_in_a_variant_beside_plain_ones(tmp_path: Path) -> None:
    """Each is taken as it is there, by load and by convert."""
    pipe = pipeline("sd2").to(torch.float16)
    pipe.save_pretrained(tmp_path / "plain")
    pipe.save_pretrained(tmp_path / "mixed")
    whole = tmp_path / "mixed/unet/diffusion_pytorch_model.safetensors"
    whole.rename(whole.with_suffix(".fp16.safetensors"))
    loaded = ldm_pipeline.load(tmp_path / "mixed", dtype=torch.float16)
    wanted = pipe.unet.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in loaded.unet.state_dict().items())
    for name in ("plain", "mixed"):
        to_file(tmp_path / name, tmp_path / f"{name}.safetensors")
    one, other = (tmp_path / f"{name}.safetensors" for name in ("plain", "mixed"))
    assert one.read_bytes() == other.read_bytes()


def test_an_automatic_dtype_is_float32_as_stock_has_it(
    ours: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours.save_pretrained(tmp_path)
    assert ldm_pipeline.load(tmp_path, torch_dtype="auto").unet.dtype == torch.float32
    assert "torch_dtype='auto' is float32" in caplog.text


def test_arguments_that_do_not_go_with_what_is_opened(ours: Any, tmp_path: Path) -> None:
    ours.save_pretrained(tmp_path / "folder")
    to_file(tmp_path / "folder", tmp_path / "a.safetensors")
    wrongs: list[tuple[str, dict[str, Any], str]] = [
        ("a.safetensors", {"variant": "fp16"}, "variant is for folders"),
        ("folder", {"tokenizer": tmp_path}, "tokenizer is for single files"),
        ("folder", {"prediction_type": "epsilon"}, "prediction_type is for single files"),
        ("folder", {"dtype": torch.float16, "torch_dtype": torch.float16}, "pass only dtype"),
        ("folder", {"torch_dtype": "bfloat17"}, "^torch_dtype='bfloat17' is not known"),
        ("folder", {"dtype": 16}, "dtype=16 must be one of float32, bfloat16"),
        ("folder", {"dtype": 0}, "dtype=0 must be"),
        ("folder", {"dtype": torch.int8}, "dtype=torch.int8 must be"),
        ("folder", {"dtype": {"unet": "float61"}}, "dtype='float61' is not known"),
        ("a.safetensors", {"dtype": {"unnet": torch.float16}}, "component of dtype='unnet'"),
    ]
    for name, told, message in wrongs:
        with pytest.raises(UserError, match=message):
            ldm_pipeline.load(tmp_path / name, **told)
    ways: list[Opened] = [ldm_pipeline.load, LatentDiffusionPipeline.from_pretrained]
    for opened in [*ways, LatentDiffusionPipeline.from_single_file]:
        for none in (None, 5):
            with pytest.raises(UserError, match=f"={none} must be a name or a path"):
                opened(none)
    for place in ("folder", "a.safetensors"):
        told = {"unet": "float16", "default": "float32"}
        mixed = ldm_pipeline.load(tmp_path / place, dtype=told)
        assert (mixed.unet.dtype, mixed.vae.dtype) == (torch.float16, torch.float32)
