"""Every layout into every other and back: the networks' outputs stay the same.

python -m tests.lora.test_layout_matrix writes the differences into the README, where a test finds
them again: each as the power of ten that it stays below.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import functional_call

from ldm_pipeline.lora.attach import base_of
from ldm_pipeline.lora.deltas import delta
from ldm_pipeline.lora.files import LAYOUTS, load, save
from ldm_pipeline.lora.fitting import fit
from ldm_pipeline.lora.layouts.families import FAMILIES
from ldm_pipeline.lora.targets import adaptable
from ldm_pipeline.lora.weights import LoraWeights
from tests.lora.tiny_families import PIPELINES, lora, networks

KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "DoRA": {"dora": True, "every": 3},
    "rsLoRA": {"rslora": True, "every": 3},
}
PAIRS = list(itertools.product(LAYOUTS, LAYOUTS))

README = Path(__file__).parents[2] / "README.md"
BEGIN = "<!-- layouts: written by tests/lora/test_layout_matrix.py -->"
END = "<!-- /layouts -->"

LEAST = 1e-6
"""What a round trip may change: kohya's layout moves alphas into B, in float32."""


def outputs(pipe: Any, weights: LoraWeights | None) -> dict[str, torch.Tensor]:
    """What each network says with an adapter in its weights, or without any.

    In float64, so that outputs differ by what the files say, and not by the order of sums.
    """
    models = networks(pipe)
    adapted = set(weights.modules()) if weights else set()
    base = base_of(models)
    told: dict[str, torch.Tensor] = {}
    tokens = torch.arange(10)[None]
    noise = torch.linspace(-1, 1, 4 * 8 * 8).double().reshape(1, 4, 8, 8)
    text = torch.linspace(-1, 1, 3 * pipe.unet.config.cross_attention_dim)
    text = text.double().reshape(1, 3, -1)
    large = {"text_embeds": torch.ones(1, 24).double(), "time_ids": torch.ones(1, 6)}
    added = large if "text_encoder_2" in models else None
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "unet": ((noise, 7, text), {"added_cond_kwargs": added}),
        "text_encoder": ((tokens,), {}),
        "text_encoder_2": ((tokens,), {}),
    }
    for component, model in models.items():
        changed = {}
        paths = {id(module): path for path, module in model.named_modules()}
        for name, module in adaptable(model).items():
            if weights and (component, name) in adapted:
                w = base(component, name)
                assert w is not None
                changed[f"{paths[id(module)]}.weight"] = w + delta(weights, component, name, w)
        args, named = calls[component]
        with torch.no_grad():
            told[component] = functional_call(model, changed, args, named)[0]
    return told


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference between two networks' outputs."""
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def round_trip(
    folder: Path, weights: LoraWeights, first: str, then: str, family: str
) -> LoraWeights:
    """`weights` in the layout `first`, from there in `then`, and from there in `first` again."""
    for number, layout in enumerate((first, then, first)):
        place = save(folder / f"{number}", weights, layout=layout, family=FAMILIES[family])
        weights = load(place)
    return weights


def differences(family: str, kind: str, folder: Path) -> dict[tuple[str, str], float]:
    """The largest change of any output, by the two layouts of a round trip."""
    pipe = PIPELINES[family]()
    for model in networks(pipe).values():
        model.double()
    weights = lora(pipe, size=0.07, **KINDS[kind])
    before = outputs(pipe, weights)
    assert difference(before, outputs(pipe, None)) > 1e-2, "the adapter counts"
    found = {}
    for number, (first, then) in enumerate(PAIRS):
        back = round_trip(folder / f"{family}-{kind}-{number}", weights, first, then, family)
        assert fit(back, networks(pipe)), (first, then)
        found[first, then] = difference(before, outputs(pipe, back))
    return found


def row(family: str, kind: str, found: dict[tuple[str, str], float]) -> str:
    """A line of the table."""
    cells = [f"1e{math.ceil(math.log10(value))}" if value else "0" for value in found.values()]
    return f"| {FAMILIES[family].title}, {kind} | {' | '.join(cells)} |"


@pytest.mark.parametrize("family", PIPELINES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_pair_of_layouts_round_trips(family: str, kind: str, tmp_path: Path) -> None:
    found = differences(family, kind, tmp_path)
    assert max(found.values()) <= LEAST, found
    told = row(family, kind, found)
    assert told in README.read_text("utf-8"), "python -m tests.lora.test_layout_matrix writes it"


def table() -> str:
    """The differences of every family, kind and pair, as Markdown."""
    columns = [f"{first[0]} → {then[0]} → {first[0]}" for first, then in PAIRS]
    lines = [f"|  | {' | '.join(columns)} |", "| --- |" * (len(columns) + 1)]
    with tempfile.TemporaryDirectory() as folder:
        for family, kind in itertools.product(PIPELINES, KINDS):
            lines.append(row(family, kind, differences(family, kind, Path(folder))))
    return "\n".join(lines).replace("||", "|")


def write() -> None:
    """Put the table where the README has it."""
    before, _, rest = README.read_text("utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    README.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}", "utf-8")


if __name__ == "__main__":
    write()
