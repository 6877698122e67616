"""Ours against the stock pipeline at the full size of Stable Diffusion 1.5 or SDXL. Run by hand:

    python -m benchmarks.full_parity [sd15|sdxl] [--side 256] [--steps 2]

Both draw with the same networks (the architectures of `full_architecture.py`, random weights, in
bfloat16), the same words and seed. Printed are the seconds of each, the greatest difference of a
pixel (0 is what is aimed at), and the peak memory of the process.
"""

from __future__ import annotations

import argparse
import resource
from typing import Any

import numpy as np
import torch

from benchmarks import full_architecture, sampling
from ldm_pipeline import LatentDiffusionPipeline, LatentDiffusionXLPipeline


def main() -> None:
    """Draw with both and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="sd15", choices=tuple(full_architecture.UNETS))
    parser.add_argument("--side", type=int, default=256, help="of the picture (%(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="(%(default)s)")
    args = parser.parse_args()
    stock = full_architecture.opened(args.model, torch.bfloat16)
    stock.vae.to(torch.bfloat16)
    ours = LatentDiffusionXLPipeline if args.model == "sdxl" else LatentDiffusionPipeline
    pictures: dict[str, Any] = {}
    print(sampling.machine("cpu"))
    print(f"{args.model}, {args.side} x {args.side}, {args.steps} steps with guidance, bfloat16")
    for name, pipe in (("ours", ours(**stock.components)), ("stock", stock)):
        pipe.set_progress_bar_config(disable=True)

        def draw(name: str = name, pipe: Any = pipe) -> None:
            pictures[name] = pipe(
                "a red star",
                negative_prompt="a blue house",
                height=args.side,
                width=args.side,
                num_inference_steps=args.steps,
                generator=torch.Generator().manual_seed(1),
                output_type="np",
            ).images

        print(f"{name}: {sampling.seconds(draw, torch.device('cpu')):.1f} s", flush=True)
    away = np.abs(pictures["ours"] - pictures["stock"]).max()
    print(f"greatest difference of a pixel in [0, 1]: {away}; spread {pictures['ours'].std():.3f}")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    main()
