"""`ldm lora convert`, `info`, `merge`, `resize`, `extract`: what can be done with LoRA files.

Each kind is one `Kind` in `KINDS`, see `kinds`. The path of what was written is printed on stdout,
what there is to say about it on stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_pipeline.commands.adapters import read_loras
from ldm_pipeline.commands.kinds import REQUIRED, Kind, declare, run_kind
from ldm_pipeline.commands.lora_info import describe
from ldm_pipeline.commands.outputs import check_weights
from ldm_pipeline.commands.sources import find, need_folder
from ldm_pipeline.errors import UserError, choose
from ldm_pipeline.lora.files import LAYOUTS, inspect, load_whole, save
from ldm_pipeline.lora.layouts.families import (
    FAMILIES,
    Family,
    family_named,
    family_of,
    is_asked_for,
    required,
)
from ldm_pipeline.lora.layouts.lycoris import convolved
from ldm_pipeline.lora.layouts.stamp import carried
from ldm_pipeline.lora.notes import KEY as LCM
from ldm_pipeline.lora.notes import read_note
from ldm_pipeline.lora.weights import Header, LoraWeights
from ldm_pipeline.models.hub import cached
from ldm_pipeline.values import DTYPES

if TYPE_CHECKING:
    from ldm_pipeline.lora.checkpoints import ModelFolder

BASE = "ss_sd_model_name"
"""What a header calls the base model's name."""

PURPOSE = "convert, merge, resize, extract LoRA files, or look into one"


FLAGS: dict[str, dict[str, Any]] = {
    "out": {"type": Path, "metavar": "PLACE", "help": "a new .safetensors file, or a new folder"},
    "to": {"help": f"the layout, one of {', '.join(LAYOUTS)}"},
    "base": {"help": f"the family of models, one of {', '.join(FAMILIES)}; kohya's layout asks"},
    "dtype": {"help": f"one of {', '.join(DTYPES)}; what was computed is float32, unless given"},
    "model": {"metavar": "MODEL", "help": "the base: a folder, bundled, or a hub id in the cache"},
    "into": {"metavar": "MODEL", "help": "write a copy of this model with the LoRAs in it"},
    "rank": {"type": int, "help": "at most this rank"},
    "energy": {"type": float, "help": "the share of the squares to keep, as 0.95"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    places = "LoRA files; merge: FILE:WEIGHT …; extract: the changed model's folder, and the base's"
    declare(parser, KINDS, FLAGS, places)


def run(args: argparse.Namespace) -> None:
    """Do what the kind says with its flags; `UserError` for those of another kind."""
    run_kind("lora", KINDS, args)


def convert(args: argparse.Namespace) -> None:
    """Write a LoRA in another layout."""
    (file,) = args.places
    header = inspect(file)
    family = _checked(args, [header])
    _write(args, _completed(_read(file, family), _base(args.model)), family, header.texts)


def info(args: argparse.Namespace) -> None:
    """Print what a LoRA is; with a model, leaves with exit code 1 where it does not fit it."""
    (file,) = args.places
    header = inspect(file)
    model = _base(args.model)
    weights = load_whole(file)
    print("\n".join(describe(header, weights)))
    if model is None:
        return

    from ldm_pipeline.lora.deltas import completed
    from ldm_pipeline.lora.fitting import fit_modules

    found = fit_modules(completed(weights, model.weight), model.modules)
    print(f"{args.model}: {'fits' if found else 'does not fit'}, {found.matched} keys matched")
    print("".join(f"  {line}\n" for line in found.unmatched()), end="")
    if not found:
        sys.stdout.flush()
        raise SystemExit(1)


def merge(args: argparse.Namespace) -> None:
    """Write several LoRAs as one, or a model with them in its weights."""
    files = read_loras(args.places, "")
    headers = [inspect(file) for file, _ in files]
    if args.into is not None:
        for flag in ("to", "base", "dtype", "model"):
            if getattr(args, flag) is not None:
                raise UserError(f"--{flag} does not go together with --into, which writes a model")
        check_weights(args.out, folder=True)
        target = _base(args.into)
        assert target is not None

        from ldm_pipeline.lora.merging import into_checkpoint

        loras = [(load_whole(file), weight) for file, weight in files]
        print(into_checkpoint(target, loras, args.out))
        return
    family = _checked(args, headers)
    few_steps = _few_steps(headers)
    base = _base(args.model)

    from ldm_pipeline.lora.deltas import without_dora
    from ldm_pipeline.lora.merging import stack

    loras = []
    for file, weight in files:
        weights = _completed(_read(file, family), base)
        loras.append((without_dora(weights, base.weight) if base else weights, weight))
    merged = ", ".join(f"{Path(file).name}:{weight:g}" for file, weight in files)
    names = {header.texts.get(BASE) for header in headers}
    known = {BASE: names.pop()} if len(names) == 1 else {}
    told = {"modelspec.merged_from": merged, **known, **few_steps}
    _write(args, stack(loras), family, told)


def _few_steps(headers: list[Header]) -> Mapping[str, str]:
    """What the few-step adapters among several files say of how to be drawn with, for the file that
    holds them all; `UserError` where they say different things."""
    notes = {header.path: read_note(header.path) for header in headers if LCM in header.texts}
    if not notes:
        return {}
    bases = {note.base for note in notes.values()}
    first, *others = [replace(note, base=None) for note in notes.values()]
    if any(other != first for other in others):
        said = (
            f"{path.name} {note.original_steps} steps spaced {note.spacing},"
            f" timestep_scaling {note.timestep_scaling:g}"
            for path, note in notes.items()
        )
        raise UserError(
            "these few-step adapters are drawn with in different ways, and one file can say but"
            f" one: {'; '.join(said)}"
        )
    return replace(first, base=bases.pop() if len(bases) == 1 else None).texts()


def resize(args: argparse.Namespace) -> None:
    """Write a LoRA of a lower rank."""
    (file,) = args.places
    header = inspect(file)
    family = _checked(args, [header])
    _check_rank(args)

    from ldm_pipeline.lora.resizing import Rank, resize

    made = resize(_read(file, family), Rank(args.rank, args.energy))
    print(_told(made.weights, made.share), file=sys.stderr)
    _write(args, made.weights, family, header.texts)


def extract(args: argparse.Namespace) -> None:
    """Write the difference of two models as a LoRA."""
    family = _checked(args, [])
    _check_rank(args)
    tuned, base = map(_base, args.places)
    assert tuned is not None
    assert base is not None

    from ldm_pipeline.lora.resizing import Rank, extract

    made = extract(tuned, base, Rank(args.rank, args.energy))
    told = _told(made.weights, made.share)
    if made.left_out:
        told += f"; {made.left_out} tensors that no LoRA can hold (biases, norms) differ as well"
    print(told, file=sys.stderr)
    _write(args, made.weights, family, {BASE: Path(args.places[1]).name})


def _check_rank(args: argparse.Namespace) -> None:
    """Refuse a rank or energy that makes no sense, before torch is imported."""
    from ldm_pipeline.lora.ranks import check_rank

    check_rank(args.rank, args.energy)


def _checked(args: argparse.Namespace, headers: list[Header]) -> Family | None:
    """The family of what is to be written; `UserError` for flags that make no sense."""
    if args.to is not None:
        choose("--to", args.to, LAYOUTS)
    args.to = args.to or (headers[0].layout if headers else LAYOUTS[0])
    if args.dtype is not None:
        choose("--dtype", args.dtype, DTYPES)
    family = None if args.base is None else family_named(args.base)
    for header in headers:
        family = family or family_of(header.shapes, header.texts)
    if headers and (args.to == "kohya" or any(is_asked_for(header.shapes) for header in headers)):
        required(family)
    check_weights(args.out, folder=args.to == "peft")
    return family


def _base(name: str | None) -> ModelFolder | None:
    """The model that a flag names, its headers read; `UserError` where there is none here."""
    if name is None:
        return None
    source = find(name)
    need_folder(source)
    folder = source.folder or cached(source.name)
    if folder is None:
        raise UserError(f"{name} is not in the cache; ldm generate downloads it")

    from ldm_pipeline.lora.checkpoints import open_model_folder

    return open_model_folder(folder)


def _read(file: str, family: Family | None) -> LoraWeights:
    """The LoRA in a file; what is a convolution, its family says where the file does not."""
    weights = load_whole(file)
    return convolved(weights, required(family)) if is_asked_for(inspect(file).shapes) else weights


def _completed(weights: LoraWeights, base: ModelFolder | None) -> LoraWeights:
    """The LoRA as its base needs it, where that is at hand; `UserError` where it does not fit."""
    if base is None:
        return weights
    from ldm_pipeline.lora.deltas import completed
    from ldm_pipeline.lora.fitting import fit_modules

    whole = completed(weights, base.weight)
    found = fit_modules(whole, base.modules)
    if not found:
        raise UserError(f"the LoRA does not fit {base.folder}: {found}")
    return whole


def _write(
    args: argparse.Namespace, weights: LoraWeights, family: Family | None, texts: Mapping[str, Any]
) -> None:
    """Write the LoRA where and how the flags say, and print its path."""
    if args.dtype is not None:
        import torch

        dtype = getattr(torch, args.dtype)
        tensors = {key: tensor.to(dtype) for key, tensor in weights.tensors.items()}
        weights = replace(weights, tensors=tensors)
    notes = {"ss_output_name": args.out.stem, **carried(texts)}
    if family is not None:
        notes["ss_base_model_version"] = family.version
    print(save(args.out, weights, notes, args.to, family))


def _told(weights: LoraWeights, share: float) -> str:
    """The energy kept, and the ranks."""
    ranks = [slot.rank for layout in weights.layouts.values() for slot in layout.slots.values()]
    least, most = min(ranks), max(ranks)
    told = f"rank {most}" if least == most else f"ranks {least} to {most}"
    return f"{len(ranks)} modules, {told}: {100 * share:.2f} % of the energy kept"


_LAYOUT: Mapping[str, object] = {"out": REQUIRED, "to": None, "base": None, "dtype": None}

KINDS = {
    "convert": Kind(
        "write it in another layout",
        {**_LAYOUT, "to": REQUIRED, "model": None},
        convert,
        places="a file: `… convert FILE`",
        least=1,
        most=1,
    ),
    "info": Kind(
        "print what it is; with --model, whether it fits",
        {"model": None},
        info,
        places="a file: `… info FILE`",
        least=1,
        most=1,
    ),
    "merge": Kind(
        "write several as one, or a model with them in its weights",
        {**_LAYOUT, "model": None, "into": None},
        merge,
        places="files: `… merge FILE:0.8 FILE:0.5`",
        least=1,
        most=None,
    ),
    "resize": Kind(
        "write it at a lower rank",
        {**_LAYOUT, "rank": None, "energy": None},
        resize,
        places="a file: `… resize FILE`",
        least=1,
        most=1,
    ),
    "extract": Kind(
        "write what changed from one model to another",
        {**_LAYOUT, "rank": None, "energy": None},
        extract,
        places="two models: `… extract CHANGED BASE`",
        least=2,
        most=2,
    ),
}
