"""What few steps save, on this machine: seconds of a picture, and the decoder's share. Run by hand:

    python -m benchmarks.few_steps [--model DIR | sd15] [--side 512] [--repeats 3] [--small FOLDER]

50 and 25 steps are drawn with guidance, 8, 4 and 2 as latent consistency models draw, without, so
that a step costs half: the bundled model with its adapter, others as if one were fused. Speed does
not depend on the weights: `sd15` is the full architecture of Stable Diffusion 1.5 with random ones,
in bfloat16. The settings take turns within one process; the table holds medians, after one round
that does not count.

Legend
    seconds    for the whole call, words to a picture in memory
    decoder    its share of the call, with the model's own decoder
    small      seconds with the small decoder (AutoencoderTiny) in its place; for sd15 one of random
               weights in TAESD's shape is taken, unless one is named
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny

from benchmarks import full_architecture, sampling
from ldm_pipeline import LatentDiffusionPipeline, load
from ldm_pipeline.errors import UserError
from ldm_pipeline.images import psnr
from ldm_pipeline.models import autoencoder, bundled, small_decoder
from ldm_pipeline.training.world_data import fresh_pictures

SETTINGS = ((50, 7.5, "ddim"), (25, 7.5, "ddim"), (8, 1.0, "lcm"), (4, 1.0, "lcm"), (2, 1.0, "lcm"))
"""Steps, guidance and sampler of each row."""


def main() -> None:
    """Print the table, and what the small decoder keeps."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="bundled", help="a folder, or sd15 (%(default)s)")
    parser.add_argument("--side", type=int, help="of the picture in pixels (the model's own)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that count (%(default)s)")
    parser.add_argument("--small", type=Path, help="folder of a small decoder")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    args = parser.parse_args()
    try:
        pipe = opened(args.model).to(args.device)
    except UserError as error:
        parser.error(str(error))
    pipe.set_progress_bar_config(disable=True)
    small = small_one(args.small, args.model)
    side = args.side or 8 * pipe.unet.config.sample_size

    print(sampling.machine(args.device))
    print(f"{args.model}, {side} x {side}, one picture, median of {args.repeats}\n")
    print("steps  guidance  seconds  decoder   small")
    found = measure(pipe, small, side, args.repeats)
    for (steps, guidance, _), (call, decoder, quick) in zip(SETTINGS, found, strict=True):
        saved = "" if quick is None else f"{call - decoder + quick:8.3f}"
        print(f"{steps:5}  {guidance:8g} {call:8.3f}  {decoder / call:7.1%} {saved}")
    if small is not None and args.model != "sd15":
        own, quick, between = faithful(pipe.vae, small.to(pipe.device))
        print(f"\nPSNR on 64 fresh pictures: {own:.2f} dB, with the small decoder {quick:.2f} dB;")
        print(f"of the small decoder's pictures against the full one's: {between:.2f} dB")


def small_one(place: Path | None, model: str) -> AutoencoderTiny | None:
    """The small autoencoder in a folder; without one that of the bundled model, if it is here, and
    of sd15 one with random weights, whose default shape is TAESD's."""
    if place is None and model == "sd15":
        return AutoencoderTiny()
    if place is None and model == "bundled":
        place = bundled.small_decoder()
    return None if place is None else small_decoder.opened(place, torch.float32)


def opened(model: str) -> Any:
    """Our pipeline over a folder, the bundled model, or a full architecture with random weights."""
    if model != "sd15":
        return load(bundled.folder() if model == "bundled" else Path(model))
    stock = full_architecture.opened(model, torch.bfloat16)
    return LatentDiffusionPipeline(**stock.components)


def measure(
    pipe: Any, small: AutoencoderTiny | None, side: int, repeats: int
) -> list[tuple[float, float, float | None]]:
    """Median seconds of the call, of its decoder, and of the small one, for each of SETTINGS."""
    z = torch.randn(1, pipe.unet.config.in_channels, side // 8, side // 8)
    z = z.to(pipe.device, pipe.vae.dtype)
    if small is not None:
        small.to(pipe.device, pipe.vae.dtype)
    told: list[list[tuple[float, float, float]]] = [[] for _ in SETTINGS]
    for k in range(repeats + 1):
        for row, (steps, guidance, sampler) in zip(told, SETTINGS, strict=True):
            times = once(pipe, small, z, side, (steps, guidance, sampler))
            if k > 0:
                row.append(times)
    medians = [[statistics.median(each) for each in zip(*row, strict=True)] for row in told]
    return [(call, own, quick if small else None) for call, own, quick in medians]


@torch.no_grad()
def once(
    pipe: Any, small: AutoencoderTiny | None, z: Any, side: int, how: tuple[int, float, str]
) -> tuple[float, float, float]:
    """Seconds of one call, of the decoder alone, and of the small decoder alone (0 without)."""
    steps, guidance, sampler = how
    adapted = sampler == "lcm" and pipe.config._name_or_path == str(bundled.folder())

    def draw() -> None:
        pipe(
            sampling.PROMPTS[0],
            num_inference_steps=steps,
            guidance_scale=guidance,
            sampler=None if adapted else sampler,
            lcm=adapted,
            height=side,
            width=side,
            seed=0,
        )

    def decode(vae: Any) -> float:
        return sampling.seconds(lambda: autoencoder.decode(vae, z), pipe.device)

    call = sampling.seconds(draw, pipe.device)
    return call, decode(pipe.vae), 0.0 if small is None else decode(small)


@torch.no_grad()
def faithful(large: Any, small: AutoencoderTiny) -> tuple[float, float, float]:
    """PSNR in dB on the latents of 64 pictures that no training saw: of both decoders against the
    pictures, and of the small one against the large one."""
    values: list[list[float]] = [[], [], []]
    for x in fresh_pictures(64).split(16):
        z, _ = autoencoder.encode(large, x.to(large.device, large.dtype))
        full, quick = (
            autoencoder.decode(vae, z).clamp(-1, 1).float().cpu() for vae in (large, small)
        )
        for told, pair in zip(values, ((x, full), (x, quick), (full, quick)), strict=True):
            told += psnr(*pair).tolist()
    own, little, between = (statistics.mean(each) for each in values)
    return own, little, between


if __name__ == "__main__":
    main()
