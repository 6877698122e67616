"""How many steps a command draws, and how: --steps, --guidance, --lcm, --sampler and --eta.

What cannot be meant is refused before any model loads: so a model's few-step adapter is looked for
by what its configuration says.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ldm_pipeline.commands.sources import Source, find, is_xl, scheduler_config, unet_config
from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.notes import NO_ADAPTER, LcmNote, note_of, read_note
from ldm_pipeline.lora.published import fetched, lcm_lora
from ldm_pipeline.models.bundled import few_step_adapter
from ldm_pipeline.request import (
    ETA_SAMPLERS,
    FEW_STEP_SAMPLERS,
    GUIDANCE,
    LCM_GUIDANCE,
    LCM_STEPS,
    SAMPLER_NAMES,
)
from ldm_pipeline.request_xl import XL_GUIDANCE, XL_PAINTING_GUIDANCE

STEPS = 25
"""Denoising steps, unless --steps or --lcm says otherwise."""
USUAL_LEVELS = 1000
"""Noise levels of a training, unless a model's scheduler says otherwise."""


class Usual(NamedTuple):
    """What a model is drawn with where nobody names a guidance: that and, in up to 50 steps, the
    sampler that goes with it; None is the model's own."""

    guidance: float
    sampler: str | None = None


BUNDLED_USUAL = Usual(2.0, "lcm")
"""How the bundled model draws a whole picture, unless something of it is named: the clean latents
that a step believes in get fresh noise, which mends what earlier steps got wrong (2306.14878 tells
why), and little guidance, since much of it spoils such pictures. `ldm evaluate` tells how much
oftener the words are drawn than with `--sampler ddim`, which bears any guidance."""


def add_step_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how many steps are drawn and how; `evaluate` takes the same."""
    add = parser.add_argument
    add("--steps", type=int, help=f"denoising steps ({STEPS}; {LCM_STEPS} with --lcm)")
    add(
        "--guidance",
        type=float,
        help=f"how strongly to follow the words ({BUNDLED_USUAL.guidance} with the bundled model,"
        f" else {GUIDANCE}, SDXL {XL_GUIDANCE}, painting {XL_PAINTING_GUIDANCE}; {LCM_GUIDANCE}"
        " with --lcm)",
    )
    add(
        "--lcm",
        nargs="?",
        const=True,
        default=False,
        metavar="FILE",
        help="few steps, with the LCM adapter in FILE (or the one known for the model)",
    )
    add(
        "--sampler",
        metavar="NAME",
        help=f"one of {', '.join(SAMPLER_NAMES)} (the model's own;"
        f" {BUNDLED_USUAL.sampler} for the bundled model's words, if no --guidance is named)",
    )
    add(
        "--eta",
        type=float,
        help="share of fresh noise, 0 to 1: of --sampler ddim (0), and tcd's gamma (0.3)",
    )


def settle_steps(
    args: argparse.Namespace, painting: bool = False, usual: Usual | None = None
) -> None:
    """Put what was not named in place: steps and guidance are others with --lcm, and SDXL's
    guidance where a part of a picture is painted. `usual` spares asking the model again.
    """
    if args.steps is None:
        args.steps = LCM_STEPS if args.lcm else STEPS
    if args.guidance is None:
        guidance, sampler = usual or usual_of(args, painting)
        args.guidance = guidance
        if args.sampler is None and args.steps <= LcmNote.original_steps:
            args.sampler = sampler


def usual_of(args: argparse.Namespace, painting: bool = False) -> Usual:
    """What the model of `args` is drawn with where nobody says otherwise.

    A full LCM, whose UNet is told the guidance, is told the usual one. Fresh noise would forget a
    picture that the drawing begins with.
    """
    source = find(args.model)
    heard = args.lcm is True and _hears(unet_config(source) or {})
    if args.lcm and not heard:
        return Usual(LCM_GUIDANCE)
    if source.bundled:
        fresh = not args.lcm and getattr(args, "image", None) is None
        return BUNDLED_USUAL if fresh else Usual(BUNDLED_USUAL.guidance)
    if not is_xl(source):
        return Usual(GUIDANCE)
    return Usual(XL_PAINTING_GUIDANCE if painting else XL_GUIDANCE)


def check_eta(eta: float | None, sampler: str | None, lcm: bool | str) -> None:
    """Refuse --eta where no sampler is named that hears it: a model's own is not known yet."""
    if eta is not None and sampler not in ETA_SAMPLERS:
        other = " with --lcm, whose noise is all fresh" if lcm and sampler is None else ""
        raise UserError(
            f"--eta={eta:g} does nothing{other or ' here'}; name a sampler that hears it:"
            f" {' or '.join(f'--sampler {name}' for name in ETA_SAMPLERS)}"
        )


def check_lcm(lcm: bool | str, source: Source) -> LcmNote | None:
    """How what --lcm draws with was distilled; None without it, and where the model does not say.

    Refuses what is no LCM adapter, and --lcm alone where none is there. A published adapter is
    fetched now, so that none is missed after the model is loaded. A model that says nothing of its
    UNet is let pass: its loading tells why.
    """
    if isinstance(lcm, str):
        if not Path(lcm).exists():
            raise UserError(f"--lcm={lcm}: there is no such file; a prompt stands before --lcm")
        return read_note(lcm)
    config = unet_config(source) if lcm else None
    if config is None:
        return None
    if _hears(config):
        return note_of(scheduler_config(source))
    known = lcm_lora(config.get("cross_attention_dim"))
    adapter = few_step_adapter() if known is None else fetched(known)
    if adapter is None:
        raise UserError(NO_ADAPTER)
    return read_note(adapter)


def check_steps(
    steps: int, sampler: str | None, note: LcmNote | None, scheduler: Mapping[str, Any]
) -> None:
    """Refuse more steps than there are noise levels to stop at.

    Those are the levels of the model's training, which its `scheduler` config tells, or the fewer
    ones of a distillation: of what --lcm draws with (`note`), of few-step samplers, and of the
    scheduler of a full LCM.
    """
    few = sampler in FEW_STEP_SAMPLERS or (sampler is None and is_few_step(scheduler))
    most = (note or note_of(scheduler)).original_steps if note or few else _trained(scheduler)
    if steps > most:
        why = "that few steps are distilled on" if note or few else "that this model was trained on"
        raise UserError(f"--steps={steps} must lie between 1 and {most}, the noise levels {why}")


def is_few_step(scheduler: Mapping[str, Any]) -> bool:
    """Whether a scheduler's config is of a model distilled to few steps, which it then draws in."""
    return "original_inference_steps" in scheduler


def _trained(scheduler: Mapping[str, Any]) -> int:
    """How many noise levels a model was trained on."""
    betas, told = scheduler.get("trained_betas"), scheduler.get("num_train_timesteps")
    if isinstance(betas, list) and betas:
        return len(betas)
    return told if isinstance(told, int) and told > 0 else USUAL_LEVELS  # loading refuses others


def _hears(config: dict[str, Any]) -> bool:
    """Whether a UNet is told the guidance, as that of a full LCM."""
    return config.get("time_cond_proj_dim") is not None
