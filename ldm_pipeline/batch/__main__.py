"""The batch program: every picture of a file of prompts, once, on as many processes as there are.

    accelerate launch -m ldm_pipeline.batch --prompts FILE --out DIR     on all GPUs
    python -m ldm_pipeline.batch --prompts FILE --out DIR                on one

The same command again draws what is missing. Exit codes are those of `ldm`.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_pipeline.batch.orders import Order, once, read_orders, share
from ldm_pipeline.cli import Parser, ended
from ldm_pipeline.commands import memory as memory_flags
from ldm_pipeline.commands import pictures
from ldm_pipeline.commands.adapters import read_loras, taught_words
from ldm_pipeline.commands.digests import digests_of
from ldm_pipeline.commands.generate import (
    Job,
    add_drawing_arguments,
    draw,
    open_adapted,
    pick_device,
    warn_of_unknown_words,
)
from ldm_pipeline.commands.sources import Source, find, find_decoder, scheduler_config
from ldm_pipeline.commands.steps import check_lcm, check_steps
from ldm_pipeline.errors import UserError, choose
from ldm_pipeline.memory import Memory
from ldm_pipeline.picture_files import FORMATS, check_fits, is_whole, save_picture
from ldm_pipeline.processes.lock import alone_in, check_writable

if TYPE_CHECKING:
    from ldm_pipeline.processes.ranks import Ranks

PROGRAM = "python -m ldm_pipeline.batch"
LEFT_OVER = re.compile(r"\.[0-9a-f]{16}-\d+\.\w+\.\d+\.tmp")
"""What a killed process leaves of a picture in the making."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with `arguments` (default: the process's own) and return the exit code."""
    told = sys.argv[1:] if arguments is None else arguments
    return ended("ldm_pipeline.batch", lambda: run(parser().parse(told)))


def parser() -> Parser:
    """What the program takes: what `ldm generate` does, without a prompt and a file of its own."""
    made = Parser(PROGRAM, "draw every prompt of a file, on one or many processes")
    add = made.add_argument
    add("--prompts", type=Path, required=True, metavar="FILE",
        help="a text file, one prompt a line, or a .jsonl file, whose lines may also set negative, "
        "sampler, seed, n, steps, guidance, height and width")  # fmt: skip
    add("--out", type=Path, required=True, metavar="DIR", help="where the pictures go")
    add("--format", default="png", help="png, webp or jpg (%(default)s)")
    add("--n", type=int, default=1, help="pictures for each prompt (%(default)s)")
    add("--seed", type=int, default=0, help="each prompt's first seed (%(default)s)")
    add_drawing_arguments(made)
    add("-q", "--quiet", action="store_true", help="print nothing but the folder's name")
    made.set_defaults(grid=False, **pictures.NONE)
    return made


def run(args: argparse.Namespace) -> None:
    """Check what is asked for, find the other processes, and draw this one's share."""
    choose("--format", args.format, [ending.removeprefix(".") for ending in FORMATS])
    orders = read_orders(args)
    loras = read_loras(args.lora)
    memory = memory_flags.read(args)
    source = find(args.model)
    pictures.check_model(args, source)
    note, scheduler = check_lcm(args.lcm, source), scheduler_config(source)
    for order in orders:
        check_steps(order.args.steps, order.args.sampler, note, scheduler)
    find_decoder(args.decoder, source)
    check_writable(args.out, "--out")

    from ldm_pipeline.processes.ranks import Ranks, launched, leave
    from ldm_pipeline.processes.start import start_the_others

    start_the_others()
    asked = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: tidy up
    try:
        state = launched()
        ranks = Ranks(state)
        if ranks.count > 1 and args.device in ("auto", state.device.type):  # each its own
            args.device = str(state.device)
        with alone_in(args.out, "--out", ranks):
            _draw_all(args, orders, source, loras, memory, ranks)
        if ranks.index == 0:
            print(args.out, flush=True)
    finally:
        signal.signal(signal.SIGTERM, asked)
        leave()


def _draw_all(
    args: argparse.Namespace,
    orders: Sequence[Order],
    source: Source,
    loras: tuple[tuple[str, float], ...],
    memory: Memory,
    ranks: Ranks,
) -> None:
    """Draw this process's share of what is missing, and wait for the others."""
    device, dtype = pick_device(args.device, args.dtype)
    memory = memory_flags.resolve(memory, device, dtype)
    used = digests_of(source, loras, args.lcm, args.decoder)
    recipes = [
        replace(order.recipe(loras, device, dtype, memory), digests=used) for order in orders
    ]
    names = [order.name(recipe) for order, recipe in zip(orders, recipes, strict=True)]
    files = [args.out / f"{name}.{args.format}" for name in names]
    wanted = once(names)
    for i in wanted:
        check_fits(files[i], recipes[i])
    args.out.mkdir(parents=True, exist_ok=True)  # other machines may share no disk with the first
    missing = _missing(args.out, files, wanted, ranks)
    mine = share(missing, ranks.index, ranks.count)
    if ranks.index == 0 and not args.quiet:
        _say_what(len(orders), len(wanted), len(missing), ranks.count)
        if source.bundled:
            texts = [
                text for order in orders for text in (order.prompt, order.args.negative) if text
            ]
            warn_of_unknown_words(texts, not args.plain, taught_words(loras))
    if mine:
        decoder = find_decoder(args.decoder, source)
        pipeline = open_adapted(source, device, dtype, loras, decoder, memory)
        pipeline.set_progress_bar_config(disable=True)
    with _bar([files[i] for i in missing], args.quiet or ranks.index > 0) as tick:
        for i in mine:
            job = Job(orders[i].prompt, orders[i].seed, files[i])
            (picture,) = draw(pipeline, [job], orders[i].args, None, lambda line: None)
            size = (picture.height, picture.width)
            save_picture(picture, files[i], replace(recipes[i], size=size))
            tick()
        _wait(ranks.wait)
        tick()


def _missing(out: Path, files: Sequence[Path], wanted: Sequence[int], ranks: Ranks) -> list[int]:
    """Which of the `wanted` files are not there, or not whole; every process looks at some.

    All get the same answer, and nobody draws before it is known. What killed processes left in the
    folder is removed.
    """
    if ranks.index == 0:
        for path in out.iterdir():
            if LEFT_OVER.fullmatch(path.name):
                path.unlink(missing_ok=True)
    found = [i for i in share(wanted, ranks.index, ranks.count) if not is_whole(files[i])]
    return sorted(i for told in ranks.told(json.dumps(found)) for i in json.loads(told))


def _wait(for_all: Callable[[], None]) -> None:
    """Until every process is done; `UserError` where one has ended before that."""
    try:
        for_all()
    except ConnectionError as error:
        raise UserError(
            "another process has ended before its work was done; the same command draws what is"
            " missing"
        ) from error


def _say_what(asked: int, wanted: int, missing: int, processes: int) -> None:
    """How many pictures there are to draw, and why not more."""
    twice = f", {asked - wanted} of them more than once" if asked > wanted else ""
    there = f", {wanted - missing} are there" if wanted > missing else ""
    on = f" on {processes} processes" if processes > 1 else ""
    print(f"{asked} pictures asked for{twice}{there}; {missing} to draw{on}", file=sys.stderr)


@contextmanager
def _bar(files: Sequence[Path], hidden: bool) -> Iterator[Callable[[], None]]:
    """A bar over the pictures of all processes, and what counts those that have appeared."""
    from tqdm import tqdm

    waiting = list(files)
    shown = tqdm(total=len(files), unit="picture", disable=True if hidden else None)

    def tick() -> None:
        if not shown.disable:
            waiting[:] = [file for file in waiting if not file.exists()]
            shown.update(len(files) - len(waiting) - shown.n)

    with shown:
        yield tick


if __name__ == "__main__":
    sys.exit(main())
