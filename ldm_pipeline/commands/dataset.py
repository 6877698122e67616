"""`ldm dataset world`, `concept`, `check`: write a folder of captioned pictures, or look at one.

Each kind is one `Kind` in `KINDS`, see `kinds`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm_pipeline.commands.kinds import REQUIRED, Kind, declare, run_kind
from ldm_pipeline.commands.outputs import check_folder
from ldm_pipeline.errors import UserError, choose

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
    "upscale": {"action": "store_true", "help": "enlarge pictures that are too small"},
    "alpha-masks": {"action": "store_true", "help": "masks are the pictures' alpha channels"},
    "caption-key": {"metavar": "NAME", "help": "where the captions of records are"},
    "tokenizer": {"type": Path, "metavar": "DIR", "help": "count tokens with this CLIP tokenizer"},
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


def check_dataset(args: argparse.Namespace) -> None:
    """Print the report on stdout; leaves with exit code 1 where it found errors."""
    from ldm_pipeline.data.buckets import aspect_buckets

    _at_least(args, "batch_size", 1)
    with _in_flags():
        buckets = aspect_buckets(args.resolution, args.bucket_step, upscale=args.upscale)
    if args.tokenizer is not None:
        _check_tokenizer(args.tokenizer)

    from ldm_pipeline.data.check import check

    tokens = None if args.tokenizer is None else _count_with(args.tokenizer)
    report = check(
        args.places[0],
        buckets,
        args.batch_size,
        tokens,
        args.alpha_masks,
        split=args.split,
        caption_key=args.caption_key,
    )
    print(report)
    if report.errors or (args.strict and report.warnings):
        sys.stdout.flush()
        raise SystemExit(1)


def _check_tokenizer(folder: Path) -> None:
    """Refuse a folder without a vocabulary: transformers would go on with an empty one."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(
            f"--tokenizer={folder} holds no tokenizer.json or vocab.json; name the folder"
            " `tokenizer` of a model"
        )


def _count_with(folder: Path) -> Callable[[str], int]:
    """A function that counts tokens as the CLIP tokenizer in `folder` does."""
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--tokenizer={folder} cannot be loaded: {reason}") from error
    return lambda text: len(tokenizer(text, verbose=False).input_ids)


def _check_output(args: argparse.Namespace) -> None:
    _at_least(args, "n", 1)
    _at_least(args, "seed", 0)
    check_folder(args.out)


def _write(args: argparse.Namespace, write: Callable[[], Path]) -> None:
    """Write, tell the time taken on stderr, and print the folder on stdout."""
    began = time.perf_counter()
    folder = write()
    print(f"{args.n} pictures in {time.perf_counter() - began:.1f} s", file=sys.stderr)
    print(folder)


def _at_least(args: argparse.Namespace, name: str, least: int) -> None:
    value = getattr(args, name)
    if value < least:
        raise UserError(f"--{name.replace('_', '-')}={value} must be at least {least}")


@contextmanager
def _in_flags() -> Iterator[None]:
    """Within the block, a refusal by the buckets names the command's flag."""
    try:
        yield
    except UserError as error:
        name, equals, rest = str(error).partition("=")
        flag = {"step": "--bucket-step"}.get(name, f"--{name}")
        raise UserError(f"{flag}{equals}{rest}") from error


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
            "upscale": False,
            "alpha-masks": False,
            "split": None,
            "caption-key": None,
            "tokenizer": None,
            "strict": False,
        },
        check_dataset,
        places="the dataset: `… check DIR`",
        least=1,
        most=1,
    ),
}
