"""Steps and guidance that the command takes where nobody names them."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from ldm_pipeline.commands.steps import settle_steps


def settled(model: str, *, lcm: bool | str = False) -> tuple[int, float]:
    args = Namespace(model=model, steps=None, guidance=None, lcm=lcm)
    settle_steps(args)
    return args.steps, args.guidance


@pytest.mark.parametrize(
    ("config", "guidance"),
    [
        ({"cross_attention_dim": 768}, 7.5),
        ({"cross_attention_dim": 1024}, 7.5),
        ({"cross_attention_dim": 2048}, 5.0),
        ({"cross_attention_dim": 1280}, 5.0),
    ],
)
def test_of_a_folder_they_are_its_familys(
    tmp_path: Path, config: dict[str, int], guidance: float
) -> None:
    """As stock pipelines take them; without guidance in few steps, unless the UNet hears it."""
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "A"}))
    file = tmp_path / "unet" / "config.json"
    file.write_text(json.dumps(config))
    assert settled(str(tmp_path)) == (25, guidance)
    assert settled(str(tmp_path), lcm=True) == (4, 1.0)
    file.write_text(json.dumps({**config, "time_cond_proj_dim": 256}))
    assert settled(str(tmp_path), lcm=True) == (4, guidance)
    assert settled(str(tmp_path), lcm="a file") == (4, 1.0)


def test_of_the_bundled_model_they_are_its_own() -> None:
    """Weaker than others'; fewer steps with its adapter."""
    assert settled("bundled") == (25, 3.0)
    assert settled("bundled", lcm=True) == (4, 1.0)
