"""How good a model of the picture world is: it draws, the judge reads, shares are counted.

Prompts come from the world's "test" split (captions that no training ever shows) and from "unseen
pairs" (kinds in colours that no training ever shows).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ldm_pipeline.data.world import Description, Sample, Scene, World
from ldm_pipeline.evaluation.judge import Reading, Verdict, agrees, read
from ldm_pipeline.evaluation.metrics import Share
from ldm_pipeline.grid import captioned_grid
from ldm_pipeline.images import psnr, to_pictures, to_tensor
from ldm_pipeline.models import autoencoder

READ_BACK = "scene read from its reconstruction"
AIMS = {
    "one thing: kind and colour": 0.95,
    "background": 0.95,
    "two things, each with its colour": 0.85,
    "relation of two things": 0.85,
    "count, 1 to 4": 0.70,
    "pairs never seen in training": 0.80,
    "caption among 100, half of them hard": 0.90,
    READ_BACK: 0.97,
}
"""What a good model of the world reaches; the autoencoder's is `PSNR_AIM`."""
PSNR_AIM = 30.0
UNSEEN_SHARE = 0.4
RECONSTRUCTED = 500
GRID = 36


@dataclass(frozen=True)
class Drawn:
    """One prompt, what was drawn for it, and what the judge says."""

    prompt: str
    description: Description
    picture: np.ndarray = field(repr=False, compare=False)
    reading: Reading
    verdict: Verdict


@dataclass(frozen=True)
class Report:
    """The figures of one evaluation; `str` is a table."""

    shares: dict[str, Share]
    psnr: float
    settings: dict[str, Any]

    def __str__(self) -> str:
        lines = [f"{'what':40}{'measured':>9}   95 % interval     trials      aim"]
        for name, share in self.shares.items():
            low, high = share.interval
            aim = f"{AIMS[name]:.2f}" if name in AIMS else "-"
            trials = f"{share.k} of {share.n}"
            value = f"{share.value:.3f}" if share.n else "-"
            lines.append(f"{name:40}{value:>9}   [{low:.3f}, {high:.3f}]   {trials:12}{aim}")
        lines.append(f"{'autoencoder, PSNR in dB':40}{self.psnr:9.2f}{'':34}{PSNR_AIM:.0f}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The figures as plain values."""
        shares = {name: share.to_json() for name, share in self.shares.items()}
        return {"settings": self.settings, "shares": shares, "psnr": self.psnr, "aims": AIMS}


def evaluate(
    pipeline: Any,
    *,
    prompts: int = 500,
    seed: int = 0,
    steps: int = 25,
    guidance: float = 7.5,
    lcm: bool | str = False,
    sampler: str | None = None,
    eta: float | None = None,
    decoder: str | None = None,
    batch_size: int = 16,
    out: Path | None = None,
) -> Report:
    """Draw `prompts` prompts of each split (fewer unseen pairs) and count what came out right; of
    so many scenes, 500 at most, the autoencoder's reconstructions are read.

    `pipeline` is a LatentDiffusionPipeline for 128 x 128 pictures, which takes `lcm`,
    `sampler` (its own) and `eta` as `Request` has them. `decoder` is what its autoencoder is called
    in the report, if not its own. Picture i is drawn with `seed` + i. With `out`, `report.json` and
    `grid.png` (failures first) are written there.
    """

    def draw(split: str, count: int, what: str) -> list[Drawn]:
        world, drawn = World(seed, split), []
        with tqdm(total=count, desc=what, unit="picture") as bar:
            for first in range(0, count, batch_size):
                some = [world[i] for i in range(first, min(count, first + batch_size))]
                pipeline.set_progress_bar_config(disable=True)
                pictures = pipeline(
                    [sample.caption for sample in some],
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    lcm=lcm,
                    sampler=sampler,
                    eta=eta,
                    seed=[seed + first + i for i in range(len(some))],
                    output_type="np",
                ).images
                for sample, picture in zip(some, np.round(pictures * 255), strict=True):
                    drawn.append(judged(sample, picture.astype(np.uint8)))
                bar.update(len(some))
        return drawn

    results = draw("test", prompts, "drawing test prompts")
    fresh = draw("unseen pairs", max(1, round(prompts * UNSEEN_SHARE)), "drawing unseen pairs")
    shares = shares_of(results, fresh)
    opened = getattr(pipeline.config, "_name_or_path", None)  # none where it was put together
    if opened and (folder := Path(opened) / "clip").is_dir():
        from ldm_pipeline.evaluation.retrieval import caption_accuracy

        shares["caption among 100, half of them hard"] = caption_accuracy(
            folder.parent, min(prompts, 300), seed
        )
    settings: dict[str, Any] = {
        "prompts": prompts,
        "seed": seed,
        "steps": steps,
        "guidance": guidance,
    }
    if lcm:
        settings["lcm"] = str(lcm)
    settings |= {k: v for k, v in {"sampler": sampler, "eta": eta}.items() if v is not None}
    if pipeline.unet.dtype != torch.float32:
        settings["dtype"] = str(pipeline.unet.dtype).removeprefix("torch.")
    if decoder is not None:
        settings["decoder"] = decoder
    psnr, shares[READ_BACK] = reconstructed(pipeline.vae, min(prompts, RECONSTRUCTED), seed)
    report = Report(shares, psnr, settings)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.json").write_text(json.dumps(report.to_json(), indent=2) + "\n", "utf-8")
        shown = sorted(results, key=lambda drawn: drawn.verdict.all)[:GRID]
        images = to_pictures(np.stack([drawn.picture for drawn in shown]) / 255.0)
        captioned_grid(images, [drawn.prompt for drawn in shown]).save(out / "grid.png")
    return report


def judged(sample: Sample, picture: np.ndarray) -> Drawn:
    """What the judge makes of a picture drawn for a sample's caption."""
    reading = read(picture)
    verdict = agrees(reading, sample.description)
    return Drawn(sample.caption, sample.description, picture, reading, verdict)


def shares_of(results: Sequence[Drawn], fresh: Sequence[Drawn]) -> dict[str, Share]:
    """The shares of the report from the pictures of the test split and of the unseen pairs."""

    def among(keep: Callable[[Description], bool], kept: Callable[[Verdict], bool]) -> Share:
        return Share.of(kept(r.verdict) for r in results if keep(r.description))

    return {
        "one thing: kind and colour": among(
            lambda d: _counts(d) == [1], lambda v: v.kinds and v.colours
        ),
        "background": among(lambda d: d.background is not None, lambda v: v.background),
        "two things, each with its colour": among(
            lambda d: _counts(d) == [1, 1], lambda v: v.kinds and v.colours
        ),
        "relation of two things": among(lambda d: d.relation is not None, lambda v: v.relation),
        "count, 1 to 4": _counting(results),
        "pairs never seen in training": Share.of(r.verdict.colours for r in fresh),
        "place": among(lambda d: any(m.place for m in d.mentions), lambda v: v.place),
        "size": among(lambda d: any(m.size for m in d.mentions), lambda v: v.size),
        "style": among(lambda d: any(m.style for m in d.mentions), lambda v: v.style),
        "everything the words say": Share.of(r.verdict.all for r in results),
    }


def _counts(description: Description) -> list[int]:
    return [mention.count for mention in description.mentions]


def _counting(results: Sequence[Drawn]) -> Share:
    """As many prompts for one thing as for two, three and four alike, so that no count is cheap."""
    by_count: dict[int, list[bool]] = {n: [] for n in (1, 2, 3, 4)}
    for result in results:
        if len(result.description.mentions) == 1:
            by_count[result.description.mentions[0].count].append(result.verdict.count)
    least = min(len(outcomes) for outcomes in by_count.values())
    return Share.of(outcome for outcomes in by_count.values() for outcome in outcomes[:least])


@torch.no_grad()
def reconstructed(vae: Any, pictures: int, seed: int) -> tuple[float, Share]:
    """Mean PSNR in dB (the peak is 255) of fresh pictures through the autoencoder, and how often
    the judge reads the whole scene from what comes out."""
    world, values, right = World(seed, "test"), [], []
    for first in tqdm(range(0, pictures, 20), desc="reconstructing", unit="batch", leave=False):
        samples = [world[i] for i in range(first, min(first + 20, pictures))]
        x = to_tensor(np.stack([sample.picture for sample in samples])).to(vae.device)
        z, _ = autoencoder.encode(vae, x.to(vae.dtype))
        y = autoencoder.decode(vae, z).float().clamp(-1, 1)
        values += psnr(x, y).tolist()
        decoded = ((y + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        pairs = zip(samples, decoded, strict=True)
        right += [is_whole(read(picture), sample.scene) for sample, picture in pairs]
    return float(np.mean(values)), Share.of(right)


def is_whole(reading: Reading, scene: Scene) -> bool:
    """Background, number, and each thing's kind, colour and place (within 4 pixels) are right."""
    if reading.background != scene.background or len(reading.things) != len(scene.things):
        return False
    for thing in scene.things:
        near = min(reading.things, key=lambda s: (s.x - thing.x) ** 2 + (s.y - thing.y) ** 2)
        if (near.kind, near.colour) != (thing.kind, thing.colour):
            return False
        if max(abs(near.x - thing.x), abs(near.y - thing.y)) > 4:
            return False
    return True
