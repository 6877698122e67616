"""`ldm dataset world`: the procedural picture world as an ordinary folder of captioned images."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from ldm_pipeline.commands.outputs import check_folder
from ldm_pipeline.errors import UserError, choose

PURPOSE = "write a dataset of captioned pictures"

SPLITS = ("train", "test", "unseen pairs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add("name", help="which dataset: world")
    add("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    add("--n", type=int, default=1000, help="number of pictures (%(default)s)")
    add("--seed", type=int, default=0, help="another seed gives other pictures (%(default)s)")
    add("--split", default="train", help=f"one of {', '.join(SPLITS)} (%(default)s)")


def run(args: argparse.Namespace) -> None:
    """Write the pictures and metadata.jsonl, and print the folder on stdout."""
    choose("dataset", args.name, ("world",))
    choose("--split", args.split, SPLITS)
    if args.n < 1:
        raise UserError(f"--n={args.n} must be at least 1")
    if args.seed < 0:
        raise UserError(f"--seed={args.seed} must be at least 0")
    check_folder(args.out)

    from ldm_pipeline.data.world import write_folder

    began = time.perf_counter()
    write_folder(args.out, args.n, args.seed, args.split)
    print(f"{args.n} pictures in {time.perf_counter() - began:.1f} s", file=sys.stderr)
    print(args.out)
