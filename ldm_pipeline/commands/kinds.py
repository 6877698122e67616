"""Commands that do several kinds of things: `ldm dataset check`, `ldm lora merge`.

Each kind is one `Kind`: its flags with their defaults, and the function that does it. All kinds of
a command share one parser, so that arguments may come in any order; a flag that another kind takes
is refused by name.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ldm_pipeline.errors import UserError, choose, suggestion

REQUIRED = object()
"""In place of a default: the flag has to be given."""


@dataclass(frozen=True)
class Kind:
    """One thing that a command does.

    `defaults` has the kind's flags (without dashes), each with its default or `REQUIRED`. Behind
    the kind stand at least `least` and at most `most` places (None: any number), which `places`
    calls by name, "" where there are none.
    """

    purpose: str
    defaults: Mapping[str, object]
    run: Callable[[argparse.Namespace], None]
    places: str = ""
    least: int = 0
    most: int | None = 0


def declare(
    parser: argparse.ArgumentParser,
    kinds: Mapping[str, Kind],
    flags: Mapping[str, Mapping[str, Any]],
    places: str,
) -> None:
    """Declare the kind, its places and all flags; what is not given stays out of the namespace."""
    purposes = "; ".join(f"{name}: {kind.purpose}" for name, kind in kinds.items())
    parser.add_argument("kind", help=purposes)
    parser.add_argument("places", nargs="*", metavar="place", help=places)
    for flag, declared in flags.items():
        own = {name: kind.defaults[flag] for name, kind in kinds.items() if flag in kind.defaults}
        shown = ", ".join(f"{name}{_shown(default)}" for name, default in own.items())
        told = {**declared, "help": f"{declared['help']} ({shown})"}
        parser.add_argument(f"--{flag}", default=argparse.SUPPRESS, **told)


def run_kind(command: str, kinds: Mapping[str, Kind], args: argparse.Namespace) -> None:
    """Do what the kind says with its flags; `UserError` for those of another kind."""
    kind = kinds[choose(command, args.kind, kinds)]
    kind.run(_of_kind(f"`ldm {command} {args.kind}`", args, kind))


def _of_kind(told: str, args: argparse.Namespace, kind: Kind) -> argparse.Namespace:
    """What was given, with the kind's defaults for the rest; `UserError` where it does not fit."""
    given = {name.replace("_", "-"): value for name, value in vars(args).items()}
    places = given.pop("places")
    del given["kind"]
    for flag in given:
        if flag not in kind.defaults:
            known = [f"--{name}" for name in kind.defaults]
            raise UserError(
                f"{told} takes no --{flag}, but {', '.join(known)}{suggestion(f'--{flag}', known)}"
            )
    values = {**kind.defaults, **given}
    missing = [f"--{flag}" for flag, value in values.items() if value is REQUIRED]
    if missing:
        raise UserError(f"{told} needs {', '.join(missing)}")
    if len(places) < kind.least:
        raise UserError(f"{told} needs {kind.places}")
    if kind.most is not None and len(places) > kind.most:
        taken = [kind.places] * bool(kind.places) + [f"--{flag}" for flag in kind.defaults]
        raise UserError(f"{told} takes no {places[kind.most]!r}, but {', '.join(taken)}")
    named = {flag.replace("-", "_"): value for flag, value in values.items()}
    return argparse.Namespace(places=places, **named)


def _shown(default: object) -> str:
    """A default for the help: nothing for switches and what has none."""
    if default is REQUIRED:
        return ", required"
    return "" if default is None or default is False else f": {default}"
