"""A whole LoRA job, from the command to the adapter's file, ours and the usual way. Run by hand:

    python -m benchmarks.lora_job [--steps 200] [--batch 8] [--rounds 3] [--precision no]

Each is a process of its own that starts, opens the bundled model, reads 24 pictures of the concept
"cactus", trains as many steps of the same batch, rank and modules, and writes its file; ours also
encodes into an empty cache. They take turns; printed are the medians.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ldm_pipeline.data.world.concepts import write_concept

PICTURES, RANK = 24, 16


def ours(folder: Path, out: Path, args: argparse.Namespace) -> list[str]:
    """The command of our trainer, with its defaults but for what both say."""
    return [
        sys.executable, "train/train_lora.py",
        "--run.out", str(out), "--run.steps", str(args.steps),
        "--run.batch_size", str(args.batch), "--run.mixed_precision", args.precision,
        "--model", "bundled", "--data.source", str(folder), "--data.resolution", "128",
        "--data.fixed", "true", "--data.cache", str(out / "cache"),
        "--lora.targets", "attention", "--lora.rank", str(RANK),
    ]  # fmt: skip


def usual(folder: Path, out: Path, args: argparse.Namespace) -> list[str]:
    """The command of the usual way."""
    told = [
        sys.executable, "-m", "benchmarks.usual_lora", str(folder), "--out", str(out),
        "--steps", str(args.steps), "--batch", str(args.batch), "--rank", str(RANK),
    ]  # fmt: skip
    return told + ["--bf16"] * (args.precision == "bf16")


def main() -> None:
    """Run both in turn and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--precision", default="no", choices=("no", "bf16"), help="(%(default)s)")
    args = parser.parse_args()
    taken: dict[str, list[float]] = {"usual": [], "ours": []}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "pictures"
        write_concept(folder, "cactus", PICTURES, 0)
        for turn in range(args.rounds):
            for name, command in (("usual", usual), ("ours", ours)):
                began = time.perf_counter()
                told = command(folder, Path(place) / f"{name} {turn}", args)
                subprocess.run(told, check=True, capture_output=True)
                taken[name].append(time.perf_counter() - began)
                print(f"{name}: {taken[name][-1]:.1f} s", flush=True)
    medians = {name: statistics.median(each) for name, each in taken.items()}
    print(f"{args.steps} steps of {args.batch}, precision {args.precision}, medians:")
    print(f"usual {medians['usual']:.1f} s, ours {medians['ours']:.1f} s")
    print(f"ours is {medians['usual'] / medians['ours']:.2f} times as fast")


if __name__ == "__main__":
    main()
