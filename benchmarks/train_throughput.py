"""How fast a LoRA is trained, ours against the usual way, on this machine. Run by hand:

    python -m benchmarks.train_throughput [--model DIR | sd15] [--side 128] [--batch 8]
                                          [--pictures 64] [--steps 8] [--rounds 3]
                                          [--precision auto] [--compile]

One model, one folder of pictures, one adapter's shape; each way in a process of its own, which take
turns: only one computes at a time. *Usual* is `benchmarks/usual_lora.py`. *Ours* takes latents and
embeddings from the caches; *compiled* is the same with `run.compile`, which takes a minute once;
in a *first pass* each picture and caption is encoded too, all in the run's precision. The table has
the medians of the rounds. Speed does not depend on the weights: `sd15` is the full architecture of
Stable Diffusion 1.5 with random ones.

Legend
    images/s   of whole training steps: data, forward, backward, clipping, AdamW
    floor      images/s if nothing but the floating-point operations of the UNet's forward and
               backward pass were done, at this machine's rate for large matrix products
    data, forward, backward, update   seconds of a step
    MiB        peak memory of the process
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import full_architecture
from benchmarks.usual_lora import Step, steps_of
from ldm_pipeline import load
from ldm_pipeline.data.cache import ALONE
from ldm_pipeline.data.world import write_folder
from ldm_pipeline.lora.targets import ATTENTION
from ldm_pipeline.models.conditioning import conditioning_of
from ldm_pipeline.training.captioned import Captioned
from ldm_pipeline.training.encoding import cached_texts
from ldm_pipeline.training.lora import LoraConfig, LoraObjective
from ldm_pipeline.training.start import precision
from ldm_pipeline.training.updates import Gradients, Guard, build_optimiser, leave_out

RANK = 8
STAGES = ("data", "forward", "backward", "update")
Way = tuple[Callable[[int], Step], dict[str, float]]
"""A step by its number, and what is known of it beforehand."""


def opened(source: str, dtype: torch.dtype) -> Any:
    """The model, as the trainer's script opens it, or one of random weights."""
    if source in full_architecture.UNETS:
        return full_architecture.opened(source, dtype)
    return load(source, torch_dtype=dtype)


def config_of(args: argparse.Namespace, folder: Path) -> LoraConfig:
    """A LoRA run over the folder."""
    return LoraConfig.model_validate(
        {
            "run": {
                "out": folder / "run", "batch_size": args.batch, "mixed_precision": args.precision,
            },
            "model": args.model,
            "data": {
                "source": str(folder / "pictures"), "resolution": args.side, "fixed": True,
                "upscale": True, "cache": folder / "cache",
            },
            "lora": {"rank": RANK},
        }
    )  # fmt: skip


def ours(args: argparse.Namespace, folder: Path, *, quick: bool = False) -> Way:
    """A step of our trainer, and the seconds that a picture's encoding takes."""
    encoding = encoded(args, folder)
    objective = LoraObjective(config_of(args, folder), opened)
    half = precision(args.precision, "cpu") == "bf16"
    if quick:
        objective.compile_network()
    trained = dict(objective.adapter.parameters)
    settings = objective.config.optimiser
    gradients, guard = Gradients(trained), Guard(torch.device("cpu"))
    optimiser = build_optimiser(trained, settings)

    def step(number: int) -> Step:
        samples = objective.batch(range(number * args.batch, (number + 1) * args.batch))
        yield "data"
        gradients.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses = objective(samples)
        yield "forward"
        losses["loss"].backward()
        yield "backward"
        norm = gradients.clip(settings.max_grad_norm)
        guard.watch(number, torch.isfinite(norm))
        leave_out(optimiser, guard.closed)
        optimiser.step()
        yield "update"

    flops = 0 if quick else flops_of(objective, args.batch, half)
    return step, {"encoding": encoding, "flops": flops}


def flops_of(objective: LoraObjective, batch: int, half: bool) -> float:
    """Floating-point operations of the UNet's forward and backward pass, for one picture."""
    samples = objective.batch(range(batch))
    with FlopCounterMode(display=False) as counter:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses = objective(samples)
        losses["loss"].backward()
    return counter.get_total_flops() / batch


def compiled(args: argparse.Namespace, folder: Path) -> Way:
    """A step of our trainer with `run.compile`."""
    step, known = ours(args, folder, quick=True)
    began = time.perf_counter()
    list(step(0))
    return step, {**known, "compiling": time.perf_counter() - began}


def encoded(args: argparse.Namespace, folder: Path) -> float:
    """Seconds for a picture and its caption, into the caches; the first way to ask fills them."""
    config = config_of(args, folder)
    pipe = opened(args.model, torch.float32)
    half = precision(args.precision, "cpu")
    data = Captioned(config.data, config.run.seed, args.batch, half)
    began = time.perf_counter()
    data.latents(pipe.vae, ALONE)
    cached_texts(data.texts(), data.cache, conditioning_of(pipe), ALONE)
    return (time.perf_counter() - began) / args.pictures


def usual(args: argparse.Namespace, folder: Path) -> Way:
    """A step as most scripts do it."""
    pipe = opened(args.model, torch.float32)
    targets = list(ATTENTION)
    pictures = folder / "pictures"
    half = precision(args.precision, "cpu") == "bf16"
    return steps_of(pipe, pictures, targets, RANK, args.batch, args.side, half), {}


def serve(
    line: Connection, make: Callable[[argparse.Namespace, Path], Way], told: argparse.Namespace
) -> None:
    """In a process of its own: make ready, then time steps as often as it is asked to."""
    step, known = make(told, told.folder)
    line.send(known)
    while (numbers := line.recv()) is not None:
        line.send(timed(step, numbers))
    line.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def timed(step: Callable[[int], Step], numbers: range) -> dict[str, float]:
    """Seconds of each stage, and of the whole, for one step on average."""
    spent = dict.fromkeys(STAGES, 0.0)
    for number in numbers:
        before = time.perf_counter()
        for stage in step(number):
            now = time.perf_counter()
            spent[stage] += now - before
            before = now
    each = {stage: seconds / len(numbers) for stage, seconds in spent.items()}
    return {**each, "whole": sum(each.values())}


def peak_rate(dtype: torch.dtype) -> float:
    """Operations a second of a product of two 2048 x 2048 matrices, the best of five."""
    a, b = torch.randn(2, 2048, 2048).to(dtype)
    best = 0.0
    for _ in range(5):
        before = time.perf_counter()
        a @ b
        best = max(best, 2 * 2048**3 / (time.perf_counter() - before))
    return best


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="bundled", help="a folder, or sd15 (%(default)s)")
    parser.add_argument("--side", type=int, default=128, help="of the pictures (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--pictures", type=int, default=64, help="of the folder (%(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="in a round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "no", "bf16"),
        help="of all, as run.mixed_precision (%(default)s: bf16 where this processor has it)",
    )
    parser.add_argument("--compile", action="store_true", help="also ours, compiled")
    args = parser.parse_args()
    processes = get_context("spawn")
    lines: dict[str, Connection] = {}
    known: dict[str, float] = {}
    makes = {"usual": usual, "ours": ours} | ({"compiled": compiled} if args.compile else {})
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in makes}
    with tempfile.TemporaryDirectory() as place:
        args.folder = Path(place)
        write_folder(args.folder / "pictures", args.pictures, 0, "train")
        for name, make in makes.items():
            lines[name], far = processes.Pipe()
            processes.Process(target=serve, args=(far, make, args), daemon=True).start()
            known = lines[name].recv() | known
        for turn in range(args.rounds + 1):
            for name, line in lines.items():
                line.send(range(turn * args.steps, (turn + 1) * args.steps))
                taken = line.recv()
                if turn:  # the first round warms up
                    rounds[name].append(taken)
        for line in lines.values():
            line.send(None)
        memory = {name: line.recv() for name, line in lines.items()}
    half = precision(args.precision, "cpu") == "bf16"
    floor = peak_rate(torch.bfloat16 if half else torch.float32) / known["flops"]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.model}")
    print(
        f"batch {args.batch}, pictures of {args.side} x {args.side}, "
        f"{'bf16' if half else 'float32'}"
    )
    print(f"{'':>14} images/s  of floor " + " ".join(f"{s:>9}" for s in STAGES) + "      MiB")
    speeds = {}
    for name, each in rounds.items():
        middle = {key: statistics.median(one[key] for one in each) for key in each[0]}
        speeds[name] = args.batch / middle["whole"]
        stages = " ".join(f"{middle[stage]:9.4f}" for stage in STAGES)
        of_floor = speeds[name] / floor
        print(f"{name:>14} {speeds[name]:8.2f} {of_floor:8.1%}  {stages} {memory[name]:8.0f}")
    speeds["first pass"] = 1 / (1 / speeds["ours"] + known["encoding"])
    print(f"{'first pass':>14} {speeds['first pass']:8.2f}")
    print(f"{'floor':>14} {floor:8.2f}")
    if args.compile:
        print(f"compiling took {known['compiling']:.0f} s")
    for name in (name for name in speeds if name != "usual"):
        print(f"{name} / usual: {speeds[name] / speeds['usual']:.2f}")


if __name__ == "__main__":
    main()
