"""How much memory a step of a LoRA takes, beside what `ldm dataset check` tells. Run by hand:

    python -m benchmarks.training_memory [--model sd15|sdxl] [--sides 256 512] [--batch 1]

For each side, and with gradient checkpointing too, a process of its own takes three steps of
forward and backward on the full architecture with random weights, in bfloat16 on the CPU. Memory
does not depend on the weights.

Legend
    told     `footprint`'s number for what the forward pass keeps
    taken    how much the process grew while it took its last step, as the kernel counts it
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import torch

from benchmarks.full_architecture import BOTH_UNETS, UNETS, filled, unet
from benchmarks.memory import GIB, counted, forget_peak, peak
from ldm_pipeline.lora.inject import inject, without_input_casts
from ldm_pipeline.lora.targets import LoraSettings
from ldm_pipeline.models.unet import bind
from ldm_pipeline.training.footprint import MICRO_CONDITIONS, TOKENS, footprint
from ldm_pipeline.training.start import attend_quickly, recompute

SETTINGS = LoraSettings("attention", 16)
CPU = torch.device("cpu")
POOLED = 1280

FREED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""glibc then gives memory back as it is freed, so that the kernel counts what is in use."""


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="sd15", choices=UNETS, help="(%(default)s)")
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512], help="(256 and 512)")
    parser.add_argument("--batch", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--alone", action="store_true", help="one row's measure, in this process")
    parser.add_argument("--recomputed", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        print(taken(args.model, args.sides[0], args.batch, args.recomputed))
        return
    print(f"{args.model}, batch {args.batch}, bfloat16, GiB\n")
    print("| side | checkpointing | told | taken |\n|---|---|---|---|")
    config = {**BOTH_UNETS, **UNETS[args.model]}
    for side in args.sides:
        for recomputed in (False, True):
            told = footprint(
                config,
                SETTINGS,
                (side, side),
                args.batch,
                precision="bf16",
                recomputed=recomputed,
            ).kept
            words = [sys.executable, "-m", "benchmarks.training_memory", "--alone"]
            words += ["--model", args.model, "--sides", str(side), "--batch", str(args.batch)]
            words += ["--recomputed"] if recomputed else []
            environment = {**os.environ, **FREED_AT_ONCE}
            done = subprocess.run(words, stdout=subprocess.PIPE, check=True, env=environment)
            found = int(done.stdout.split()[-1])
            how = "yes" if recomputed else "no"
            print(f"| {side} | {how} | {told / GIB:.3f} | {found / GIB:.3f} |", flush=True)


def taken(name: str, side: int, batch: int, recomputed: bool) -> int:
    """How many bytes this process grows by in a step."""
    network = filled(lambda: unet(name), torch.bfloat16)
    attend_quickly(network, "bf16", "cpu")
    if recomputed:
        recompute(network)
    adapter = inject({"unet": network}, SETTINGS, seed=0)
    network.train()
    x, t = torch.randn(batch, 4, side // 8, side // 8), torch.zeros(batch, dtype=torch.long)
    width = UNETS[name]["cross_attention_dim"]
    embeds = torch.randn(batch, TOKENS, width, dtype=torch.bfloat16)
    ids = torch.randn(batch, MICRO_CONDITIONS)
    added = {"text_embeds": torch.randn(batch, POOLED), "time_ids": ids}
    call = bind(network, embeds, added_cond_kwargs=added if name == "sdxl" else None)
    grown = 0
    for _ in range(3):  # the first makes gradients, and libraries set themselves up
        before = counted("VmRSS")
        forget_peak(CPU)
        with torch.autocast("cpu", torch.bfloat16), without_input_casts(adapter):
            answer = call(x, t)
        answer.float().square().mean().backward()
        del answer
        grown = peak(CPU) - before
    return grown


if __name__ == "__main__":
    main()
