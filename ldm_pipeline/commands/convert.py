"""`ldm convert`: a model folder as one file in the original layout, or such a file as a folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ldm_pipeline.commands.sources import BUNDLED
from ldm_pipeline.errors import UserError
from ldm_pipeline.models import bundled
from ldm_pipeline.models.headers import read_header
from ldm_pipeline.models.original.checkpoint import check_name
from ldm_pipeline.models.original.families import family_of

PURPOSE = "turn a model folder into one file in the original layout, or back"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add("source", type=Path, metavar="IN", help="a folder in Diffusers layout, bundled, or a file")
    add("target", type=Path, metavar="OUT", help="a .safetensors file, or a folder; not there yet")
    add(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="where CLIP's vocabulary lies, if the file does not carry it (the hub's cache)",
    )
    add(
        "--prediction-type",
        metavar="NAME",
        help="what the file's UNet predicts, epsilon or v_prediction, if it does not say",
    )


def run(args: argparse.Namespace) -> None:
    """Write the target and print its name on stdout; what had no place there, on stderr."""
    source, target = args.source.expanduser(), args.target.expanduser()
    if str(source) == BUNDLED and not source.exists():
        source = bundled.folder()
    check(args, source, target)
    # Only now: torch is imported.
    from ldm_pipeline.models.original import convert

    if source.is_dir():
        dropped = convert.to_file(source, target)
        if dropped:
            print(f"ldm: left out, the layout has no place: {', '.join(dropped)}", file=sys.stderr)
    else:
        from ldm_pipeline.models.original import build
        from ldm_pipeline.models.original.checkpoint import open_single_file

        checkpoint = open_single_file(
            source, prediction_type=args.prediction_type, tokenizer=args.tokenizer
        )
        build.check(checkpoint)
        surplus = convert.to_folder(checkpoint, target)
        if surplus:
            print(
                f"ldm: {surplus} tensors that Diffusers has no place for are in"
                f" {target / convert.SURPLUS}, for the way back",
                file=sys.stderr,
            )
    print(target)


def check(args: argparse.Namespace, source: Path, target: Path) -> None:
    """Refuse what cannot be converted, by names and by a file's header."""
    if not source.exists():
        raise UserError(f"there is no {source}; convert takes a folder, bundled or a .safetensors")
    if target.exists():
        raise UserError(f"{target} is there already; name another, or move it away")
    if not target.absolute().parent.is_dir():
        raise UserError(f"there is no folder {target.absolute().parent} to write to")
    if source.is_dir() and target.suffix != ".safetensors":
        raise UserError(f"{target} must end in .safetensors: a folder is converted to one file")
    if source.is_file() and target.suffix == ".safetensors":
        raise UserError(f"{target} must be a folder: a file is converted to one")
    if source.is_dir() and (args.tokenizer or args.prediction_type):
        raise UserError("--tokenizer and --prediction-type are for files; a folder has them itself")
    if args.tokenizer is not None and not args.tokenizer.is_dir():
        raise UserError(
            f"--tokenizer={args.tokenizer} is no folder; name one with CLIP's tokenizer"
        )
    if not source.is_dir():
        check_name(source)
        family_of(source, read_header(source).shapes)
