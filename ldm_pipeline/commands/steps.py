"""How many steps a command draws, and how: --steps, --guidance, --lcm, --sampler and --eta.

What cannot be meant is refused before any model loads: so a model's few-step adapter is looked for
by what its configuration says.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ldm_pipeline.commands.sources import Source, find, is_xl, unet_config
from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.notes import NO_ADAPTER, read_note
from ldm_pipeline.lora.published import fetched, lcm_lora
from ldm_pipeline.models.bundled import few_step_adapter
from ldm_pipeline.request import (
    ETA_SAMPLERS,
    GUIDANCE,
    LCM_GUIDANCE,
    LCM_STEPS,
    SAMPLER_NAMES,
)
from ldm_pipeline.request_xl import XL_GUIDANCE, XL_PAINTING_GUIDANCE

STEPS = 25
"""Denoising steps, unless --steps or --lcm says otherwise."""
BUNDLED_GUIDANCE = 3.0
"""How strongly the bundled model's pictures follow the words, unless --guidance or --lcm says
otherwise; others take what stock pipelines of their family do."""


def add_step_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how many steps are drawn and how; `evaluate` takes the same."""
    add = parser.add_argument
    add("--steps", type=int, help=f"denoising steps ({STEPS}; {LCM_STEPS} with --lcm)")
    add(
        "--guidance",
        type=float,
        help=f"how strongly to follow the words ({BUNDLED_GUIDANCE} with the bundled model, else"
        f" {GUIDANCE}, SDXL {XL_GUIDANCE}, painting {XL_PAINTING_GUIDANCE}; {LCM_GUIDANCE} with"
        " --lcm)",
    )
    add(
        "--lcm",
        nargs="?",
        const=True,
        default=False,
        metavar="FILE",
        help="few steps, with the LCM adapter in FILE (or the one known for the model)",
    )
    add("--sampler", metavar="NAME", help=f"one of {', '.join(SAMPLER_NAMES)} (the model's own)")
    add(
        "--eta",
        type=float,
        help="share of fresh noise, 0 to 1: of --sampler ddim (0), and tcd's gamma (0.3)",
    )


def settle_steps(args: argparse.Namespace, painting: bool = False) -> None:
    """Put what was not named in place: steps and guidance are others with --lcm, and SDXL's
    guidance where a part of a picture is painted.

    A full LCM, whose UNet is told the guidance, is told the usual one.
    """
    if args.steps is None:
        args.steps = LCM_STEPS if args.lcm else STEPS
    if args.guidance is None:
        source = find(args.model)
        heard = args.lcm is True and _hears(unet_config(source) or {})
        silent = args.lcm and not heard
        args.guidance = LCM_GUIDANCE if silent else _usual_guidance(source, painting)


def _usual_guidance(source: Source, painting: bool) -> float:
    """The guidance of a model that nobody names one for."""
    if source.bundled:
        return BUNDLED_GUIDANCE
    if not is_xl(source):
        return GUIDANCE
    return XL_PAINTING_GUIDANCE if painting else XL_GUIDANCE


def check_eta(eta: float | None, sampler: str | None, lcm: bool | str) -> None:
    """Refuse --eta where no sampler is named that hears it: a model's own is not known yet."""
    if eta is not None and sampler not in ETA_SAMPLERS:
        other = " with --lcm, whose noise is all fresh" if lcm and sampler is None else ""
        raise UserError(
            f"--eta={eta:g} does nothing{other or ' here'}; name a sampler that hears it:"
            f" {' or '.join(f'--sampler {name}' for name in ETA_SAMPLERS)}"
        )


def check_lcm(lcm: bool | str, source: Source) -> None:
    """Refuse what --lcm names where that is no LCM adapter, and --lcm alone where none is there.

    A published adapter is fetched now, so that none is missed after the model is loaded. A model
    that says nothing of its UNet is let pass: its loading tells why.
    """
    if isinstance(lcm, str):
        if not Path(lcm).exists():
            raise UserError(f"--lcm={lcm}: there is no such file; a prompt stands before --lcm")
        read_note(lcm)
    elif lcm:
        config = unet_config(source)
        if config is not None:
            _check_own(config)


def _check_own(config: dict[str, Any]) -> None:
    """Refuse a UNet for which there is no adapter; one that hears the guidance needs none."""
    if _hears(config):
        return
    known = lcm_lora(config.get("cross_attention_dim"))
    if known is not None:
        fetched(known)
    elif few_step_adapter() is None:
        raise UserError(NO_ADAPTER)


def _hears(config: dict[str, Any]) -> bool:
    """Whether a UNet is told the guidance, as that of a full LCM."""
    return config.get("time_cond_proj_dim") is not None
