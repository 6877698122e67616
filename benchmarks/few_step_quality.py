"""What few steps lose: the adapter's pictures against those of the model's 50. Run by hand:

    python -m benchmarks.few_step_quality [--prompts 300] [--lcm FILE ...] [--dtype bfloat16]

Every row draws the same prompts of the world's test split from the same noise. The teacher is the
bundled model itself, guided as strongly as its adapter was taught (w + 1); of several files, say of
two late checkpoints, each gets its rows.

Legend
    right      everything that the words say, by the judge, with its 95 % interval
    of 50      that share, as a part of the teacher's at 50 steps
    distance   mean squared difference of latents from the teacher's at 50 steps of DDIM. An adapter
               is drawn with fresh noise in each step, and so ends elsewhere; in the rows "keeping
               noise" it keeps the noise that it began with (TCD, gamma 0), as DDIM does
    spread     mean variance of latents over 8 seeds of one prompt, as a part of the teacher's at 50
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.sampling import machine
from ldm_pipeline import load
from ldm_pipeline.data.world import World
from ldm_pipeline.evaluation.metrics import Share
from ldm_pipeline.evaluation.report import judged
from ldm_pipeline.models import autoencoder

SPREAD = (32, 8)
"""Prompts and seeds of each, for the spread."""


@dataclass(frozen=True)
class Way:
    """One way of drawing: steps, guidance, the adapter's file, True (the bundled) or False, and
    whether it keeps its noise."""

    name: str
    steps: int
    guidance: float
    lcm: str | bool = False
    keeps: bool = False

    @property
    def sampler(self) -> dict[str, Any]:
        """Its name, if not the adapter's own, and the share of fresh noise."""
        if self.lcm and not self.keeps:
            return {}
        return {"sampler": "tcd" if self.lcm else "ddim", "eta": 0.0}


def ways(files: list[str], w: float) -> list[Way]:
    """The teacher's rows, then those of each adapter."""
    found = [Way("teacher", steps, w + 1) for steps in (50, 8, 4)]
    asked: list[str | bool] = [*files] or [True]
    for lcm in asked:
        name = "adapter" if lcm is True else str(lcm)
        found += [Way(name, steps, 1.0, lcm) for steps in (8, 4, 2)]
        found += [Way(f"{name}, keeping noise", steps, 1.0, lcm, keeps=True) for steps in (8, 4)]
    return found


def main() -> None:
    """Draw, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", default="bundled", help="(%(default)s)")
    add("--lcm", nargs="*", default=[], metavar="FILE", help="adapters (the model's own)")
    add("--w", type=float, default=2.0, help="that they were taught with (%(default)s)")
    add("--prompts", type=int, default=300, help="(%(default)s)")
    add("--batch-size", type=int, default=16, help="(%(default)s)")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="(%(default)s)")
    args = parser.parse_args()
    pipe = load(args.model, torch_dtype=getattr(torch, args.dtype))
    pipe.set_progress_bar_config(disable=True)
    samples = [World(0, "test")[i] for i in range(args.prompts)]
    few, seeds = SPREAD
    repeated = [sample.caption for sample in samples[:few] for _ in range(seeds)]

    print(machine("cpu"))
    print(f"{args.prompts} prompts, {args.dtype}\n")
    print(f"{'who':24} steps   right   95 % interval    of 50   distance  spread")
    first: tuple[Tensor, float, float] | None = None
    for way in ways(args.lcm, args.w):
        z = latents(pipe, way, [sample.caption for sample in samples], args.batch_size)
        wide = spread(latents(pipe, way, repeated, args.batch_size), seeds)
        pictures = decoded(pipe.vae, z, args.batch_size)
        right = Share.of(
            judged(sample, picture).verdict.all
            for sample, picture in zip(samples, pictures, strict=True)
        )
        if first is None:
            first = z, right.value, wide
        low, high = right.interval
        distance = float((z - first[0]).square().mean())
        print(
            f"{way.name[-24:]:24} {way.steps:5}   {right.value:.3f}   [{low:.3f}, {high:.3f}]  "
            f"{right.value / first[1]:6.3f}   {distance:8.4f}  {wide / first[2]:6.3f}",
            flush=True,
        )


def latents(pipe: Any, way: Way, prompts: list[str], batch_size: int) -> Tensor:
    """Latents [prompts, 4, h, w] in float32, number i from seed i."""
    drawn = []
    for first in tqdm(range(0, len(prompts), batch_size), desc=f"{way.name}, {way.steps} steps"):
        some = prompts[first : first + batch_size]
        drawn.append(
            pipe(
                some,
                num_inference_steps=way.steps,
                guidance_scale=way.guidance,
                lcm=way.lcm,
                **way.sampler,
                seed=[first + i for i in range(len(some))],
                output_type="latent",
            ).images.float()
        )
    return torch.cat(drawn)


def spread(z: Tensor, seeds: int) -> float:
    """The variance over the seeds of each prompt, mean over prompts and places."""
    return float(z.unflatten(0, (-1, seeds)).var(dim=1).mean())


@torch.no_grad()
def decoded(vae: Any, z: Tensor, batch_size: int) -> np.ndarray:
    """The pictures of latents of the pipeline, uint8 [N, H, W, 3]."""
    x = torch.cat([autoencoder.decode(vae, some.to(vae.dtype)) for some in z.split(batch_size)])
    levels = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return levels.permute(0, 2, 3, 1).cpu().numpy()


if __name__ == "__main__":
    main()
