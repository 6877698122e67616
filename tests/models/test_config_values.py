"""Values that no model can have are refused by load and convert, before anything is built."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import ldm_pipeline
from ldm_pipeline import LatentDiffusionPipeline, LatentDiffusionXLPipeline
from ldm_pipeline.cli import main
from ldm_pipeline.diffusion import prediction
from ldm_pipeline.errors import UserError
from ldm_pipeline.models import config_values
from ldm_pipeline.models.config_values import check_values
from tests.conftest import build, build_xl

CONFIGS = {
    "vae": "vae/config.json",
    "unet": "unet/config.json",
    "scheduler": "scheduler/scheduler_config.json",
}

WRONG: list[tuple[str, str, Any]] = [
    ("vae", "scaling_factor", "big"),
    ("vae", "scaling_factor", 0),
    ("vae", "scaling_factor", math.nan),
    ("vae", "shift_factor", "x"),
    ("vae", "latents_mean", [1, 2]),
    ("vae", "latents_std", [1, 1, 0, 1]),
    ("unet", "sample_size", -16),
    ("unet", "sample_size", "16"),
    ("unet", "sample_size", 10**7),
    ("unet", "sample_size", [8, 0]),
    ("unet", "in_channels", 10**30),
    ("unet", "out_channels", "4"),
    ("unet", "norm_eps", "nan"),
    ("vae", "latent_channels", 0),
    ("scheduler", "num_train_timesteps", 0),
    ("scheduler", "trained_betas", []),
    ("scheduler", "trained_betas", [0.1, "x"]),
    ("scheduler", "num_train_timesteps", 10**12),
    ("scheduler", "num_train_timesteps", True),
    ("scheduler", "beta_end", math.nan),
    ("scheduler", "steps_offset", 900_000),
    ("scheduler", "prediction_type", "flow_prediction"),
    ("scheduler", "prediction_type", ["epsilon"]),
    ("scheduler", "timestep_spacing", "trailin"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each family."""
    place = tmp_path_factory.mktemp("families")
    LatentDiffusionPipeline(**build()).save_pretrained(place / "sd")
    LatentDiffusionXLPipeline(**build_xl(), add_watermarker=False).save_pretrained(place / "xl")
    return {"sd": place / "sd", "xl": place / "xl"}


def edited(folder: Path, file: str, new: Path, **entries: Any) -> Path:
    """A copy of `folder`, by links, with other entries in one of its files of JSON."""
    for each in folder.rglob("*"):
        if each.is_file():
            there = new / each.relative_to(folder)
            there.parent.mkdir(parents=True, exist_ok=True)
            there.hardlink_to(each)
    contents = json.loads((new / file).read_text())
    (new / file).unlink()
    (new / file).write_text(json.dumps({**contents, **entries}))
    return new


@pytest.mark.parametrize(("component", "key", "value"), WRONG)
def test_a_value_that_none_has_is_refused(
    component: str, key: str, value: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    bad = edited(folders["sd"], CONFIGS[component], tmp_path / "bad", **{key: value})
    with pytest.raises(UserError, match=rf"/{CONFIGS[component]} says {key}=.* must be ") as caught:
        ldm_pipeline.load(bad)
    assert "\n" not in str(caught.value)
    assert main(["convert", str(bad), str(tmp_path / "bad.safetensors")]) == 2
    assert not (tmp_path / "bad.safetensors").exists()


def test_what_networks_answer_is_told_once_without_torch() -> None:
    assert config_values.PREDICTION_TYPES == prediction.PREDICTION_TYPES


def test_what_models_have_is_let() -> None:
    """And what they do not say."""
    known: dict[str, dict[str, Any]] = {
        "vae": {"scaling_factor": 1, "shift_factor": -0.1, "latents_mean": [0.0] * 4},
        "unet": {"sample_size": [96, 64]},
        "scheduler": {"trained_betas": [0.1, 0.2], "beta_end": 0.012},
        "text_encoder": {"anything": "else"},
    }
    for component, config in known.items():
        check_values("here", component, config)
        check_values("here", component, dict.fromkeys(config))
        check_values("here", component, {})


@pytest.mark.parametrize(
    ("family", "other", "said"),
    [("sd", "xl", "a UNet that is SDXL's"), ("xl", "sd", "a UNet that is not SDXL's")],
)
def test_a_unet_of_another_family_is_refused(
    family: str, other: str, said: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    config = json.loads((folders[other] / "unet/config.json").read_text())
    told = {"addition_embed_type": config["addition_embed_type"]}
    bad = edited(folders[family], "unet/config.json", tmp_path / "bad", **told)
    with pytest.raises(UserError, match=f"^{bad} holds {said}"):
        ldm_pipeline.load(bad)
    assert main(["convert", str(bad), str(tmp_path / "bad.safetensors")]) == 2


def test_half_of_sdxl_is_no_model(folders: dict[str, Path], tmp_path: Path) -> None:
    none = {"text_encoder_2": [None, None], "tokenizer_2": [None, None]}
    bad = edited(folders["xl"], "model_index.json", tmp_path / "bad", **none)
    with pytest.raises(UserError, match="lacks SDXL's text_encoder_2"):
        ldm_pipeline.load(bad)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"model_max_length": 0}, "says model_max_length=0; it must be a whole number from 3 to"),
        ({"model_max_length": 2}, "says model_max_length=2"),
        ({"model_max_length": 300}, "says model_max_length=300"),
        ({"model_max_length": "77"}, "says model_max_length='77'"),
        ({"model_max_length": 10**30}, "does not say how many tokens are read"),
        ({"pad_token": "<nonexistent>"}, "fills texts up with '<nonexistent>'"),
    ],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_tokenizer_that_gives_what_nobody_reads_is_refused(
    entries: dict[str, Any], said: str, weighted: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    file = "tokenizer/tokenizer_config.json"
    pipe = ldm_pipeline.load(edited(folders["sd"], file, tmp_path / "bad", **entries))
    with pytest.raises(UserError, match=said):
        pipe("a star", num_inference_steps=1, weighted=weighted)


def test_weights_of_other_shapes_are_told_of(folders: dict[str, Path], tmp_path: Path) -> None:
    vocabulary = {"max_position_embeddings": 40}
    bad = edited(folders["sd"], "text_encoder/config.json", tmp_path / "bad", **vocabulary)
    with pytest.raises(UserError, match=r"weights of other shapes than its config\.json says"):
        ldm_pipeline.load(bad)


@pytest.mark.parametrize("family", ["sd", "xl"])
def test_a_callback_may_ask_for_all_that_a_pipeline_names(
    family: str, folders: dict[str, Path]
) -> None:
    """As stock's, whose list is that of its one task: without painting there is no mask."""
    handed: list[list[str]] = []

    def callback(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        handed.append(list(tensors))
        return tensors

    pipe: Any = ldm_pipeline.load(folders[family])
    every = pipe._callback_tensor_inputs

    def draw(names: list[str]) -> None:
        pipe(
            "a star",
            num_inference_steps=1,
            height=32,
            width=32,
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=names,
        )

    draw(every)
    assert handed == [[name for name in every if "mask" not in name]]
    with pytest.raises(UserError, match="'mask'"):
        draw(["latents", "mask"])
