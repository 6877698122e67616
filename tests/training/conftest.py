"""What the training tests share: a CPU, a fresh accelerate in every test, small trained folders.

autoencoder_folder   an exported autoencoder of 8 channels
clip_objective       the contrastive objective of 16 channels
text_folder          its export: text_encoder, tokenizer, clip
captioned            a function that writes a folder of captioned pictures
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_pipeline.data.world import Description, Scene, World
from ldm_pipeline.training import clip
from ldm_pipeline.training.autoencoder import AutoencoderConfig, AutoencoderObjective
from ldm_pipeline.training.clip import ClipConfig, ClipObjective


@pytest.fixture(autouse=True)
def _fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On the CPU, and with no memory of the test before: accelerate's state is global."""
    from accelerate.state import AcceleratorState, GradientState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def _patient_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for the disk: what is flushed, and when, is looked at by name."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def captioned(folder: Path, sizes: Sequence[tuple[int, int]], words: str = "red, blue") -> Path:
    """A new folder of noise of these sizes (width, height): 0.png with 0.txt, `words` and 0, …"""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate(sizes):
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"{words}, {i}")
    return folder


@cache
def told(world: World, index: int) -> tuple[Scene, Description, str]:
    """What a world tells of a sample, thought of once."""
    return World.told(world, index)


class SmallWorld(World):
    """A world of 400 captions: enough words for a tokenizer, told in a moment."""

    def told(self, index: int) -> tuple[Scene, Description, str]:
        """Every sample from 400 on repeats an earlier one."""
        return told(self, index % 400)


@pytest.fixture(scope="session")
def autoencoder_config() -> AutoencoderConfig:
    """Eight channels everywhere, crops of 32 pixels."""
    return AutoencoderConfig.model_validate(
        {
            "run": {"out": "unused", "batch_size": 2},
            "model": {"channels": [8, 8, 8, 8], "norm_groups": 4},
            "crop": 32,
        }
    )


@pytest.fixture(scope="session")
def autoencoder_folder(
    tmp_path_factory: pytest.TempPathFactory, autoencoder_config: AutoencoderConfig
) -> Path:
    """An untrained autoencoder, exported."""
    folder = tmp_path_factory.mktemp("autoencoder")
    AutoencoderObjective(autoencoder_config).export(folder, 0)
    return folder


@pytest.fixture(scope="session")
def clip_objective() -> ClipObjective:
    """Two towers of 16 channels; tests that train it must copy it."""
    config = ClipConfig.model_validate(
        {
            "run": {"out": "unused", "batch_size": 2},
            "model": {
                "text_width": 16,
                "text_layers": 1,
                "vision_width": 16,
                "vision_layers": 1,
                "heads": 2,
                "patch": 32,
                "projection": 16,
            },
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip, "World", SmallWorld)
        objective = ClipObjective(config)
    objective.world = World(config.data.seed)
    return objective


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory, clip_objective: ClipObjective) -> Path:
    """The untrained text encoder and its tokenizer, exported."""
    folder = tmp_path_factory.mktemp("clip")
    clip_objective.export(folder, 0)
    return folder
