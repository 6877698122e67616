"""Scripts for stock diffusers draw the same pictures when one of their imports is another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

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
    assert np.array_equal(drawn(before), drawn(after))
