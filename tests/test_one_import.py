"""Scripts for stock diffusers draw the same pictures when one of their imports is another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import ldm_pipeline
from ldm_pipeline import LatentDiffusionPipeline, LatentDiffusionXLPipeline
from ldm_pipeline.errors import UserError
from tests.conftest import build, build_xl
from tests.models.original.models import pipeline
from tests.parity.pairs import mask, picture

OURS = {"": "LatentDiffusionPipeline", "XL": "LatentDiffusionXLPipeline"}

OPEN = """
import torch
from PIL import Image
from diffusers import EulerAncestralDiscreteScheduler
{line}

pipe = {name}.from_pretrained(
    "model", torch_dtype=torch.float32, use_safetensors=True, {setting}
)
pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
pipe = pipe.to("cpu")
pipe.enable_attention_slicing("max")
pipe.vae.enable_tiling()
pipe.set_progress_bar_config(disable=True)
generator = torch.Generator("cpu").manual_seed(33)
"""
TASKS = {
    "": """
image = pipe(
    "a red star", negative_prompt="fog", height=32, width=32, num_inference_steps=4,
    guidance_scale=6.5, generator=generator,
).images[0]
""",
    "Img2Img": """
init = Image.open("init.png").convert("RGB")
image = pipe(
    prompt="a red star", image=init, strength=0.75, num_inference_steps=4, guidance_scale=7.5,
    generator=generator,
).images[0]
""",
    "Inpaint": """
init, hole = Image.open("init.png").convert("RGB"), Image.open("hole.png")
image = pipe(
    prompt="a red star", image=init, mask_image=hole, height=32, width=32, num_inference_steps=4,
    strength=0.9, generator=generator,
).images[0]
""",
}
UNNAMED = {
    "Img2Img": """
image = pipe(
    "a red star", {second} init, 0.75, 4, None, None, guidance_scale=7.5, generator=generator,
).images[0]
""",
    "Inpaint": """
image = pipe(
    "a red star", {second} init, hole, None, 32, 32, None, 0.9, num_inference_steps=4,
    generator=generator,
).images[0]
""",
}
"""The same without names; SDXL has a second text in the second place."""


def drawn(script: str) -> Any:
    told: dict[str, Any] = {}
    exec(compile(script, "script.py", "exec"), told)
    assert isinstance(told["image"], Image.Image)
    return np.asarray(told["image"])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", OURS)
def test_one_import_is_changed_and_nothing_else(
    family: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline("sdxl" if family else "sd1").save_pretrained("model")
    picture(32, 32).save("init.png")
    mask(32, 32).save("hole.png")
    name = f"StableDiffusion{family}{task}Pipeline"
    setting = "add_watermarker=False" if family else "safety_checker=None"
    before, after = (
        OPEN.format(line=line, name=name, setting=setting) + TASKS[task]
        for line in (
            f"from diffusers import {name}",
            f"from ldm_pipeline import {OURS[family]} as {name}",
        )
    )
    wanted = drawn(before)
    assert np.array_equal(wanted, drawn(after))
    if task in UNNAMED:
        opening = after.partition("\nimage = ")[0]
        unnamed = UNNAMED[task].format(second="None," if family else "")
        assert np.array_equal(wanted, drawn(opening + unnamed))


def test_what_is_said_twice_or_is_no_picture_is_a_mistake() -> None:
    sd: Any = LatentDiffusionPipeline(**build())
    xl: Any = LatentDiffusionXLPipeline(**build_xl())
    seen = picture(32, 32)
    with pytest.raises(TypeError, match="multiple values for keyword argument 'image'"):
        sd("a red star", seen, image=seen)
    with pytest.raises(TypeError, match="multiple values for keyword argument 'strength'"):
        sd("a red star", seen, 0.5, strength=0.5)
    with pytest.raises(UserError, match=r"height=0\.5 must be a whole number"):
        sd("a red star", 0.5)
    with pytest.raises(UserError, match=r"height='init\.png' must be a whole number"):
        sd("a red star", "init.png")
    for given in (seen, torch.zeros(1, 3, 32, 32)):
        with pytest.raises(UserError, match=r"prompt_2=.* must be a text") as refusal:
            xl("a red star", given)
        assert "\n" not in str(refusal.value)


def test_attributes_that_scripts_for_stock_read() -> None:
    pipe = LatentDiffusionXLPipeline(**build_xl(), add_watermarker=False)
    assert pipe.default_sample_size == pipe.unet.config.sample_size
    assert pipe.vae_scale_factor == 2 ** (len(pipe.vae.config.block_out_channels) - 1)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("family", ["", "XL"])
def test_an_older_callback_is_called_as_stock_calls_it(family: str, every: int) -> None:
    """Deprecated there, and still heard."""
    parts: dict[str, Any] = build_xl() if family else build()
    named = {"add_watermarker": False} if family else {}
    heard: list[list[tuple[int, float, torch.Tensor]]] = []
    stock_class = getattr(diffusers, f"StableDiffusion{family}Pipeline")
    for kind in (stock_class, getattr(ldm_pipeline, OURS[family])):
        told: list[tuple[int, float, torch.Tensor]] = []

        def callback(step: int, t: Any, latents: torch.Tensor, told: Any = told) -> None:
            told.append((step, float(t), latents.clone()))

        kind(**parts, **named)(
            "a star",
            num_inference_steps=4,
            height=32,
            width=32,
            generator=torch.Generator().manual_seed(1),
            callback=callback,
            callback_steps=every,
        )
        heard.append(told)
    stock, ours = heard
    assert [each[:2] for each in ours] == [each[:2] for each in stock]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(ours, stock, strict=True))
    assert len(ours) == 4 // every


@pytest.mark.parametrize(
    "told",
    [
        {"callback": 5},
        {"callback": print, "callback_steps": 0},
        {"callback": print, "callback_on_step_end": print},
    ],
)
def test_an_older_callback_that_cannot_be_called_is_refused(told: dict[str, Any]) -> None:
    pipe: Any = LatentDiffusionPipeline(**build())
    with pytest.raises(UserError, match="callback"):
        pipe("a star", num_inference_steps=1, **told)
