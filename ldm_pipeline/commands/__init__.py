"""The sub-commands of `ldm`, one module each.

Every module has `PURPOSE` (one line for the list of commands), `add_arguments(parser)` and
`run(args) -> None`, which raises `UserError` for a person's mistake. Importing one pulls in no
torch and no numpy, and `run` refuses what it can before it imports them: a refused argument
answers at once.
"""

from __future__ import annotations

import argparse
from typing import Protocol


class Command(Protocol):
    """What each module of this package offers."""

    PURPOSE: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""

    def run(self, args: argparse.Namespace) -> None:
        """Do it; `UserError` for a person's mistake."""
