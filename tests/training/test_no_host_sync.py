"""Between two looks at the log no step of a training waits for the device.

What makes the host wait is reading a tensor's values: `item`, `tolist`, a truth value, a copy to
the CPU, and everything whose shape depends on values. On a CPU all of them are quick, so they are
counted here as torch dispatches them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ldm_pipeline.training import engine
from ldm_pipeline.training.adapter_config import AdapterSettings
from ldm_pipeline.training.engine import fit
from ldm_pipeline.training.lcm_full import distillation
from ldm_pipeline.training.lora import LoraObjective
from tests.training import test_lcm_objective, test_lora_objective
from tests.training.conftest import captioned
from tests.training.tiny_lora import open_model

WAITS = {
    "aten::_local_scalar_dense": "item, tolist, float, int or bool of a tensor",
    "aten::is_nonzero": "a truth value",
    "aten::equal": "a comparison of whole tensors",
    "aten::nonzero": "a shape that depends on values",
    "aten::masked_select": "a shape that depends on values",
    "aten::_unique2": "a shape that depends on values",
}


class Waiting(TorchDispatchMode):
    """Counts, while it is on, what would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in WAITS:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


READERS = ("cpu", "numpy", "tolist")
"""Methods that torch does not dispatch where the tensor is on the CPU already."""


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[Counter[str]]:
    """What each step of a run waits for, from its batch on the device to the end of its update."""
    counted: list[Counter[str]] = []
    watching: list[bool] = []

    def reader(name: str) -> Callable[..., Any]:
        read = getattr(torch.Tensor, name)

        def counting(*told: Any, **named: Any) -> Any:
            if watching:
                counted[-1][name] += 1
            return read(*told, **named)

        return counting

    def watched(method: Callable[..., Any], *told: Any) -> Any:
        watching.append(True)
        with Waiting() as mode:
            answer = method(*told)
        watching.clear()
        counted[-1] += mode.found
        return answer

    backward, update = engine._Run._backward, engine._Run._update

    def first(run: Any, step: int, pieces: Any) -> Any:
        counted.append(Counter())
        return watched(backward, run, step, pieces)

    for name in READERS:
        monkeypatch.setattr(torch.Tensor, name, reader(name))
    monkeypatch.setattr(engine._Run, "_backward", first)
    monkeypatch.setattr(engine._Run, "_update", lambda run, step: watched(update, run, step))
    return counted


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "LoRA": (test_lora_objective, {}),
    "LoRA of the text encoder too": (test_lora_objective, {"lora": {"text_encoder": True}}),
    "LoRA in bf16, an average, two pieces": (
        test_lora_objective,
        {"run": {"mixed_precision": "bf16", "accumulation": 2}, "optimiser": {"ema_decay": 0.9}},
    ),
    "weighted and penalised LoRA": (
        test_lora_objective,
        {"loss": {"weighting": "min_snr", "huber": 0.1, "offset_noise": 0.1}},
    ),
    "LoRA by Muon": (test_lora_objective, {"optimiser": {"kind": "muon"}}),
    "DoRA": (test_lora_objective, {"lora": {"dora": True}}),
    "LCM": (test_lcm_objective, {}),
    "LCM by Heun, of an average": (
        test_lcm_objective,
        {"lcm": {"solver": "heun", "target": "average"}, "optimiser": {"ema_decay": 0.9}},
    ),
    "a full LCM": (
        test_lcm_objective,
        {"lcm": {"full": True, "w_channels": 8}, "lora": AdapterSettings().model_dump()},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_no_step_waits_for_the_device(case: str, waits: list[Counter[str]], tmp_path: Path) -> None:
    test, told = CASES[case]
    folder = captioned(tmp_path / "pictures", test.SIZES)
    quiet = {"steps": 3, "log_every": 2, "validate_every": 100, "workers": 0, "log_with": "none"}
    config = test.config_of(folder, **{**told, "run": {**quiet, **told.get("run", {})}})
    kind = LoraObjective if test is test_lora_objective else distillation
    fit(kind(config, open_model), config)
    assert waits == [Counter()] * 3


def test_what_waits_is_seen(waits: list[Counter[str]], tmp_path: Path) -> None:
    """An optimiser that cannot leave a step out by itself waits in each."""
    folder = captioned(tmp_path / "pictures", test_lora_objective.SIZES)
    config = test_lora_objective.config_of(
        folder,
        run={"steps": 2, "log_every": 2, "log_with": "none"},
        optimiser={"kind": "adafactor"},
    )
    fit(LoraObjective(config, open_model), config)
    assert [bool(step) for step in waits] == [True, True]
