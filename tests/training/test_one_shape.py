"""A compiled network meets one shape for each size of pictures, and learns the same of it.

What is left of aspect buckets forms groups of any number of samples; for a compiled network they
are padded. Here torch's compiler stands in front, and nothing (`eager`) behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from ldm_pipeline.training import adapting, start
from ldm_pipeline.training.adapting import AdapterObjective
from tests.training import test_lcm_objective, test_lora_objective
from tests.training.conftest import captioned
from tests.training.tiny_lora import open_model

SIZES = [(64, 64)] * 5 + [(96, 32)] * 4
BATCH = 4

Build = Callable[..., AdapterObjective]


@pytest.fixture(params=["lora", "own answers", "lcm"])
def build(request: pytest.FixtureRequest, tmp_path: Path) -> Build:
    """build(): an objective over pictures of two sizes, whose adapter changes what is said."""
    folder = captioned(tmp_path / "pictures", SIZES)
    test: Any = test_lcm_objective if request.param == "lcm" else test_lora_objective
    kind = test.LcmObjective if request.param == "lcm" else test.LoraObjective
    told: dict[str, Any] = {"data": {"held_out": 0.0}}
    if request.param == "own answers":
        kept = captioned(tmp_path / "kept", SIZES[:-1])
        told["data"]["regularisation"] = str(kept)
        told["loss"] = {"regularise_to": "answers"}

    def build() -> AdapterObjective:
        objective: AdapterObjective = kind(test.config_of(folder, **told), open_model)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for value in objective.adapter.parameters.values():
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
        return objective

    return build


@pytest.fixture
def _eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A compiler that has compiled nothing yet, with its own limit and nothing behind it."""
    compile_it: Any = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda module, dynamic, options: compile_it(
            module, dynamic=dynamic, backend="eager", fullgraph=True
        ),
    )
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch._dynamo.reset()


def batches(objective: AdapterObjective, count: int) -> list[dict[str, Any]]:
    return [objective.batch(range(BATCH * k, BATCH * (k + 1))) for k in range(count)]


def learnt(objective: AdapterObjective, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What a batch says: its measures, and the gradient of everything that is trained."""
    measures = objective(batch)
    objective.zero_grad()
    measures["loss"].backward()
    gradients = {name: p.grad for name, p in objective.adapter.parameters.items()}
    return measures | {name: value for name, value in gradients.items() if value is not None}


def test_rows_for_the_shape_alone_change_nothing(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 1e-4 of the largest number of each tensor: a longer sum rounds otherwise in float32."""
    monkeypatch.setattr(adapting, "compiled", lambda network, shapes: network)
    plain, padded = build(), build()
    padded.compile_network()
    for one, other in zip(batches(plain, 9), batches(padded, 9), strict=True):
        if len(one["groups"]) == 1:
            continue
        assert [len(group["z"]) for group in other["groups"]] == [BATCH] * len(other["groups"])
        wanted, found = learnt(plain, one), learnt(padded, other)
        assert wanted.keys() == found.keys()
        for name, value in wanted.items():
            assert (found[name] - value).abs().max() <= 1e-4 * value.abs().max(), name
        return
    pytest.fail("no batch of two sizes")


@pytest.mark.slow
@pytest.mark.usefixtures("_eager")
def test_each_size_is_compiled_once(build: Build) -> None:
    objective = build()
    objective.compile_network()
    met: set[tuple[int, ...]] = set()
    for batch in batches(objective, 9):
        new = {tuple(group["z"].shape) for group in batch["groups"]} - met
        before = counters["stats"]["unique_graphs"]
        objective(batch)["loss"].backward()
        made = counters["stats"]["unique_graphs"] - before
        assert made > 0 if new else made == 0
        met |= new
    assert len(met) == 2


@pytest.mark.usefixtures("_eager")
def test_more_sizes_are_compiled_than_torch_would_unasked() -> None:
    """Torch gives up after eight, and calls the module as it is from then on."""
    called = start.compiled(nn.Linear(3, 3), shapes=12)
    for rows in range(2, 14):
        called(torch.ones(rows, 3))
    assert counters["stats"]["unique_graphs"] == 12
