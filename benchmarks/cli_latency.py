"""How long the `ldm` command takes: help, a refusal, a cold picture, a warm picture. Run by hand.

    make bench        or: python benchmarks/cli_latency.py --repeats 9 --model DIR

Prints a table of medians over fresh processes, each run alone; for the warm picture over calls in
one process, after one that is not counted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = 25


def timed(action: Callable[[], object], repeats: int) -> list[float]:
    """Seconds that each of `repeats` calls of `action` takes."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return seconds


def command(*arguments: str, code: int = 0) -> Callable[[], object]:
    """A function that runs `ldm` with `arguments` in a fresh process and expects exit `code`."""

    def run() -> None:
        done = subprocess.run(
            [sys.executable, "-m", "ldm_pipeline.cli", *arguments],
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode != code:
            raise SystemExit(
                f"ldm {' '.join(arguments)} ended with {done.returncode}: {done.stderr}"
            )

    return run


def report(name: str, seconds: list[float], limit: float) -> None:
    """One row of the table."""
    middle = statistics.median(seconds)
    row = f"{name:32} {middle:8.3f} s  {min(seconds):8.3f} – {max(seconds):.3f} s"
    print(f"{row:66} {limit:6.2f} s  {'yes' if middle <= limit else 'NO'}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure the ldm command on this machine.")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each row (7)")
    parser.add_argument("--model", default="bundled", help="the model that draws (bundled)")
    args = parser.parse_args()

    print(f"{'':32} {'median':>10}  {'range':>19}    {'limit':>8}  within")
    report("ldm --help", timed(command("--help"), args.repeats), 0.3)
    report("ldm generate --help", timed(command("generate", "--help"), args.repeats), 0.3)
    refused = command("generate", "a red star", "--sampler", "dimm", code=2)
    report("a refused argument", timed(refused, args.repeats), 0.3)

    prompt = "a red star above a blue house"
    with tempfile.TemporaryDirectory() as folder:
        picture = str(Path(folder) / "star.png")
        words = ("generate", prompt, "-o", picture, "--model", args.model, "--device", "cpu")
        cold = command(*words, "--steps", str(STEPS))
        report("the cold command, 25 steps", timed(cold, min(args.repeats, 3)), 12.0)
        report("ldm show", timed(command("show", picture), args.repeats), 0.3)

    import ldm_pipeline

    pipeline = ldm_pipeline.load(args.model)
    pipeline.set_progress_bar_config(disable=True)

    def warm() -> object:
        return pipeline(prompt, num_inference_steps=STEPS, seed=0)

    warm()
    report("a warm picture, 25 steps", timed(warm, args.repeats), 2.0)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
