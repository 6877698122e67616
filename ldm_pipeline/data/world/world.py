"""The world as an endless, randomly accessible set of samples, and as an ordinary image folder.

Legend: a sample is fixed by (seed, split, index) alone, in any process and any order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from ldm_pipeline.data.world.captions import Description, describe, held_out_caption, phrase
from ldm_pipeline.data.world.render import masks, render
from ldm_pipeline.data.world.scene import HELD_OUT_PAIRS, Scene, held_out_pair, pick, sample_scene
from ldm_pipeline.errors import UserError, choose
from ldm_pipeline.replacing import replacing

SPLITS = ("train", "test", "unseen pairs")
_CASES_WITH_A_PAIR = ("single", "single", "related pair", "related pair", "pair", "count")


@dataclass(frozen=True)
class Sample:
    """One picture (uint8 [128, 128, 3]), its caption, what the caption claims, and the truth."""

    picture: np.ndarray = field(repr=False, compare=False)
    caption: str
    description: Description
    scene: Scene
    index: int

    @cached_property
    def masks(self) -> np.ndarray:
        """The pixels that each thing covers, bool [n, 128, 128]."""
        return masks(self.scene)


@dataclass(frozen=True)
class World:
    """Samples by index, from 0 without end.

    "train" shows no held-out pair and says no held-out caption; "test" says only held-out captions
    and shows no held-out pair; every scene of "unseen pairs" shows a held-out pair.
    """

    seed: int = 0
    split: str = "train"

    def __post_init__(self) -> None:
        choose("split", self.split, SPLITS)
        if self.seed < 0:
            raise UserError(f"seed={self.seed} must be 0 or more")

    def __getitem__(self, index: int) -> Sample:
        if index < 0:
            raise IndexError(f"index={index} must be 0 or more: the world has no end")
        scene, description, caption = self.told(index)
        return Sample(render(scene), caption, description, scene, index)

    def told(self, index: int) -> tuple[Scene, Description, str]:
        """The scene, the claims and the caption of a sample, without drawing its picture."""
        rng = self._rng(index)
        while True:
            scene = self._scene(rng)
            worded = caption_of(scene, rng, self._held_out)
            if worded is not None:
                return scene, *worded

    @property
    def _held_out(self) -> bool | None:
        return {"train": False, "test": True}.get(self.split)

    def _rng(self, index: int) -> np.random.Generator:
        key = np.random.SeedSequence([self.seed, SPLITS.index(self.split), index])
        return np.random.Generator(np.random.Philox(key))

    def _scene(self, rng: np.random.Generator) -> Scene:
        if self.split == "unseen pairs":
            return sample_scene(rng, case=pick(rng, _CASES_WITH_A_PAIR),
                                first=pick(rng, HELD_OUT_PAIRS))  # fmt: skip
        return sample_scene(rng, allowed=lambda kind, colour: not held_out_pair(kind, colour))


def caption_of(
    scene: Scene, rng: np.random.Generator, held_out: bool | None = None
) -> tuple[Description, str] | None:
    """A description and caption of a scene: one of the held-out captions where `held_out` is True,
    none of them where False, either where None. None where many tries found no such caption."""
    for _ in range(200):
        description = describe(scene, rng)
        caption = phrase(description, rng)
        if held_out is None or held_out_caption(caption) == held_out:
            return description, caption
    return None


def write_folder(out: str | Path, n: int, seed: int = 0, split: str = "train") -> Path:
    """Writes `n` samples as an image folder: 000000.png … and `metadata.jsonl`, whose lines hold
    "file_name", "text" and the truth as "scene". Returns the folder. Raises `UserError` for n < 1.
    """
    if n < 1:
        raise UserError(f"n={n} must be 1 or more")
    world = World(seed, split)
    return write_samples(out, (world[index] for index in range(n)), n)


def write_samples(
    out: str | Path, samples: Iterable[Sample], n: int, about: Mapping[str, str] | None = None
) -> Path:
    """Writes `n` samples as an image folder, each line of metadata.jsonl with what is `about`.

    The folder appears whole or not at all. Raises `UserError` where it cannot be written.
    """
    folder = Path(out)
    width = max(6, len(str(n - 1)))
    with replacing(folder) as temporary:
        temporary.mkdir(parents=True)
        with (temporary / "metadata.jsonl").open("w", encoding="utf-8") as lines:
            for number, sample in enumerate(samples):
                name = f"{number:0{width}d}.png"
                Image.fromarray(sample.picture).save(temporary / name)
                record = {"file_name": name, "text": sample.caption, "scene": asdict(sample.scene)}
                lines.write(json.dumps({**record, **(about or {})}) + "\n")
    return folder
