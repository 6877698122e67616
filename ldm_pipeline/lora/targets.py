"""Which modules a LoRA adapts, and each one's rank and strength.

`resolve` turns settings, which speak in patterns, into a `Layout` for each component, which names
every module.

Legend
    component   a network of a pipeline, by its name there: unet, text_encoder, text_encoder_2
    name        a module's dotted name inside its component, without CLIP's leading `text_model.`,
                which some releases of transformers have and others have not
    pattern     a piece of `component.name`, whole words between the dots, `*` for anything:
                `to_q`, `mid_block`, `unet.up_blocks.*.attn2`
    W, A, B     a module's frozen weight and what is learnt beside it: W + scale * B A
    rank, r     rows of A and columns of B
    alpha       scale = alpha / r (LoRA, 2106.09685), or alpha / sqrt(r) (rsLoRA, 2312.03732)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from ldm_pipeline.errors import UserError, choose, suggestion

if TYPE_CHECKING:
    from torch import nn

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
"""The components of a Stable Diffusion pipeline that a LoRA can adapt."""

TEXT_MODEL = "text_model."
"""What CLIP's module names begin with in some releases of transformers."""

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
FEEDFORWARD = ("ff.net.0.proj", "ff.net.2", "fc1", "fc2")
SAMPLER = ("downsamplers.*.conv", "upsamplers.*.conv")
CONVOLUTION = ("conv1", "conv2", "conv_shortcut", *SAMPLER, "proj_in", "proj_out")

SETS: Mapping[str, tuple[str, ...]] = {
    "attention": ATTENTION,
    "attention+feedforward": (*ATTENTION, *FEEDFORWARD),
    "all": (*ATTENTION, *FEEDFORWARD, *CONVOLUTION),
}
"""The sets that `targets` may name. "all" has the convolutions inside the UNet's blocks, and its
transformers' projections, but not `conv_in` and `conv_out`: those may be named."""


@dataclass(frozen=True)
class Override:
    """What differs in the modules that a pattern matches; None leaves it as it is.

    Where only the rank is given, alpha keeps its ratio to it.
    """

    rank: int | None = None
    alpha: float | None = None


@dataclass(frozen=True)
class LoraSettings:
    """What a LoRA adapts and how; raises `UserError` for values that cannot be meant.

    `targets` is the name of a set in `SETS` or a list of patterns. `alpha` None means alpha =
    rank, that is, scale 1. `dora` learns the length of W's rows apart from their direction
    (2402.09353); `rslora` divides alpha by the root of the rank. `overrides` go from patterns to
    what differs there; where several match, the later ones win.
    """

    targets: str | Sequence[str] = "attention"
    rank: int = 8
    alpha: float | None = None
    dora: bool = False
    rslora: bool = False
    overrides: Mapping[str, Override] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.targets, str) and self.targets not in SETS:
            raise UserError(
                f"targets={self.targets!r} is not known; choose one of {', '.join(SETS)}, or list"
                f" patterns as in ['to_q', 'mid_block']{suggestion(self.targets, SETS)}"
            )
        if not self.targets:
            raise UserError(f"targets is empty; choose one of {', '.join(SETS)}, or list patterns")
        _check_numbers("", self.rank, self.alpha)
        for pattern, override in self.overrides.items():
            _check_numbers(f"overrides.{pattern}.", override.rank, override.alpha)


@dataclass(frozen=True)
class Slot:
    """One adapted module's rank and alpha."""

    rank: int
    alpha: float


@dataclass(frozen=True)
class Layout:
    """How one component is adapted: a slot for each module, by name.

    `plain` are modules without DoRA's magnitude where others have one; PEFT has no such adapters.
    """

    slots: Mapping[str, Slot]
    dora: bool = False
    rslora: bool = False
    plain: frozenset[str] = frozenset()

    def scale(self, name: str) -> float:
        """What B A is multiplied by in the module `name`."""
        slot = self.slots[name]
        return slot.alpha / (math.sqrt(slot.rank) if self.rslora else slot.rank)

    def peft_fields(self) -> dict[str, Any]:
        """The fields of PEFT's `LoraConfig` that say the same; they are also a file's metadata.

        The commonest rank and alpha stand for all, and patterns for the modules that differ.
        """
        rank = Counter(slot.rank for slot in self.slots.values()).most_common(1)[0][0]
        alpha = Counter(slot.alpha for slot in self.slots.values()).most_common(1)[0][0]
        slots = self.slots.items()
        return {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {name: slot.rank for name, slot in slots if slot.rank != rank},
            "alpha_pattern": {name: slot.alpha for name, slot in slots if slot.alpha != alpha},
            "target_modules": sorted(self.slots),
            "use_dora": self.dora,
            "use_rslora": self.rslora,
        }


def adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of `model` that a LoRA can adapt, by name: linear ones and 2-d convolutions.

    Where adapters are already in, this is what lies under them.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    found: dict[str, nn.Module] = {}
    adapted: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if path.startswith(adapted):
            continue
        if isinstance(module, BaseTunerLayer):
            adapted = (*adapted, f"{path}.")
            module = module.get_base_layer()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            found[path.removeprefix(TEXT_MODEL)] = module
    return found


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` is a piece of the dotted `name`, whole words between the dots."""
    return fnmatchcase(f".{name}.", f"*.{pattern}.*")


def resolve(
    models: Mapping[str, nn.Module], settings: LoraSettings, unread: Sequence[str] = ()
) -> dict[str, Layout]:
    """The layout of each of `models` (by component) that `settings` describe.

    Modules that a pattern of `unread` matches are left out: nobody uses what they answer, so they
    could learn nothing. Raises `UserError` for a pattern that matches nothing, with the nearest
    names, and for a component in which nothing is to be adapted.
    """
    for component in models:
        choose("component", component, COMPONENTS)
    every = (f"{component}.{name}" for component in models for name in adaptable(models[component]))
    names = [name for name in every if not any(matches(pattern, name) for pattern in unread)]
    if isinstance(settings.targets, str):
        patterns: Sequence[str] = SETS[settings.targets]
    else:
        patterns = settings.targets
        for pattern in patterns:
            _must_match("targets", pattern, names)
    chosen = [name for name in names if any(matches(pattern, name) for pattern in patterns)]
    layouts = {}
    for component in models:
        own = [name for name in chosen if name.startswith(f"{component}.")]
        if not own:
            raise UserError(
                f"targets={settings.targets!r} names no module of the {component}; add a pattern"
                f" for it or leave the {component} out"
            )
        slots = {name.removeprefix(f"{component}."): _slot(settings, name) for name in own}
        layouts[component] = Layout(slots, settings.dora, settings.rslora)
    for pattern in settings.overrides:
        _must_match("overrides", pattern, chosen)
    return layouts


def _slot(settings: LoraSettings, name: str) -> Slot:
    """The rank and alpha of the module `name` (component first)."""
    rank, alpha = settings.rank, None
    for pattern, override in settings.overrides.items():
        if matches(pattern, name):
            rank = rank if override.rank is None else override.rank
            alpha = alpha if override.alpha is None else override.alpha
    if alpha is None:
        base = settings.rank if settings.alpha is None else settings.alpha
        alpha = base * (rank / settings.rank)
    return Slot(rank, alpha)


def _check_numbers(where: str, rank: int | None, alpha: float | None) -> None:
    """Raise `UserError` for a rank below 1 or an alpha that is not a positive number."""
    if rank is not None and (type(rank) is not int or rank < 1):
        raise UserError(f"{where}rank={rank!r} must be a whole number of at least 1")
    if alpha is not None and not (alpha > 0 and math.isfinite(alpha)):
        raise UserError(f"{where}alpha={alpha!r} must be a positive number")


def _must_match(where: str, pattern: str, names: Sequence[str]) -> None:
    """Raise `UserError` where `pattern` matches none of `names`, with what comes nearest."""
    if any(matches(pattern, name) for name in names):
        return
    near = get_close_matches(pattern, sorted(_pieces(names)), n=3) or names[:1]
    kind = "that is adapted" if where == "overrides" else "that a LoRA can adapt"
    raise UserError(f"{where}: {pattern!r} matches no module {kind}; some are {', '.join(near)}")


def _pieces(names: Iterable[str]) -> set[str]:
    """Everything without `*` that would match one of `names`."""
    pieces = set()
    for name in names:
        words = name.split(".")
        ends = range(len(words) + 1)
        pieces |= {".".join(words[i:j]) for i in ends for j in ends if i < j}
    return pieces
