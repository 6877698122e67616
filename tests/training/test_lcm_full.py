"""A full LCM: a whole UNet that hears the guidance, distilled beside its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, LatentConsistencyModelPipeline, StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor

import ldm_pipeline
from ldm_pipeline import LatentDiffusionPipeline
from ldm_pipeline.errors import UserError
from ldm_pipeline.loading import dtype_argument
from ldm_pipeline.training.config import validated
from ldm_pipeline.training.engine import fit
from ldm_pipeline.training.lcm import LcmConfig
from ldm_pipeline.training.lcm_full import FullLcmObjective, distillation
from tests.conftest import build
from tests.training import laws
from tests.training.test_lcm_objective import config_of as config_of_lcm
from tests.training.tiny_lora import open_model

FLOAT: dict[str, Any] = dtype_argument(torch.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four captioned pictures."""
    place = tmp_path / "pictures"
    place.mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text(f"red, {i}")
    return place


def config_of(folder: Path, model: str = "bundled", **lcm: Any) -> LcmConfig:
    told = {"full": True, "w_channels": 8, "original_steps": 40, "timestep_scaling": 5.0, **lcm}
    values = {**config_of_lcm(folder).model_dump(), "model": model, "lora": {}, "lcm": told}
    return LcmConfig.model_validate(values)


def built(config: LcmConfig) -> FullLcmObjective:
    objective = distillation(config, open_model)
    assert isinstance(objective, FullLcmObjective)
    return objective


def said(objective: FullLcmObjective, unet: Any, w: float) -> Tensor:
    """What a UNet of the objective answers to one sample, told w."""
    (group,) = objective.batch(range(1))["groups"]
    told = {**group, "w": torch.tensor([w])}
    with torch.no_grad():
        return objective.conditioning.network(unet, told)(group["z"], group["t"])


@pytest.mark.parametrize("model", ["bundled", "xl"])
def test_it_begins_as_the_teacher_and_learns_to_hear(folder: Path, model: str) -> None:
    """The teacher never changes, and all of the student is trained."""
    config = config_of(folder, model)
    objective = built(config)
    laws.everything_trained_has_a_gradient(objective)
    teacher = said(objective, objective.unet, 2.0)
    for w in (2.0, 9.0):
        assert torch.equal(said(objective, objective.student, w), teacher)
    trained = {name for name, p in objective.named_parameters() if p.requires_grad}
    assert trained == {f"student.{name}" for name, _ in objective.student.named_parameters()}
    fit(objective, config)
    assert torch.equal(said(objective, objective.unet, 2.0), teacher)
    weak, strong = (said(objective, objective.student, w) for w in (2.0, 9.0))
    assert not torch.equal(weak, teacher)
    assert not torch.equal(weak, strong)


@pytest.mark.parametrize("own", [0.0, 0.5])
def test_under_autocast_the_gradient_is_the_student_s(folder: Path, own: float) -> None:
    """Autocast keeps copies of weights: it must not take those that the target made."""
    objective = built(config_of(folder, own_pictures=own))
    gradients = []
    for half in (False, True):
        objective.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses = objective(objective.batch(range(2)))
        losses["loss"].backward()
        found = [p.grad for p in objective.student.parameters()]
        assert all(g is not None for g in found)
        gradients.append(torch.cat([g.flatten() for g in found if g is not None]))
    assert torch.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.9  # bf16 has 8 bits


def drawn(pipe: Any, **told: Any) -> Tensor:
    """A picture in three steps, as the guidance of 6 draws it."""
    pipe.set_progress_bar_config(disable=True)
    chosen = {"num_inference_steps": 3, "guidance_scale": 6.0, "height": 64, "width": 64, **told}
    generator = torch.Generator().manual_seed(0)
    pictures: Tensor = pipe("red", generator=generator, output_type="pt", **chosen).images
    return pictures


def test_stock_diffusers_and_ours_draw_what_was_distilled(folder: Path) -> None:
    """Both from the folder alone, bit for bit; `lcm=True` on the levels of the training."""
    shown = config_of(folder).model_dump() | {"pictures": {"prompts": ["red"], "steps": 1}}
    objective = built(LcmConfig.model_validate(shown))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a student that has learnt much
        for value in objective.student.parameters():
            value.add_(0.05 * torch.randn(value.shape, generator=generator))
    final = folder.parent / "out"
    objective.export(final, 0)
    assert (final / "pictures.png").is_file()
    stock, ours = DiffusionPipeline.from_pretrained(final, **FLOAT), ldm_pipeline.load(final)
    assert type(stock) is LatentConsistencyModelPipeline
    assert type(ours) is LatentDiffusionPipeline
    told = (ours.scheduler.config.original_inference_steps, ours.scheduler.config.timestep_scaling)
    assert told == (40, 5.0)
    theirs = drawn(stock)
    assert torch.equal(drawn(ours), theirs)
    # Ours has LCM's equation of its own; the same float32 numbers in another order, divided by
    # alpha, 0.07 at the first level.
    assert (drawn(ours, lcm=True) - theirs).abs().max() <= 1e-3
    assert not torch.allclose(drawn(ours, guidance_scale=2.0), theirs, atol=1e-3)
    trained = {name: value.half() for name, value in objective.student.state_dict().items()}
    for name, value in ours.unet.state_dict().items():
        assert torch.equal(value.half(), trained[name]), name
    assert "--lcm --steps 4 --guidance 11" in (final / "README.md").read_text("utf-8")


def test_sdxl_s_folder_is_opened_by_both(folder: Path) -> None:
    config = config_of(folder, "xl")
    objective = built(config)
    objective.export(folder.parent / "out", 0)
    place = folder.parent / "out"
    stock = StableDiffusionXLPipeline.from_pretrained(place, add_watermarker=False, **FLOAT)
    ours = ldm_pipeline.load(place)
    assert torch.equal(drawn(ours), drawn(stock))


def test_mistakes_are_named(folder: Path) -> None:
    told = config_of(folder).model_dump()
    for change, words in (
        ({"lora": {"rank": 4}}, "trains a whole UNet, no adapter; leave lora out"),
        ({"lcm": {"w_channels": 2}}, "w_channels=2 must be at least 4"),
    ):
        with pytest.raises(UserError, match=words):
            validated(LcmConfig, {**told, **change}, "some.yaml")

    def hearing_already(source: str, dtype: torch.dtype) -> Any:
        return LatentDiffusionPipeline(**build(time_cond_proj_dim=8)).to(dtype)

    with pytest.raises(UserError, match="is a full LCM already"):
        distillation(config_of(folder), hearing_already)


def test_begin_from_goes_on_where_another_run_ended(folder: Path) -> None:
    config = config_of(folder)
    final = fit(built(config), config)
    again = built(config.model_copy(update={"begin_from": final}))
    heard = again.student.time_embedding.cond_proj.weight
    assert heard.any(), "a new student hears nothing at first"
