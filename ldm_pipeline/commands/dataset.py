"""`ldm dataset world`, `concept`, `check`: write a folder of captioned pictures, or look at one.

Each kind is one `Kind` in `KINDS`, see `kinds`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm_pipeline.commands.dataset_check import at_least, check_dataset
from ldm_pipeline.commands.kinds import REQUIRED, Kind, declare, run_kind
from ldm_pipeline.commands.outputs import check_folder
from ldm_pipeline.errors import choose

PURPOSE = "write a dataset of captioned pictures, or check one"

SPLITS = ("train", "test", "unseen pairs")
CONCEPTS = ("cactus", "comic")

FLAGS: dict[str, dict[str, Any]] = {
    "name": {"help": f"one of {', '.join(CONCEPTS)}"},
    "out": {"type": Path, "metavar": "DIR", "help": "a new or empty folder"},
    "n": {"type": int, "help": "number of pictures"},
    "seed": {"type": int, "help": "another seed gives other pictures"},
    "split": {"help": f"world: one of {', '.join(SPLITS)}; check: of a table (train)"},
    "resolution": {"type": int, "help": "pixels; buckets have at most its square"},
    "bucket-step": {"type": int, "help": "sides of buckets are multiples of it"},
    "batch-size": {"type": int, "help": "pictures in a step"},
    "fixed": {"action": "store_true", "help": "one square size for all pictures"},
    "upscale": {"action": "store_true", "help": "enlarge pictures that are too small"},
    "alpha-masks": {"action": "store_true", "help": "masks are the pictures' alpha channels"},
    "caption-key": {"metavar": "NAME", "help": "where the captions of records are"},
    "tokenizer": {"type": Path, "metavar": "DIR", "help": "count tokens with this CLIP tokenizer"},
    "model": {"metavar": "MODEL", "help": "what will be trained: bundled, a folder or a hub id"},
    "strict": {"action": "store_true", "help": "a warning is as bad as an error"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    declare(parser, KINDS, FLAGS, "check: a folder, .tar, .parquet or hub id")


def run(args: argparse.Namespace) -> None:
    """Do what the kind says with its flags; `UserError` for those of another kind."""
    run_kind("dataset", KINDS, args)


def write_world(args: argparse.Namespace) -> None:
    """Write the pictures and metadata.jsonl, and print the folder on stdout."""
    choose("--split", args.split, SPLITS)
    _check_output(args)

    from ldm_pipeline.data.world import write_folder

    _write(args, lambda: write_folder(args.out, args.n, args.seed, args.split))


def write_concept(args: argparse.Namespace) -> None:
    """Write the pictures and metadata.jsonl, and print the folder on stdout."""
    choose("--name", args.name, CONCEPTS)
    _check_output(args)

    from ldm_pipeline.data.world import concepts

    _write(args, lambda: concepts.write_concept(args.out, args.name, args.n, args.seed))


def _check_output(args: argparse.Namespace) -> None:
    at_least(args, "n", 1)
    at_least(args, "seed", 0)
    check_folder(args.out)


def _write(args: argparse.Namespace, write: Callable[[], Path]) -> None:
    """Write, tell the time taken on stderr, and print the folder on stdout."""
    began = time.perf_counter()
    folder = write()
    print(f"{args.n} pictures in {time.perf_counter() - began:.1f} s", file=sys.stderr)
    print(folder)


KINDS = {
    "world": Kind(
        "write pictures of the procedural world",
        {"out": REQUIRED, "n": 1000, "seed": 0, "split": "train"},
        write_world,
    ),
    "concept": Kind(
        "write pictures of something that the bundled model has never seen, to train a LoRA on",
        {"name": REQUIRED, "out": REQUIRED, "n": 24, "seed": 0},
        write_concept,
    ),
    "check": Kind(
        "report what is in a dataset and what is wrong with it; exit code 1 for errors",
        {
            "resolution": 512,
            "bucket-step": 64,
            "batch-size": 1,
            "fixed": False,
            "upscale": False,
            "alpha-masks": False,
            "split": None,
            "caption-key": None,
            "model": None,
            "tokenizer": None,
            "strict": False,
        },
        check_dataset,
        places="the dataset: `… check DIR`",
        least=1,
        most=1,
    ),
}
