"""Runs as people start them: several processes, and signals that reach a whole group of them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_pipeline.training import checkpoint
from tests.training.toy import Toy, settings

ROOT = Path(__file__).parents[2]


Process = subprocess.Popen[str]
PATIENCE = 240.0
"""Seconds until a run counts as stuck: it takes 5 on an idle machine, more on a busy one."""


@pytest.fixture
def started() -> Iterator[list[Process]]:
    """The processes of a test; none outlives it."""
    processes: list[Process] = []
    yield processes
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def start(
    out: Path,
    *told: str,
    rank: int = 0,
    ranks: int = 1,
    port: int = 0,
    module: str = "tests.training.toy",
) -> Process:
    """One process of a toy's run, in a process group of its own."""
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    if ranks > 1:
        environment |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    return subprocess.Popen(
        [sys.executable, "-m", module, "--run.out", str(out), *told],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def test_two_processes_do_what_one_does(tmp_path: Path, started: list[Process]) -> None:
    """2 processes with 4 samples each take the same steps as 1 process with 8."""
    told = ["--run.steps=5", "--run.batch_size=8", "--run.workers=0", "--optimiser.lr=0.01"]
    port = free_port()
    for rank in range(2):
        started.append(start(tmp_path / "two", *told, rank=rank, ranks=2, port=port))
    started.append(start(tmp_path / "one", *told))
    for run in started:
        output, _ = run.communicate(timeout=PATIENCE)
        assert run.returncode == 0, output
    parts = []
    for name in ("one", "two"):
        newest = checkpoint.newest(tmp_path / name / "checkpoints")
        assert newest is not None
        assert newest.name == "step-00000005"
        loaded, state = checkpoint.load(newest)
        assert state["processes"] == {"one": 1, "two": 2}[name]
        parts.append(loaded)
    for part, tensors in parts[0].items():
        for name, value in tensors.items():
            difference = (value - parts[1][part][name]).norm()
            # Means of 4 are averaged instead of one mean of 8: some 1e-7 of a gradient.
            assert difference <= 1e-6 * value.norm(), (part, name)
    begun = Toy(settings(tmp_path, seed=0)).first.weight
    assert (parts[0]["weights"]["first.weight"] - begun).abs().max() > 1e-3  # lr 0.01: it moved


def test_two_processes_train_the_adapter_that_one_does(
    tmp_path: Path, started: list[Process]
) -> None:
    """10 steps over pictures of three shapes: 2 x 4 samples with buckets are 1 x 8, the learning
    rate and what was seen included."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate([(64, 64), (96, 32), (32, 128)] * 5):
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(f"red, blue, {i}")
    told = [
        f"--data.source={pictures}", f"--data.cache={tmp_path / 'cache'}", "--data.resolution=64",
        "--data.bucket_step=32", "--data.captions.shuffle_tags=true", "--run.steps=10",
        "--run.batch_size=8", "--run.workers=0", "--run.mixed_precision=no",
        "--optimiser.lr=0.001", "--optimiser.warmup_steps=4", "--optimiser.cooldown_steps=4",
        "--data.held_out=0.15", "--run.validate_every=5",
    ]  # fmt: skip
    module, port = "tests.training.tiny_lora", free_port()
    for rank in range(2):
        run = start(tmp_path / "two", *told, rank=rank, ranks=2, port=port, module=module)
        started.append(run)
    started.append(start(tmp_path / "one", *told, module=module))
    for run in started:
        output, _ = run.communicate(timeout=PATIENCE)
        assert run.returncode == 0, output
    parts = []
    for name in ("one", "two"):
        newest = checkpoint.newest(tmp_path / name / "checkpoints")
        assert newest is not None
        loaded, state = checkpoint.load(newest)
        assert state["processes"] == {"one": 1, "two": 2}[name]
        parts.append((loaded["weights"], state["best"]))
    (one, best), (two, also) = parts
    total = sum(float(value.square().sum()) for value in one.values()) ** 0.5
    difference = sum(float((one[n] - two[n]).square().sum()) for n in one) ** 0.5
    # Sums in another order, passed on by AdamW for ten steps.
    assert difference <= 1e-5 * total
    assert best == pytest.approx(also, rel=1e-5)


def test_accelerate_starts_as_many_as_it_is_told(tmp_path: Path, started: list[Process]) -> None:
    """Also without GPUs, where accelerate by itself starts one."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    told = ["--run.out", str(tmp_path), "--run.steps=3", "--run.batch_size=8", "--run.workers=0"]
    run = subprocess.Popen(
        [*launch, str(ROOT / "tests" / "training" / "toy.py"), *told],
        cwd=tmp_path,
        env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    started.append(run)
    output, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, output
    newest = checkpoint.newest(tmp_path / "checkpoints")
    assert newest is not None
    assert checkpoint.load(newest)[1]["processes"] == 2


def test_a_signal_to_the_whole_group_saves_and_leaves_nobody(
    tmp_path: Path, started: list[Process]
) -> None:
    """As a closing terminal or a job scheduler does: the workers that prepare batches get it too,
    and still the step is finished and saved, and the exit code is that of an interruption."""
    told = ["--run.steps=1000000", "--run.workers=1", "--run.save_every=20"]
    run = start(tmp_path, *told)
    started.append(run)
    until = time.monotonic() + PATIENCE
    while not list((tmp_path / "checkpoints").glob("step-*")):
        assert time.monotonic() < until, "no checkpoint"
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGTERM)
    output, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == 130, output
    newest = checkpoint.newest(tmp_path / "checkpoints")
    assert newest is not None
    assert f"stopped at step {checkpoint.load(newest)[1]['step']};" in output
    assert not group_is_alive(run.pid)


def group_is_alive(group: int) -> bool:
    """Whether any process of the group is left, 5 s later at the latest."""
    for _ in range(50):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    return True
