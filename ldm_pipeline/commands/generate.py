"""`ldm generate`: pictures from words, and out of pictures or into them.

Every picture is drawn by itself, with its own seed: so each file's recipe is complete, and the
command that `ldm show` prints gives the same bytes, whether the picture was drawn alone or as
one of a hundred. Each file appears complete or not at all, as soon as it is drawn.
"""

from __future__ import annotations

import argparse
import re
import secrets
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_pipeline.commands import memory as memory_flags
from ldm_pipeline.commands import pictures
from ldm_pipeline.commands.adapters import read_loras, taught_words
from ldm_pipeline.commands.digests import digests_of
from ldm_pipeline.commands.flags import in_flags
from ldm_pipeline.commands.outputs import check_picture
from ldm_pipeline.commands.sources import (
    BUNDLED,
    Source,
    find,
    find_decoder,
    open_pipeline,
    scheduler_config,
)
from ldm_pipeline.commands.steps import (
    add_step_arguments,
    check_eta,
    check_lcm,
    check_steps,
    settle_steps,
)
from ldm_pipeline.errors import UserError, choose
from ldm_pipeline.grid import captioned_grid, columns_for, least_height
from ldm_pipeline.memory import Memory
from ldm_pipeline.metadata import Recipe, installed_versions
from ldm_pipeline.models.prompt_syntax import parse
from ldm_pipeline.picture_files import check_fits, save_picture
from ldm_pipeline.request import Request
from ldm_pipeline.too_large import in_memory
from ldm_pipeline.values import DTYPES

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm_pipeline.pipeline import LatentDiffusionPipeline

PURPOSE = "draw pictures from words"

LONGEST_PROMPTS = 2**26
"""Bytes of a file of prompts: a million of 64. Endless ones, such as /dev/zero, are no files."""

DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")
SMALLER_MODEL = (
    "try --dtype bfloat16 (float16 on a GPU), --offload layers there, or a smaller model"
)
SMALLER = (
    "try a smaller --height and --width, --tiling, --attention sliced, --dtype bfloat16 (float16 on"
    " a GPU), or --offload layers there"
)
"""What to do where the memory does not suffice."""
Say = Callable[[str], None]
"""Where progress goes: stderr, or nowhere."""


@dataclass(frozen=True)
class Job:
    """One picture to draw, and the file that it goes to (None inside a grid)."""

    prompt: str
    seed: int
    file: Path | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add("prompt", nargs="*", help="what to draw; several prompts give several files, numbered")
    add(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="a .png, .webp or .jpg (a .png named by the words and the seed)",
    )
    add("--prompts", type=Path, metavar="FILE", help="draw the lines of a text file, too")
    add("--n", type=int, default=1, help="pictures for each prompt (%(default)s)")
    add("--grid", action="store_true", help="one captioned picture instead of several files")
    add(
        "--seed",
        type=int,
        help="the first picture's seed, from which the next ones count on (random)",
    )
    add_drawing_arguments(parser)
    pictures.add_arguments(parser)
    add("-q", "--quiet", action="store_true", help="print nothing but the files' names")


def add_drawing_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what decides a picture besides its prompt and seed; `batch` takes the same."""
    add = parser.add_argument
    add("--negative", metavar="TEXT", help="what to keep out of the picture")
    add(
        "--plain",
        action="store_true",
        help="read brackets and BREAK as words, and cut prompts at the model's length; without, "
        "(word:1.3) and [word] weigh words, and prompts may be of any length",
    )
    add_step_arguments(parser)
    add("--height", type=int, help="pixels, a multiple of 8 (the model's own)")
    add("--width", type=int, help="pixels, a multiple of 8 (the model's own)")
    add(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="a LoRA to draw with, and how strongly (1); may be given several times",
    )
    add_model_arguments(parser)
    memory_flags.add_arguments(parser)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare which model to use, where and how precisely; `evaluate` takes the same."""
    add = parser.add_argument
    add(
        "--model",
        default=BUNDLED,
        help="a folder in Diffusers layout, a .safetensors file, or a hub id (%(default)s)",
    )
    add(
        "--decoder",
        metavar="FOLDER",
        help="a small autoencoder (AutoencoderTiny) in place of the model's own, which draws sooner"
        " and a little less exactly; small is the bundled model's, where it has one",
    )
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps or xpu; auto takes a GPU if any")
    add("--dtype", default="auto", help=f"one of {', '.join(DTYPES)}; auto is float32 on a CPU")


def run(args: argparse.Namespace) -> None:
    """Draw, write the files and print their names on stdout."""
    prompts = [*args.prompt, *(read_prompts(args.prompts) if args.prompts else [])]
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise UserError('nothing to draw: give a prompt, as in ldm generate "a red star"')
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    settle_steps(args, pictures.paints(args))
    pictures.check(args)
    check_drawing(args, prompts, seed)
    loras = read_loras(args.lora)
    memory = memory_flags.read(args)
    given = pictures.read(args)
    jobs = plan(args, prompts, seed)
    source = find(args.model)
    pictures.check_model(args, source)
    note = check_lcm(args.lcm, source)
    check_steps(args.steps, args.sampler, note, scheduler_config(source))
    decoder = find_decoder(args.decoder, source)
    say: Say = (lambda line: None) if args.quiet else (lambda line: print(line, file=sys.stderr))
    if source.bundled:
        texts = [*prompts, *([args.negative] if args.negative else [])]
        warn_of_unknown_words(texts, not args.plain, taught_words(loras))

    device, dtype = pick_device(args.device, args.dtype)
    memory = memory_flags.resolve(memory, device, dtype)
    recipe = recipe_of(args, prompts, seed, loras, device, dtype, memory)
    recipe = replace(
        recipe,
        origin=given.origin if given is not None else None,
        digests=digests_of(source, loras, args.lcm, args.decoder),
    )
    output = check_output(args, prompts, seed)
    if args.grid:
        check_fits(output, recipe, least_height(len(prompts), args.n))
    else:
        for prompt in prompts:
            check_fits(output, replace(recipe, prompts=(prompt,)))
    pipeline = open_adapted(source, device, dtype, loras, decoder, memory)
    if given is not None:
        origin = pictures.settled(given.origin, pipeline.request_class.tasks)
        recipe = replace(recipe, origin=origin)
    pipeline.set_progress_bar_config(disable=args.quiet or len(jobs) > 1 or not sys.stderr.isatty())
    sampler = args.sampler or ("lcm" if args.lcm else "the model's sampler")
    steps = "1 step" if args.steps == 1 else f"{args.steps} steps"
    say(f"seed {seed}, {steps}, {sampler}, {device} {dtype}")
    began = time.perf_counter()
    drawn = draw(pipeline, jobs, args, given, say)
    if args.grid:
        write_grid(list(drawn), jobs, recipe, output)
    else:
        for job, picture in zip(jobs, drawn, strict=True):
            assert job.file is not None
            alone = replace(recipe, prompts=(job.prompt,), seed=job.seed, n=1)
            save_picture(picture, job.file, replace(alone, size=(picture.height, picture.width)))
            print(job.file, flush=True)
    say(f"{len(jobs)} drawn in {time.perf_counter() - began:.1f} s")


def recipe_of(
    args: argparse.Namespace,
    prompts: Sequence[str],
    seed: int,
    loras: tuple[tuple[str, float], ...],
    device: str,
    dtype: str,
    memory: Memory,
) -> Recipe:
    """What the arguments come to; the size is told by the picture."""
    return Recipe(
        prompts=tuple(prompts),
        seed=seed,
        steps=args.steps,
        guidance=args.guidance,
        size=(0, 0),
        device=device,
        dtype=dtype,
        model=args.model,
        sampler=args.sampler,
        eta=args.eta,
        decoder=args.decoder,
        negative=args.negative,
        n=args.n,
        grid=args.grid,
        loras=loras,
        lcm="" if args.lcm is True else args.lcm or None,
        weighted=not args.plain,
        memory=memory.seen,
        versions=installed_versions(),
    )


# What is checked before anything is loaded ------------------------------------------------------


def check_drawing(args: argparse.Namespace, prompts: Sequence[str], seed: int) -> None:
    """Refuse what cannot be drawn: `UserError`, in the words of this command's flags."""
    check_eta(args.eta, args.sampler, args.lcm)
    with in_flags():
        Request(
            prompt=list(prompts),
            negative_prompt=args.negative,
            num_images_per_prompt=args.n,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            sampler=args.sampler,
            eta=args.eta,
            height=args.height,
            width=args.width,
            seed=seed,
            lcm=args.lcm,
            image=True if args.image else None,  # what it shows is checked when it is read
            mask_image=True if pictures.paints(args) else None,
            strength=args.strength,
            padding_mask_crop=args.crop,
        )
    check_place(args.device, args.dtype)


def check_place(device: str, dtype: str) -> None:
    """Refuse names of devices and dtypes that do not exist; whether they are here, torch knows."""
    choose("--dtype", dtype, ("auto", *DTYPES))
    kind, colon, index = device.partition(":")
    choose("--device", kind, DEVICES)
    if colon and not (index.isdecimal() and kind not in ("auto", "cpu")):
        raise UserError(f"--device={device!r} is not known; name one as in cuda:1")


def read_prompts(path: Path) -> list[str]:
    """The prompts in a text file, one a line; empty lines and # comments are skipped."""
    lines = [line for _, line in read_lines(path) if not line.startswith("#")]
    if not lines:
        raise UserError(f"there is no prompt in {path}")
    return [line.strip() for line in lines]


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not empty, with their numbers from 1."""
    try:
        with path.open("rb") as file:
            raw = file.read(LONGEST_PROMPTS + 1)
        lines = raw.decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = "not a text file" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UserError(f"cannot read the prompts in {path}: {reason}") from error
    if len(raw) > LONGEST_PROMPTS:
        raise UserError(
            f"cannot read the prompts in {path}: more than {LONGEST_PROMPTS:,} bytes; share them"
            " out among several files"
        )
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def check_output(args: argparse.Namespace, prompts: Sequence[str], seed: int) -> Path:
    """The file that -o names, or one named after the first prompt and the seed, so that another
    picture of the same words does not replace it; writable, else `UserError`."""
    if args.output is not None:
        return check_picture(args.output)
    words = re.findall(r"\w+", prompts[0].lower())
    stem = "-".join(words)[:60].strip("-") or "picture"
    return check_picture(Path(f"{stem}-{seed}.png"))


def plan(args: argparse.Namespace, prompts: Sequence[str], seed: int) -> list[Job]:
    """Every picture of the run in order, prompt by prompt, with consecutive seeds."""
    output = check_output(args, prompts, seed)
    wanted = [prompt for prompt in prompts for _ in range(args.n)]
    if args.grid:
        return [Job(prompt, seed + k, None) for k, prompt in enumerate(wanted)]
    if len(wanted) == 1:
        return [Job(wanted[0], seed, output)]
    digits = len(str(len(wanted)))
    files = [output.with_stem(f"{output.stem}-{k + 1:0{digits}}") for k in range(len(wanted))]
    for file in files:
        if file.is_dir():
            raise UserError(f"cannot write {file}: it is a folder")
    return [Job(p, seed + k, f) for k, (p, f) in enumerate(zip(wanted, files, strict=True))]


def words_of(prompt: str) -> str:
    """The words of a weighted prompt, without its syntax."""
    return " ".join(part.text for section in parse(prompt).sections for part in section)


def warn_of_unknown_words(
    prompts: Sequence[str], weighted: bool = False, taught: Collection[str] = ()
) -> None:
    """Name on stderr the words that the bundled model never learnt, with the nearest it knows, but
    for those that LoRAs have `taught` it."""
    from difflib import get_close_matches

    from ldm_pipeline.data.world import VOCABULARY

    prompts = [words_of(prompt) for prompt in prompts] if weighted else prompts
    known = {word.lower() for word in VOCABULARY} | {*taught}
    words = dict.fromkeys(word for p in prompts for word in re.findall(r"[^\W\d_]+", p.lower()))
    for word in words:
        if word not in known:
            near = get_close_matches(word, sorted(known), n=3, cutoff=0.6)
            hint = f"; the nearest it knows: {', '.join(near)}" if near else ""
            print(f"ldm: the bundled model never learnt {word!r}{hint}", file=sys.stderr)


# The drawing --------------------------------------------------------------------------------


def pick_device(device: str, dtype: str) -> tuple[str, str]:
    """The device and dtype to use, "auto" resolved; `UserError` for one that is not here."""
    import torch

    here = {"cuda": torch.cuda, "mps": torch.backends.mps, "xpu": torch.xpu}
    kind, _, index = device.partition(":")
    if kind == "auto":
        kind = device = next((name for name, part in here.items() if part.is_available()), "cpu")
    elif kind != "cpu" and not here[kind].is_available():
        raise UserError(f"--device={device}: torch finds no such device on this machine")
    elif index and kind == "cuda" and int(index) >= torch.cuda.device_count():
        raise UserError(f"--device={device}: this machine has {torch.cuda.device_count()}")
    if dtype == "auto":
        dtype = "float32" if kind in ("cpu", "mps") else "float16"
    if kind == "cpu" and dtype == "bfloat16":
        from ldm_pipeline.models.precision import emulates_bfloat16

        if emulates_bfloat16():
            print(
                "ldm: this CPU emulates bfloat16, which takes some 30 times as long as --dtype"
                " float32",
                file=sys.stderr,
            )
    return device, dtype


def open_adapted(
    source: Source,
    device: str,
    dtype: str,
    loras: tuple[tuple[str, float], ...],
    decoder: Path | None,
    memory: Memory,
) -> LatentDiffusionPipeline:
    """The loaded pipeline with adapters and decoder, arranged; `UserError` where one misfits."""
    place = "cpu" if memory.offload != "none" else device
    with in_memory("while the model was opened", SMALLER_MODEL):
        pipeline = open_pipeline(source, place, dtype, decoder)
        if loras:
            from ldm_pipeline.lora.attach import attach

            attach(pipeline, loras)
        return pipeline.arrange(memory, device)


@contextmanager
def in_numbers(job: Job) -> Iterator[None]:
    """Raise `UserError` where pixels are to be made of what is no number, instead of a warning."""
    import numpy as np

    try:
        with np.errstate(invalid="raise"):
            yield
    except FloatingPointError as error:
        raise UserError(
            f"{job.prompt!r} with seed {job.seed} gave no picture, but values that are not numbers;"
            " lower --guidance and the weights of --lora, or draw with --dtype float32"
        ) from error


def draw(
    pipeline: LatentDiffusionPipeline,
    jobs: Sequence[Job],
    args: argparse.Namespace,
    given: pictures.Given | None,
    say: Say,
) -> Iterator[Image]:
    """The pictures of `jobs`, one after the other, each drawn when it is asked for."""
    for k, job in enumerate(jobs):
        if len(jobs) > 1:
            say(f"{k + 1}/{len(jobs)} {job.prompt}")
        with in_memory("while a picture was drawn", SMALLER), in_numbers(job):
            result = pipeline(
                job.prompt,
                negative_prompt=args.negative,
                num_inference_steps=args.steps,
                guidance_scale=args.guidance,
                sampler=args.sampler,
                eta=args.eta,
                seed=job.seed,
                lcm=args.lcm,
                weighted=not args.plain,
                **(given.arguments() if given else {"height": args.height, "width": args.width}),
            )
        picture = result.images[0]
        yield given.trimmed(picture) if given else picture


def write_grid(drawn: Sequence[Image], jobs: Sequence[Job], recipe: Recipe, output: Path) -> None:
    """Write one captioned grid."""
    columns = columns_for(len(recipe.prompts), recipe.n)
    seeds = recipe.n > 1
    captions = [f"{job.prompt} (seed {job.seed})" if seeds else job.prompt for job in jobs]
    size = (drawn[0].height, drawn[0].width)
    save_picture(captioned_grid(drawn, captions, columns), output, replace(recipe, size=size))
    print(output, flush=True)
