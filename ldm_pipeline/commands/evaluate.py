"""`ldm evaluate`: how often a model draws what the words say, by the world's judge."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm_pipeline.commands.flags import in_flags
from ldm_pipeline.commands.generate import (
    SMALLER_MODEL,
    add_model_arguments,
    check_place,
    pick_device,
)
from ldm_pipeline.commands.outputs import check_folder
from ldm_pipeline.commands.sources import (
    Source,
    find,
    find_decoder,
    open_pipeline,
    scheduler_config,
    unet_config,
)
from ldm_pipeline.commands.steps import (
    BUNDLED_USUAL,
    add_step_arguments,
    check_eta,
    check_lcm,
    check_steps,
    is_few_step,
    settle_steps,
)
from ldm_pipeline.errors import UserError
from ldm_pipeline.request import MAX_SEED, SIZE_STEP, Request
from ldm_pipeline.too_large import in_memory

PURPOSE = "measure how well a model draws the picture world, with 95 % intervals"

MOST = 100_000
"""Prompts; the intervals are then below a third of a percent, and a CPU draws for days."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add("--prompts", type=int, default=500, help="prompts for each figure (%(default)s)")
    add("--seed", type=int, default=0, help="the first picture's seed (%(default)s)")
    add_step_arguments(parser)
    add("--batch-size", type=int, default=16, help="pictures drawn at once (%(default)s)")
    add("--out", type=Path, metavar="DIR", help="also write the figures as JSON and a grid there")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Draw, judge, and print the figures on stdout."""
    for name in ("prompts", "batch_size"):
        if not 1 <= getattr(args, name) <= MOST:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag}={getattr(args, name)} must be from 1 to {MOST}")
    if args.seed > MAX_SEED - args.prompts:
        raise UserError(f"--seed={args.seed} is too large; with each picture it counts up")
    source = find(args.model)
    # What was not distilled is drawn as the bundled model is, so that figures compare.
    distilled = args.lcm or is_few_step(scheduler_config(source))
    settle_steps(args, usual=None if distilled else BUNDLED_USUAL)
    check_eta(args.eta, args.sampler, args.lcm)
    with in_flags():
        Request(
            prompt="a red star",
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            sampler=args.sampler,
            eta=args.eta,
            seed=args.seed,
            lcm=args.lcm,
        )
    check_place(args.device, args.dtype)
    if args.out is not None:
        check_folder(args.out)
    note = check_lcm(args.lcm, source)
    check_steps(args.steps, args.sampler, note, scheduler_config(source))
    decoder = find_decoder(args.decoder, source)
    _check_side(source)

    device, dtype = pick_device(args.device, args.dtype)
    with in_memory("while the model was opened", SMALLER_MODEL):
        pipeline = open_pipeline(source, device, dtype, decoder)

    from ldm_pipeline.evaluation.report import evaluate

    with in_memory("while pictures were drawn", "try a smaller --batch-size, or --dtype bfloat16"):
        report = evaluate(
            pipeline,
            prompts=args.prompts,
            seed=args.seed,
            steps=args.steps,
            guidance=args.guidance,
            lcm=args.lcm,
            sampler=args.sampler,
            eta=args.eta,
            decoder=args.decoder,
            batch_size=args.batch_size,
            out=args.out,
        )
    print(report)


def _check_side(source: Source) -> None:
    """Refuse a model of other pictures than the judge reads, as far as its configuration tells."""
    from ldm_pipeline.data.world.scene import CANVAS

    side = (unet_config(source) or {}).get("sample_size")
    if isinstance(side, int) and side * SIZE_STEP != CANVAS:
        own = side * SIZE_STEP
        raise UserError(
            f"--model={source.name} draws pictures of {own}x{own}, and the judge reads those of the"
            f" picture world, {CANVAS}x{CANVAS}; name a model of that world"
        )
