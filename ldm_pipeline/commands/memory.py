"""How much memory drawing takes, on the command line: flags to a `Memory`.

There is no flag for slicing: a command draws its pictures one by one, so that there is no batch to
slice.
"""

from __future__ import annotations

import argparse

from ldm_pipeline.errors import UserError
from ldm_pipeline.memory import ATTENTION, OFFLOAD, QUANTISE, Memory
from ldm_pipeline.models import quantising


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what is given for less memory, or for speed."""
    add = parser.add_argument
    add(
        "--attention",
        default="auto",
        metavar="HOW",
        help=f"one of {', '.join(ATTENTION)}; auto is xformers where it runs on a GPU, else sdpa",
    )
    add(
        "--offload",
        default="none",
        metavar="WHAT",
        help=f"one of {', '.join(OFFLOAD)}: what lies in the computer's memory until the GPU needs"
        " it (%(default)s)",
    )
    add("--tiling", action="store_true", help="let the autoencoder take large pictures in tiles")
    add(
        "--quantise",
        default="none",
        metavar="TYPE",
        help=f"one of {', '.join(QUANTISE)}: round the UNet's weights to 8 bits (%(default)s)",
    )
    add("--compile", action="store_true", help="compile the UNet's attention: a wait, then speed")


def read(args: argparse.Namespace) -> Memory:
    """What the flags ask for; `UserError`, in their words, for what cannot be."""
    try:
        memory = Memory(
            attention=args.attention,
            offload=args.offload,
            tiling=args.tiling,
            quantise=args.quantise,
            compile=args.compile,
        )
        quantising.check(memory.quantise)
    except UserError as error:
        raise UserError(f"--{error}") from error
    if args.lcm and memory.offload != "none":
        raise UserError(
            "--lcm does not go with --offload; draw with the adapter as a LoRA: --lora FILE"
            " --sampler lcm --steps 4 --guidance 1"
        )
    return memory


def resolve(memory: Memory, device: str, dtype: str) -> Memory:
    """What it comes to on `device` (`models.arranging`); `UserError`, in the flags' words."""
    import torch

    from ldm_pipeline.models import arranging

    try:
        return arranging.resolve(memory, torch.device(device), getattr(torch, dtype))
    except UserError as error:
        raise UserError(f"--{error}") from error
