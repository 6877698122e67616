"""What 24 pictures teach the bundled model, and what it forgets. Run by hand:

    python benchmarks/lora_concept.py [cactus|comic] [--prompts 100] [--config FILE]
        [--processes 2]

Writes the concept's folder and one of ordinary pictures, trains a LoRA by the command that the
README names, on as many processes as told (what else stands here is passed on to it), and has the
judge read what is drawn with and without it:

    concept     prompts that put it in colours, places and company that no training picture showed:
                how often it appears (aim 0.90)
    ordinary    everything the words say, on prompts of the world's test split (aim: 0.03 less at
                most than without the adapter)
    4 steps     the same of the concept, together with the bundled few-step adapter
    weight 0    whether the pictures are those of the model alone, bit for bit
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm_pipeline import LatentDiffusionPipeline, load
from ldm_pipeline.commands.steps import BUNDLED_USUAL
from ldm_pipeline.data.world import World, write_folder
from ldm_pipeline.data.world.concepts import CONCEPTS, write_concept
from ldm_pipeline.evaluation.concept import measure_concept
from ldm_pipeline.evaluation.metrics import Share
from ldm_pipeline.evaluation.report import judged
from ldm_pipeline.lora.attach import attach
from ldm_pipeline.training.config import parse
from ldm_pipeline.training.lora import LoraConfig

BATCH = 16
ORDINARY = 600  # pictures of the world beside the concept's, as in the configuration's first lines


def opened(source: str, dtype: torch.dtype) -> LatentDiffusionPipeline:
    """The model, as the trainer's script opens it."""
    return load(source, torch_dtype=dtype)


def drawn(
    pipe: LatentDiffusionPipeline, prompts: Sequence[str], *, few: bool = False
) -> list[np.ndarray]:
    """Pictures uint8 [128, 128, 3] of the prompts, picture i from seed i; in `few` steps with the
    model's few-step adapter beside the others."""
    guidance, sampler = BUNDLED_USUAL
    guided = {"num_inference_steps": 25, "guidance_scale": guidance, "sampler": sampler}
    how: dict[str, Any] = {"lcm": True} if few else guided
    pictures: list[np.ndarray] = []
    pipe.set_progress_bar_config(disable=True)
    for first in range(0, len(prompts), BATCH):
        some = list(prompts[first : first + BATCH])
        seeds = [first + i for i in range(len(some))]
        images = pipe(some, seed=seeds, output_type="np", **how).images
        pictures += list(np.round(images * 255).astype(np.uint8))
    return pictures


def main() -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", nargs="?", default="cactus", choices=tuple(CONCEPTS))
    parser.add_argument("--prompts", type=int, default=100, help="(%(default)s)")
    parser.add_argument("--config", default="configs/lora_tiny.yaml", help="(%(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="that train (%(default)s)")
    args, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_concept(folder / "pictures", args.name, 24)
        write_folder(folder / "world", ORDINARY, seed=1)
        told = ["--data.source", str(folder / "pictures"), "--data.cache", str(folder / "cache")]
        told += ["--data.regularisation", str(folder / "world")]
        out = ["--run.out", str(folder / "run")]
        words = ["--config", args.config, *told, *out, *more]
        config = parse(LoraConfig, words)
        began = time.perf_counter()
        launch = ["-m", "accelerate.commands.launch", "--num_processes", str(args.processes)]
        subprocess.run([sys.executable, *launch, "train/train_lora.py", *words], check=True)
        minutes = (time.perf_counter() - began) / 60
        final = config.run.out / "final"
        pipes = {"without": opened(config.model, torch.float32)}
        for name, weight in (("with", 1.0), ("weight 0", 0.0)):
            pipes[name] = opened(config.model, torch.float32)
            attach(pipes[name], [(final, weight)])
    print(
        f"{args.name}: 24 pictures, {config.run.steps} steps of {config.run.batch_size} on"
        f" {args.processes} processes, {minutes:.1f} minutes"
    )
    samples = [World(0, "test")[i] for i in range(args.prompts)]
    pictures = {}
    for name in ("without", "with"):
        pipe = pipes[name]
        pictures[name] = drawn(pipe, [sample.caption for sample in samples])
        kept = Share.of(
            judged(sample, picture).verdict.all
            for sample, picture in zip(samples, pictures[name], strict=True)
        )
        low, high = kept.interval
        print(f"ordinary, {name}: {kept.value:.3f} [{low:.3f}, {high:.3f}]")
        print(measure_concept(partial(drawn, pipe), args.name, args.prompts))
    print("with, in 4 steps, the few-step adapter beside it:")
    print(measure_concept(partial(drawn, pipes["with"], few=True), args.name, args.prompts))
    some = [sample.caption for sample in samples[:4]]
    same = np.array_equal(drawn(pipes["without"], some), drawn(pipes["weight 0"], some))
    print(f"at weight 0 bit for bit the model alone: {same}")


if __name__ == "__main__":
    main()
