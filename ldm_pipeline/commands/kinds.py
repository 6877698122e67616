"""Commands that do several kinds of things: `ldm dataset check`, `ldm lora merge`.

Each kind is one `Kind`: its flags with their defaults, and the function that does it. All kinds of
a command share one parser, so that arguments may come in any order; a flag that another kind takes
is refused by name. The help lists each kind with its own flags.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
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
    parser.add_argument("kind", help=f"one of {', '.join(kinds)}")
    parser.add_argument("places", nargs="*", metavar="place", help=places)
    for flag, declared in flags.items():
        hidden = {**declared, "help": argparse.SUPPRESS}
        parser.add_argument(f"--{flag}", default=argparse.SUPPRESS, **hidden)
    parser.usage = "%(prog)s KIND [place ...] [flags]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n\n".join(
        "\n".join(_described(name, kind, flags)) for name, kind in kinds.items()
    )


def _described(name: str, kind: Kind, flags: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The lines of the help about a kind: its purpose, and its flags with their defaults."""
    yield f"{name}: {kind.purpose}"
    for flag, default in kind.defaults.items():
        declared = flags[flag]
        takes = "" if "action" in declared else f" {declared.get('metavar', flag.upper())}"
        yield f"  --{flag + takes:<24} {declared['help']}{_shown(default)}"


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
        return " (required)"
    return "" if default is None or default is False else f" (default: {default})"
