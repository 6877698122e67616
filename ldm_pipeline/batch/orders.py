"""What a batch is asked for: prompts in a text file, or settings in a JSONL file, as orders.

Nothing here imports torch: a mistake in a file of a thousand lines is told before anything loads.

Legend
    entry    the settings of one line of the file, which replace those of the command line
    order    one picture: its settings, prompt and seed
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from ldm_pipeline.commands.generate import (
    check_drawing,
    read_lines,
    read_prompts,
    recipe_of,
)
from ldm_pipeline.commands.steps import settle_steps, usual_of
from ldm_pipeline.errors import UserError, suggestion
from ldm_pipeline.memory import PLAIN, Memory
from ldm_pipeline.metadata import Recipe

TEXTS = ("prompt", "negative", "sampler")
NUMBERS = ("seed", "n", "steps", "guidance", "height", "width")
KEYS = (*TEXTS, *NUMBERS)
"""What a line of a JSONL file may set; `prompt` it must."""

NO_PART_OF_A_NAME = ("seed", "n", "grid", "size", "device", "versions")
"""What a recipe tells that does not tell one order from another, or stands in the name itself."""


@dataclass(frozen=True)
class Order:
    """One picture that is asked for; `args` are the settings of `ldm generate`."""

    args: argparse.Namespace
    prompt: str
    seed: int

    def recipe(
        self,
        loras: tuple[tuple[str, float], ...],
        device: str,
        dtype: str,
        memory: Memory = PLAIN,
    ) -> Recipe:
        """What is written into the picture, but for its size.

        The device has no number: which of several did it does not tell on the picture.
        """
        kind = device.partition(":")[0]
        recipe = recipe_of(self.args, [self.prompt], self.seed, loras, kind, dtype, memory)
        return replace(recipe, n=1, grid=False)

    def name(self, recipe: Recipe) -> str:
        """The file's name without ending: 16 hexadecimal digits of the settings, and the seed."""
        told = json.loads(recipe.to_json())
        kept = {key: value for key, value in told.items() if key not in NO_PART_OF_A_NAME}
        kept |= {"height": self.args.height, "width": self.args.width}
        digits = sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
        return f"{digits}-{self.seed}"


def read_orders(args: argparse.Namespace) -> list[Order]:
    """Every picture that `args.prompts` asks for, in order.

    Each prompt's seeds count on from its own `seed`, so that no line changes what another draws.
    Raises `UserError`, with the line, for what cannot be drawn.
    """
    orders = []
    entries = _entries(args.prompts)
    usual = usual_of(args) if args.guidance is None else None  # once: no line names a model
    for place, entry in entries:
        own = argparse.Namespace(**{**vars(args), **entry})
        settle_steps(own, usual=usual)
        try:
            check_drawing(own, [own.prompt], own.seed)
        except UserError as error:
            raise UserError(
                f"{place}{str(error).removeprefix('--')}" if place else error
            ) from error
        own.guidance = float(own.guidance)
        orders += [Order(own, own.prompt, own.seed + k) for k in range(own.n)]
    return orders


def share(missing: Sequence[int], rank: int, ranks: int) -> list[int]:
    """Which of `missing` process `rank` of `ranks` draws; each is one process's alone."""
    return list(missing[rank::ranks])


def once(names: Iterable[str]) -> list[int]:
    """Where each name stands for the first time."""
    first: dict[str, int] = {}
    for index, name in enumerate(names):
        first.setdefault(name, index)
    return list(first.values())


def _entries(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The lines of a file: where each stands, for JSONL, and what it sets."""
    if path.suffix.lower() != ".jsonl":
        return [("", {"prompt": prompt}) for prompt in read_prompts(path)]
    found = []
    for number, line in read_lines(path):
        place = f"{path}, line {number}: "
        found.append((place, _entry(line, place)))
    if not found:
        raise UserError(f"there is no prompt in {path}")
    return found


def _entry(line: str, place: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}no JSON ({error})") from error
    if not isinstance(entry, dict):
        raise UserError(f'{place}must be an object, such as {{"prompt": "a red star"}}')
    for key, value in entry.items():
        if key not in KEYS:
            raise UserError(
                f"{place}unknown key {key!r}; a line may set {', '.join(KEYS)}"
                f"{suggestion(key, KEYS)}"
            )
        if not isinstance(value, str if key in TEXTS else int | float):
            kind = "a text" if key in TEXTS else "a number"
            raise UserError(f"{place}{key}={value!r} must be {kind}")
    if "prompt" not in entry:
        raise UserError(f"{place}there is no prompt")
    return entry
