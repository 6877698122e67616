"""How long a picture takes, ours against stock diffusers, on this machine. Run by hand:

    python benchmarks/sampling.py [--model DIR] [--steps 25] [--batches 1 8] [--repeats 5]

Both pipelines are opened from one folder, draw the same prompts from the same seeds with the same
scheduler, and take turns within one process, so that whatever else the machine does hits both. A
round draws once with each and times the UNet and the decoder alone on the shapes of that drawing;
the table holds the medians of the rounds, after one round that does not count.

Legend
    seconds    for the whole call, words to pictures in memory (output_type="pil")
    UNet       seconds of one bare UNet call on both halves of the guidance, [2B, C, h, w]
    overhead   milliseconds per step of all that is not the UNet or the decoder
    decoder    its share of the call
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from ldm_pipeline import LatentDiffusionPipeline, load
from ldm_pipeline.errors import UserError
from ldm_pipeline.loading import dtype_argument
from ldm_pipeline.models import autoencoder, bundled
from ldm_pipeline.models.unet import bind

PROMPTS = (
    "a red star above a blue house",
    "three green circles",
    "a purple cat",
    "a yellow sun in the top right corner",
)
GUIDANCE = 7.5


@dataclass(frozen=True)
class Times:
    """Seconds of one pipeline in one round: the call, one UNet call, and the decoder."""

    call: float
    unet: float
    decoder: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="bundled", help="a folder (%(default)s)")
    parser.add_argument("--steps", type=int, default=25, help="(%(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="(1 8)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count (%(default)s)")
    parser.add_argument("--threads", type=int, help="of torch (as the machine has them)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        pipes = both(args.model, args.device)
    except UserError as error:
        parser.error(str(error))

    print(machine(args.device))
    print(f"{args.model}, {args.steps} steps, guidance {GUIDANCE:g}, median of {args.repeats}\n")
    print("batch  pipeline   seconds  a picture  UNet ms  overhead ms/step  decoder")
    for batch in args.batches:
        rounds, same = measure(pipes, batch, args.steps, args.repeats)
        for name, times in rounds.items():
            print(line(name, batch, args.steps, times))
        pairs = zip(*(times for times in rounds.values()), strict=True)
        ratio = statistics.median(stock.call / ours.call for ours, stock in pairs)
        print(f"       stock takes {ratio:.3f} x as long; largest difference in a pixel: {same:g}")


def both(model: str, device: str) -> dict[str, Any]:
    """Our pipeline and the stock one over the same folder, in float32."""
    folder = bundled.folder() if model == "bundled" else Path(model)
    ours: LatentDiffusionPipeline = load(folder)
    stock = StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, use_safetensors=True, **dtype_argument(torch.float32)
    )
    pipes = {"ours": ours.to(device), "stock": stock.to(device)}
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    return pipes


def measure(
    pipes: dict[str, Any], batch: int, steps: int, repeats: int
) -> tuple[dict[str, list[Times]], float]:
    """The times of each pipeline in every round that counts, and the largest difference of the
    two's pictures, whose values go from 0 to 255."""
    rounds: dict[str, list[Times]] = {name: [] for name in pipes}
    largest = 0.0
    for k in range(repeats + 1):
        pictures = {}
        for name in sorted(pipes, reverse=bool(k % 2)):
            pictures[name], times = one_round(pipes[name], batch, steps)
            if k > 0:
                rounds[name].append(times)
        difference = np.abs(pictures["ours"] - pictures["stock"]).max()
        largest = max(largest, float(difference))
    return rounds, largest


@torch.no_grad()
def one_round(pipe: Any, batch: int, steps: int) -> tuple[np.ndarray, Times]:
    """The pictures of one drawing, int [B, H, W, 3], and how long it and its parts took."""
    device = pipe.device
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(batch)]
    drawn: list[Any] = []

    def draw() -> None:
        generators = [torch.Generator().manual_seed(i) for i in range(batch)]
        drawn[:] = pipe(
            prompts, num_inference_steps=steps, guidance_scale=GUIDANCE, generator=generators
        ).images

    call = seconds(draw, device)
    config = pipe.unet.config
    z = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size)
    z = z.to(device)
    embeds = torch.cat(pipe.encode_prompt(prompts, device, 1, True))
    network = bind(pipe.unet, embeds)
    level = torch.full((2 * batch,), 500.0, device=device)
    few = max(3, steps // 5)
    unet = seconds(lambda: [network(torch.cat([z, z]), level) for _ in range(few)], device) / few
    decoder = seconds(lambda: autoencoder.decode(pipe.vae, z), device)
    return np.stack([np.asarray(p, dtype=int) for p in drawn]), Times(call, unet, decoder)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long `work` takes, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def line(name: str, batch: int, steps: int, times: list[Times]) -> str:
    """A row of the table."""
    call, unet, decoder = (
        statistics.median(getattr(t, part) for t in times) for part in ("call", "unet", "decoder")
    )
    overhead = statistics.median((t.call - t.decoder) / steps - t.unet for t in times)
    return (
        f"{batch:5}  {name:9} {call:8.3f}  {call / batch:9.3f}  {unet * 1e3:7.2f}"
        f"  {overhead * 1e3:16.2f}  {decoder / call:6.1%}"
    )


def machine(device: str) -> str:
    """What was measured on, in a line."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [row for row in cpuinfo.read_text().splitlines() if row.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    if device != "cpu":
        name = f"{torch.cuda.get_device_name()}, {name}"
    return (
        f"{name}, {torch.get_num_threads()} torch threads, torch {torch.__version__},"
        f" diffusers {diffusers.__version__}, Python {platform.python_version()}"
    )


if __name__ == "__main__":
    main()
