"""Does a LoRA fit a model? Every key is compared; what does not fit is named with what is near."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import TYPE_CHECKING

from ldm_pipeline.lora.targets import TEXT_MODEL, adaptable
from ldm_pipeline.lora.weights import LORA_A, LORA_B, MAGNITUDE, LoraWeights, split

if TYPE_CHECKING:
    from torch import nn

Shape = tuple[int, ...]
Modules = Mapping[str, Mapping[str, Shape]]
"""The shape of W of each module that can be adapted, by component and name."""

SHOWN = 2
"""Keys of one kind in a message."""


@dataclass(frozen=True)
class Fit:
    """How a LoRA's keys compare with a model's modules.

    `missing` are keys that the modules need and the file lacks, `unexpected` those that no module
    takes, `misshapen` says which have another shape than the module needs. `modules` are those
    that exist.
    """

    matched: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[str, ...]
    modules: Modules

    def __bool__(self) -> bool:
        """Whether the file fits."""
        return self.matched > 0 and not (self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        kinds = {
            "missing": list(self.missing),
            "unexpected": [self._with_nearest(key) for key in self.unexpected[:SHOWN]],
            "of another shape": list(self.misshapen),
        }
        counts = [f"{self.matched} keys matched"]
        for kind, total in zip(
            kinds, map(len, (self.missing, self.unexpected, self.misshapen)), strict=True
        ):
            more = ", …" if total > SHOWN else ""
            examples = f" ({', '.join(kinds[kind][:SHOWN])}{more})" if total else ""
            counts.append(f"{total} {kind}{examples}")
        return ", ".join(counts)

    def refusal(self, path: object) -> str:
        """Why the file at `path` cannot be used: with one key in ten wrong at most, it is hardly
        another model's, but damaged."""
        wrong = len(self.missing) + len(self.unexpected) + len(self.misshapen)
        guess = "a damaged file?" if 10 * wrong <= self.matched else "another model's LoRA?"
        return f"{path} does not fit this model: {self}; {guess}"

    def unmatched(self) -> list[str]:
        """A line for each key that does not fit, with the nearest module that does exist."""
        return [
            *(f"missing: {key}" for key in self.missing),
            *(f"unexpected: {self._with_nearest(key)}" for key in self.unexpected),
            *(f"of another shape: {told}" for told in self.misshapen),
        ]

    def _with_nearest(self, key: str) -> str:
        component, name, _ = split(key)
        near = nearest_module(name, self.modules.get(component, ()))
        return f"{key}, nearest {component}.{near}" if near else key


def fit(weights: LoraWeights, models: Mapping[str, nn.Module]) -> Fit:
    """How `weights` compare with the networks of `models` (by component); changes nothing."""
    return fit_modules(weights, modules_of(models))


def modules_of(models: Mapping[str, nn.Module]) -> Modules:
    """The modules of networks that can be adapted."""
    return {
        component: {
            name: tuple(module.get_parameter("weight").shape)
            for name, module in adaptable(model).items()
        }
        for component, model in models.items()
    }


def fit_modules(weights: LoraWeights, modules: Modules) -> Fit:
    """How `weights` compare with `modules`."""
    matched = 0
    missing, unexpected, misshapen = [], [], []
    expected: dict[str, Shape] = {}
    for component, layout in weights.layouts.items():
        known = modules.get(component, {})
        for name, slot in layout.slots.items():
            if name in known:
                dora = layout.dora and name not in layout.plain
                shapes = _shapes(known[name], slot.rank, dora)
                expected |= {f"{component}.{name}.{part}": s for part, s in shapes.items()}
        promised = _targeted(known, weights.promised.get(component, ()))
        missing += [f"{component}.{n}.{LORA_A}" for n in promised if n not in layout.slots]
    missing += [key for key in expected if key not in weights.tensors]
    for key, tensor in weights.tensors.items():
        shape = tuple(tensor.shape)
        if key not in expected:
            unexpected.append(key)
        elif shape != expected[key]:
            misshapen.append(f"{key} is {list(shape)}, here {list(expected[key])}")
        else:
            matched += 1
    return Fit(matched, tuple(missing), tuple(unexpected), tuple(misshapen), modules)


def nearest_module(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that looks most like the dotted `name`; None where there is none.

    Whole words count first, from both ends, because names differ mostly in one number or word.
    """
    words = name.split(".")

    def ends(other: str) -> int:
        others = other.split(".")
        return _agreeing(words, others) + _agreeing(words[::-1], others[::-1])

    scores = {other: ends(other) for other in known}
    most = max(scores.values(), default=0)
    best = [other for other, score in scores.items() if score == most]
    return max(
        best[:50], key=lambda other: SequenceMatcher(None, name, other).ratio(), default=None
    )


def _agreeing(one: list[str], other: list[str]) -> int:
    """How many words two lists begin with together."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


def _targeted(names: Iterable[str], targets: tuple[str, ...]) -> list[str]:
    """Those of `names` that PEFT's `target_modules` mean: equal, or ending so after a dot."""
    exact = set(targets)
    ends = tuple(f".{target}" for target in targets)
    return [
        name
        for name in names
        if any(path in exact or path.endswith(ends) for path in (name, TEXT_MODEL + name))
    ]


def _shapes(weight: Shape, rank: int, dora: bool) -> dict[str, Shape]:
    """The shapes of the parts beside a linear module [out, in] or a convolution [out, in, k, k]."""
    out, into, *kernel = weight
    ones = [1] * len(kernel)
    shapes: dict[str, Shape] = {LORA_A: (rank, into, *kernel), LORA_B: (out, rank, *ones)}
    if dora:
        shapes[MAGNITUDE] = (1, out, *ones) if kernel else (out,)
    return shapes
