"""`ldm show`: the command that draws a picture again, from the recipe inside its file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ldm_pipeline.commands.digests import changed
from ldm_pipeline.metadata import installed_versions
from ldm_pipeline.picture_files import read_recipe

PURPOSE = "print the command that draws a picture again, byte for byte"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("picture", type=Path, help="a .png, .webp or .jpg that ldm drew")


def run(args: argparse.Namespace) -> None:
    """Print the command on stdout; say on stderr where other versions drew the picture,
    or with other adapters, or out of other pictures, than are here now."""
    recipe = read_recipe(args.picture)
    print(recipe.command(str(args.picture)))
    for line in changed(recipe):
        print(f"ldm: {line}", file=sys.stderr)
    here = installed_versions(list(recipe.versions))
    for package, drawn in recipe.versions.items():
        if here[package] != drawn:
            print(
                f"ldm: drawn with {package} {drawn}, here is {here[package]}: "
                "single pixels may round differently",
                file=sys.stderr,
            )
