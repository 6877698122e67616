"""`ldm dataset check`: what is in a dataset, and what training on it will take."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_pipeline.commands import info
from ldm_pipeline.commands.flags import in_flags
from ldm_pipeline.commands.sources import find, need_folder, unet_config
from ldm_pipeline.errors import UserError
from ldm_pipeline.models.hub import cached

if TYPE_CHECKING:
    from ldm_pipeline.data.buckets import Buckets
    from ldm_pipeline.data.check import Report

OF_BUCKETS = {"resolution": "--resolution", "width": "--resolution", "step": "--bucket-step"}
"""The command's name for what decides the sizes."""

VOCABULARIES = ("tokenizer.json", "vocab.json")


@dataclass(frozen=True)
class Trained:
    """The model that is to be trained: its name, its UNet's config, its tokenizer's folder."""

    name: str
    unet: dict[str, Any]
    tokenizer: Path | None = None


USUAL = Trained("Stable Diffusion 1.x", {"cross_attention_dim": 768, "sample_size": 64})
"""What is meant where none is named; the rest of its UNet's config are diffusers' defaults."""


def check_dataset(args: argparse.Namespace) -> None:
    """Print the report on stdout; leaves with exit code 1 where it found errors."""
    at_least(args, "batch_size", 1)
    buckets = _buckets(args)
    trained = USUAL if args.model is None else _trained(args.model)
    if args.tokenizer is not None:
        _check_tokenizer(args.tokenizer)
    tokenizer = args.tokenizer or trained.tokenizer

    from ldm_pipeline.data.check import Encoded, check

    report = check(
        args.places[0],
        buckets,
        args.batch_size,
        None if tokenizer is None else _count_with(tokenizer),
        args.alpha_masks,
        split=args.split,
        caption_key=args.caption_key,
        encoded=Encoded(
            trained.name,
            channels=trained.unet.get("out_channels", Encoded.channels),
            text_width=trained.unet["cross_attention_dim"],
        ),
    )
    print(replace(report, memory=_memory(report, trained)) if report.buckets else report)
    if report.errors or (args.strict and report.warnings):
        sys.stdout.flush()
        raise SystemExit(1)


def at_least(args: argparse.Namespace, name: str, least: int) -> None:
    """Refuse a number that is too small, by its flag."""
    value = getattr(args, name)
    if value < least:
        raise UserError(f"--{name.replace('_', '-')}={value} must be at least {least}")


def _buckets(args: argparse.Namespace) -> Buckets:
    """The sizes that the flags ask for; a refusal names the flag."""
    from ldm_pipeline.data.buckets import aspect_buckets, one_size

    with in_flags(OF_BUCKETS):
        side, upscale = args.resolution, args.upscale
        if args.fixed:
            return one_size(side, side, upscale=upscale)
        return aspect_buckets(side, args.bucket_step, upscale=upscale)


def _trained(name: str) -> Trained:
    """The model that --model names; `UserError` where too little of it can be told here."""
    source = find(name)
    need_folder(source)
    config = unet_config(source)
    if config is None:
        raise UserError(f"--model={name} has no UNet that is described here; ldm generate loads it")
    folder = source.folder or cached(source.name)
    tokenizer = None if folder is None else folder / "tokenizer"
    told = tokenizer is not None and any((tokenizer / each).is_file() for each in VOCABULARIES)
    return Trained(name, config, tokenizer if told else None)


def _memory(report: Report, trained: Trained) -> str:
    """What a step takes here, with a LoRA as the trainer makes it by itself."""
    import torch

    from ldm_pipeline.training.adapter_config import AdapterSettings
    from ldm_pipeline.training.footprint import footprint
    from ldm_pipeline.training.start import precision

    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings, half = AdapterSettings().settings(), precision("auto", device)
    size = max((size for size, _ in report.buckets), key=lambda size: size[0] * size[1])
    plain, spared = (
        footprint(
            trained.unet,
            settings,
            size,
            report.batch_size,
            precision=half,
            device=device,
            recomputed=recomputed,
        ).total
        for recomputed in (False, True)
    )
    told = "float32" if half == "no" else half
    return (
        f"about {info.size(plain)} in a step of a LoRA in {told}, {info.size(spared)} with"
        " gradient_checkpointing"
    )


def _check_tokenizer(folder: Path) -> None:
    """Refuse a folder without a vocabulary: transformers would go on with an empty one."""
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise UserError(
            f"--tokenizer={folder} holds no {' or '.join(VOCABULARIES)}; name the folder"
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
