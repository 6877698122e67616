"""The configurations of accelerate that are shipped: it reads them, and they start one run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from torch import nn

from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.files import FILE_NAME
from ldm_pipeline.processes import ranks
from ldm_pipeline.training.sharding import Shards, sharding
from tests.training.conftest import captioned
from tests.training.test_processes import ROOT, Process, ended, free_port, saved

FOLDER = ROOT / "configs" / "accelerate"
MACHINES = {"multi_gpu": 1, "multi_node": 2, "fsdp": 1}


def test_accelerate_reads_them() -> None:
    """It refuses keys that it does not know."""
    assert {path.stem for path in FOLDER.iterdir()} == set(MACHINES)
    for name, machines in MACHINES.items():
        found = load_config_from_file(str(FOLDER / f"{name}.yaml"))
        assert found.num_machines == machines
        assert found.num_processes >= 2


def launched(name: str, module: str, *told: str) -> str:
    """What two processes say until they end that a shipped configuration starts.

    Several machines are played by as many launches on this one.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    file = str(FOLDER / f"{name}.yaml")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file]
    launch += ["--num_processes=2", f"--main_process_port={free_port()}"]
    runs: list[Process] = []
    try:
        for rank in range(MACHINES[name]):
            command = [*launch, f"--machine_rank={rank}", "-m", module, *told]
            runs.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                )
            )
        return "".join([ended(run) for run in runs])
    finally:
        for run in runs:
            with suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)


def test_several_machines_take_part_in_one_run(tmp_path: Path) -> None:
    told = ["--run.steps=3", "--run.batch_size=8", "--run.workers=0"]
    launched("multi_node", "tests.training.toy", f"--run.out={tmp_path}", *told)
    state = saved(tmp_path)[1]
    assert (state["processes"], state["step"]) == (2, 3)


def test_sharing_the_base_out_changes_no_adapter(tmp_path: Path) -> None:
    """With text encoders trained, held-out samples and pictures, which one process draws alone;
    the same command again only exports, with no step before."""
    pictures = captioned(tmp_path / "pictures", [(64, 64)] * 7)
    told = [
        "--model=xl", f"--data.source={pictures}", f"--data.cache={tmp_path / 'cache'}",
        "--data.resolution=64", "--data.fixed=true", "--data.held_out=0.4", "--run.steps=5",
        "--run.batch_size=4", "--run.accumulation=2", "--run.workers=0", "--run.validate_every=2",
        "--run.mixed_precision=no", "--optimiser.lr=0.001", "--optimiser.warmup_steps=0",
        "--lora.text_encoder=true", "--lora.rank=4", "--pictures.prompts=[red]",
        "--pictures.steps=1", "--gradient_checkpointing=true",
    ]  # fmt: skip
    weights, best = [], []
    for name in ("multi_gpu", "fsdp"):
        out = f"--run.out={tmp_path / name}"
        output = launched(name, "tests.training.tiny_lora", out, *told)
        held = re.search(r"holds (\d+) of the network's (\d+) w", output)
        assert (held is None) == (name == "multi_gpu")
        if held is not None:  # uneven rows are rounded up
            assert 0.5 <= int(held[1]) / int(held[2]) < 0.51
            file = tmp_path / name / "final" / FILE_NAME
            before = file.read_bytes()
            launched(name, "tests.training.tiny_lora", out, *told)
            assert file.read_bytes() == before
        parts, state = saved(tmp_path / name)
        weights.append(parts["weights"])
        best.append(state["best"])
    for key, value in weights[0].items():
        assert (value - weights[1][key]).abs().max() <= 1e-6, key
    moved = [value.abs().max() for key, value in weights[0].items() if "lora_B" in key]
    assert min(moved) > 1e-4
    assert best[0] == pytest.approx(best[1], rel=1e-6)


@dataclass
class Several:
    """What accelerate says of two processes."""

    num_processes: int = 2


def test_what_accelerate_offers_and_we_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    state: Any = Several()
    assert not sharding(state)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="fsdp_version: 2"):
        sharding(state)
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert sharding(state)
    assert not sharding(replace(state, num_processes=1))
    shards = Shards(nn.Linear(2, 2), [], replace(state, num_processes=1))
    shards.out_of_memory()  # a single process may try again
    shards.blocks = [nn.Linear(2, 2)]
    with pytest.raises(UserError, match=r"raise run\.accumulation"):
        shards.out_of_memory()
    with pytest.raises(UserError, match="launch with --multi_gpu"):
        Shards(nn.Linear(2, 2), [], state)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="DeepSpeed is not supported"):
        ranks.launched()
