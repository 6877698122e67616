"""A call of stock loading works here as it stands, and nothing is let pass that would be missed.

folders    saved tiny pipelines, "sd" and "xl"; file   the first in one file
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

import ldm_pipeline
from ldm_pipeline import LatentDiffusionPipeline, LatentDiffusionXLPipeline
from ldm_pipeline.errors import UserError
from ldm_pipeline.models.original.convert import to_file
from ldm_pipeline.stock_arguments import OF_OTHER_LOADERS, _say
from tests.models.original.models import pipeline

KINDS: dict[str, tuple[Any, Any]] = {
    "sd": (LatentDiffusionPipeline, StableDiffusionPipeline),
    "xl": (LatentDiffusionXLPipeline, StableDiffusionXLPipeline),
}
USUAL: dict[str, Any] = {
    "add_watermarker": False,
    "custom_pipeline": None,
    "custom_revision": None,
    "disable_mmap": False,
    "load_connected_pipeline": True,
    "low_cpu_mem_usage": True,
    "output_loading_info": False,
    "proxies": None,
    "quantization_config": None,
    "requires_safety_checker": False,
    "resume_download": True,
    "safety_checker": None,
    "torch_dtype": torch.float32,
    "trust_remote_code": False,
    "use_onnx": False,
    "use_safetensors": None,
}
"""What people's scripts say, whatever the model is."""
OF_CODE = ("custom_pipeline", "trust_remote_code")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("folders")
    pipeline("sd1").save_pretrained(place / "sd")
    pipeline("sdxl").save_pretrained(place / "xl")
    return {kind: place / kind for kind in KINDS}


@pytest.fixture(scope="module")
def file(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("file") / "a.safetensors"
    to_file(folders["sd"], made)
    return made


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was warned of since."""
    caplog.set_level(logging.WARNING, logger="ldm_pipeline")
    _say.cache_clear()
    return lambda: [each.getMessage() for each in caplog.records if "ldm_pipeline" in each.name]


@pytest.mark.parametrize("kind", KINDS)
def test_what_scripts_for_stock_say_is_taken_in_silence(
    kind: str, folders: dict[str, Path], said: Callable[[], list[str]]
) -> None:
    ours, stock = (cls.from_pretrained(folders[kind], **USUAL) for cls in KINDS[kind])
    assert all(map(torch.equal, ours.unet.parameters(), stock.unet.parameters()))
    assert said() == []
    plain = KINDS[kind][0].from_pretrained(folders[kind], low_cpu_mem_usage=False)
    assert all(map(torch.equal, ours.unet.parameters(), plain.unet.parameters()))


def test_a_setting_is_heard_where_there_is_one_and_told_of_where_there_is_none(
    folders: dict[str, Path], said: Callable[[], list[str]]
) -> None:
    told: dict[str, Any] = {"force_zeros_for_empty_prompt": False, "requires_safety_checker": True}
    for _ in range(2):
        xl = LatentDiffusionXLPipeline.from_pretrained(folders["xl"], **told)
        sd = LatentDiffusionPipeline.from_pretrained(folders["sd"], **told)
    assert xl.config.force_zeros_for_empty_prompt is False
    assert sd.config.requires_safety_checker is True
    name = "LatentDiffusionXLPipeline"
    assert said() == [f"requires_safety_checker=True does nothing to {name}"], "once"
    kept = LatentDiffusionXLPipeline.from_pretrained(folders["xl"]).config
    assert kept.force_zeros_for_empty_prompt is True, "the folder's own"


def test_a_single_file_takes_them_too(file: Path, said: Callable[[], list[str]]) -> None:
    told: dict[str, Any] = {"local_files_only": True, "token": None, "cache_dir": "x"}
    told |= {k: v for k, v in USUAL.items() if k not in (*OF_OTHER_LOADERS, *OF_CODE)}
    opened = LatentDiffusionPipeline.from_single_file(file, **told)
    again = LatentDiffusionPipeline.from_single_file(file, config="a/b", use_safetensors=True)
    assert all(map(torch.equal, opened.unet.parameters(), again.unet.parameters()))
    assert said() == ["config='a/b' does nothing to LatentDiffusionPipeline"]
    with pytest.raises(UserError, match="use_safetensors=False is refused"):
        LatentDiffusionPipeline.from_single_file(file, use_safetensors=False)
    with pytest.raises(UserError, match="has no use_safetensor; leave it out"):
        LatentDiffusionPipeline.from_single_file(file, use_safetensor=True)


@pytest.mark.parametrize(
    "told",
    [
        {"output_loading_info": True},
        {"proxies": {"https": "somewhere"}},
        {"quantization_config": object()},
        {"use_onnx": True},
    ],
)
def test_what_ours_cannot_do_is_refused_with_the_way_that_there_is(
    told: dict[str, Any], folders: dict[str, Path]
) -> None:
    (name,) = told
    with pytest.raises(UserError, match=rf"{name}=.* is not for LatentDiffusionPipeline: \w+"):
        LatentDiffusionPipeline.from_pretrained(folders["sd"], **told)
    with pytest.raises(UserError, match=rf"{name}=.* is not for LatentDiffusionPipeline: \w+"):
        LatentDiffusionPipeline.from_single_file("model.safetensors", **told)


def test_a_single_file_of_the_hub_is_named_by_its_link(file: Path, tmp_path: Path) -> None:
    """Found where huggingface_hub keeps it, so nothing is fetched here."""
    repository = tmp_path / "models--somebody--model"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    for revision in ("main", "old", "refs/pr/1"):
        (repository / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text("a" * 40)
    for name in ("a.safetensors", "a b.safetensors"):
        (snapshot / name).symlink_to(file)
    told: dict[str, Any] = {"cache_dir": tmp_path, "local_files_only": True, "revision": None}
    here = LatentDiffusionPipeline.from_single_file(file)
    for link in (
        "https://huggingface.co/somebody/model/blob/main/a.safetensors",
        "https://huggingface.co/somebody/model/resolve/old/a.safetensors?download=true",
        "https://huggingface.co/somebody/model/blob/refs%2Fpr%2F1/a%20b.safetensors",
        "https://hf.co/somebody/model/a.safetensors",
        "huggingface.co/somebody/model/blob/main/a.safetensors",
    ):
        opened = LatentDiffusionPipeline.from_single_file(link, **told)
        assert all(map(torch.equal, opened.unet.parameters(), here.unet.parameters()))
    with pytest.raises(UserError, match=r"^b\.safetensors of somebody/model could not be fetched"):
        LatentDiffusionPipeline.from_single_file(
            "https://huggingface.co/somebody/model/blob/main/b.safetensors", **told
        )


@pytest.mark.parametrize(
    "link",
    [
        "https://elsewhere.org/somebody/model/blob/main/a.safetensors",
        "https://huggingface.co/somebody/model/blob/main/a.ckpt",
        "https://huggingface.co/somebody/model/blob/main/../a.safetensors",
        "https://huggingface.co/somebody/model/blob/main/%2e%2e/a.safetensors",
        "https://huggingface.co/somebody/model/blob/..%2Fmain/a.safetensors",
        "https://huggingface.co/somebody/model",
        "somebody/model/a.safetensors",
    ],
)
def test_links_to_elsewhere_and_to_other_files_are_refused(link: str) -> None:
    with pytest.raises(UserError, match=f"^there is no file {re.escape(link)}; name a .safe"):
        LatentDiffusionPipeline.from_single_file(link)


def test_misspelt_ones_and_code_of_others_are_refused(folders: dict[str, Path]) -> None:
    opens: tuple[Callable[..., Any], ...] = (
        LatentDiffusionPipeline.from_pretrained,
        ldm_pipeline.load,
    )
    for opened in opens:
        with pytest.raises(TypeError, match="torch_dtpye"):
            opened(folders["sd"], torch_dtpye=torch.float16)
        with pytest.raises(UserError, match=r"custom_pipeline='lpw' is refused: .*weighted=True"):
            opened(folders["sd"], custom_pipeline="lpw")
        with pytest.raises(UserError, match="trust_remote_code=True is refused: no code"):
            opened(folders["sd"], trust_remote_code=True)
    with pytest.raises(UserError, match="LatentDiffusionXLPipeline has no safety_checker"):
        LatentDiffusionXLPipeline.from_pretrained(folders["xl"], safety_checker="one")
