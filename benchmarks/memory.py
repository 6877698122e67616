"""How much memory a picture takes in each mode, on this machine. Run by hand:

    python -m benchmarks.memory [--model sd15|sdxl|DIR] [--side 512] [--steps 2] [--modes NAME …]

Each mode has a process of its own, which opens the model, arranges it and draws twice: once with a
single step, for what is made at first use (`compile`), and once more with all, which is timed.
Memory does not depend on the weights: `sd15` and `sdxl` are the full architectures with random
ones. On a CPU the process's resident memory is measured, as the kernel counts it; on a GPU what
torch has allocated there.

Legend
    opening    the most, until the pipeline stood (on a CPU with what the imports take)
    held       then, before anything was drawn
    peak       the most while it drew
    seconds    of the second picture, words to pixels
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import full_architecture, sampling
from ldm_pipeline import LatentDiffusionPipeline, LatentDiffusionXLPipeline, load
from ldm_pipeline.errors import UserError
from ldm_pipeline.memory import PLAIN, Memory
from ldm_pipeline.models import arranging

HALF = torch.bfloat16

MODES: dict[str, tuple[torch.dtype, Memory]] = {
    "float32": (torch.float32, PLAIN),
    "bfloat16": (HALF, PLAIN),
    "float16": (torch.float16, PLAIN),
    "sliced": (HALF, Memory("sliced")),
    "xformers": (HALF, Memory("xformers")),
    "tiling": (HALF, Memory("sdpa", tiling=True)),
    "int8": (HALF, Memory("sdpa", quantise="int8")),
    "float8": (HALF, Memory("sdpa", quantise="float8")),
    "compile": (HALF, Memory("sdpa", compile=True)),
    "int8 compile": (HALF, Memory("sdpa", quantise="int8", compile=True)),
    "parts": (HALF, Memory("sdpa", offload="parts")),
    "layers": (HALF, Memory("sdpa", offload="layers")),
    "least": (HALF, Memory("sdpa", offload="layers", tiling=True, quantise="int8")),
}
"""The modes: all but the first and third are in bfloat16."""

SLOW_WITHOUT_FLOAT16 = ("float16",)
STATUS, CPUS = Path("/proc/self/status"), Path("/proc/cpuinfo")
GIB = 2**30


@dataclass(frozen=True)
class Taken:
    """What a mode took: bytes and seconds."""

    opening: int
    held: int
    peak: int
    seconds: float


def main() -> None:
    """Print the table, one row as soon as its mode has drawn."""
    args = parser().parse_args()
    if args.alone is not None:
        print(json.dumps(vars(alone(args))))
        return
    print(sampling.machine(args.device))
    print(f"{args.model}, {args.side} x {args.side}, {args.steps} steps with guidance, GiB\n")
    print("| mode | opening | held | peak | seconds |\n|---|---|---|---|---|")
    asked = {"model": args.model, "side": args.side, "steps": args.steps, "device": args.device}
    told = [f"--{name}={value}" for name, value in asked.items()]
    for mode in args.modes or MODES:
        if mode in SLOW_WITHOUT_FLOAT16 and args.modes is None and not quick(args.device):
            print(
                f"| {mode} | this CPU has no float16; --modes {mode} takes hours | | | |",
                flush=True,
            )
            continue
        words = [sys.executable, "-m", "benchmarks.memory", *told, "--alone", mode]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            taken = Taken(**json.loads(done.stdout.splitlines()[-1]))
            sizes = (taken.opening, taken.held, taken.peak)
            shown = " | ".join(f"{size / GIB:.2f}" for size in sizes)
            print(f"| {mode} | {shown} | {taken.seconds:.1f} |", flush=True)
        else:
            last = (done.stderr.strip().splitlines() or ["it was killed"])[-1]
            print(f"| {mode} | {last.partition('error: ')[2] or last} | | | |", flush=True)


def parser() -> argparse.ArgumentParser:
    """What the program takes."""
    made = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    made.add_argument("--model", default="sd15", help="sd15, sdxl or a folder (%(default)s)")
    made.add_argument("--side", type=int, default=512, help="of the picture (%(default)s)")
    made.add_argument("--steps", type=int, default=2, help="(%(default)s)")
    made.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    made.add_argument("--modes", nargs="+", choices=MODES, help="(all)")
    made.add_argument("--alone", choices=MODES, help="this mode, in this process")
    return made


def quick(device: str) -> bool:
    """Whether `device` multiplies float16, which few CPUs do."""
    return device != "cpu" or (CPUS.is_file() and "avx512_fp16" in CPUS.read_text())


def alone(args: argparse.Namespace) -> Taken:
    """What one mode takes, measured in this process; ends it where the mode cannot run here."""
    dtype, memory = MODES[args.alone]
    device = torch.device(args.device)
    try:
        settled = arranging.resolve(memory, device, dtype)
        if settled.attention != memory.attention:
            raise UserError(f"{memory.attention} cannot run here")
        pipe = opened(args.model, dtype).arrange(settled, device)
    except UserError as error:
        sys.exit(f"error: {error}")
    pipe.set_progress_bar_config(disable=True)
    gc.collect()
    opening, held = peak(device), now(device)
    forget_peak(device)
    told: dict[str, Any] = {"height": args.side, "width": args.side, "seed": 1}
    pipe("a red star", num_inference_steps=1, **told)
    began = time.perf_counter()
    pipe("a red star", num_inference_steps=args.steps, **told)
    return Taken(opening, held, peak(device), time.perf_counter() - began)


def opened(model: str, dtype: torch.dtype) -> LatentDiffusionPipeline:
    """Our pipeline over a folder, or over a full architecture with random weights."""
    if model not in full_architecture.UNETS:
        return load(model, dtype=dtype)
    stock = full_architecture.opened(model, dtype)
    ours = LatentDiffusionXLPipeline if model == "sdxl" else LatentDiffusionPipeline
    return ours.from_pipe(stock)


def now(device: torch.device) -> int:
    """Bytes in use: of this process, or on the GPU."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else counted("VmRSS")


def peak(device: torch.device) -> int:
    """The most bytes that were in use since `forget_peak`, or since the start."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else counted("VmHWM")


def forget_peak(device: torch.device) -> None:
    """Begin to look for the most anew (proc(5), /proc/pid/clear_refs: 5 is the peak)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def counted(name: str) -> int:
    """A figure of the kernel's about this process, in bytes (Linux)."""
    if not STATUS.is_file():
        sys.exit("error: on a CPU this needs Linux, whose kernel counts a process's peak")
    (row,) = [row for row in STATUS.read_text().splitlines() if row.startswith(f"{name}:")]
    return int(row.split()[1]) * 1024


if __name__ == "__main__":
    main()
