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
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from ldm_pipeline.data.world import write_folder
from ldm_pipeline.data.world.concepts import write_concept
from ldm_pipeline.lora.files import FILE_NAME
from ldm_pipeline.training import checkpoint
from tests.training.conftest import captioned

ROOT = Path(__file__).parents[2]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def ended(run: Process, code: int = 0) -> str:
    """What a process said until it ended, with this exit code."""
    output, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == code, output
    return output


def saved(out: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The parts and the state of a run's newest checkpoint."""
    newest = checkpoint.newest(out / "checkpoints")
    assert newest is not None
    return checkpoint.load(newest)


def one_and_two(
    folder: Path, started: list[Process], module: str, *told: str
) -> list[tuple[dict[str, dict[str, Tensor]], dict[str, Any]]]:
    """The last checkpoints of the same run on one process and on two."""
    port = free_port()
    for rank in range(2):
        started.append(start(folder / "two", *told, rank=rank, ranks=2, port=port, module=module))
    started.append(start(folder / "one", *told, module=module))
    for run in started:
        ended(run)
    both = [saved(folder / name) for name in ("one", "two")]
    assert [state["processes"] for _, state in both] == [1, 2]
    return both


def test_two_processes_train_the_adapter_that_one_does(
    tmp_path: Path, started: list[Process]
) -> None:
    """10 steps over pictures of three shapes: 2 x 4 samples with buckets are 1 x 8, the learning
    rate and what was seen included."""
    pictures = captioned(tmp_path / "pictures", [(64, 64), (96, 32), (32, 128)] * 5)
    told = [
        f"--data.source={pictures}", f"--data.cache={tmp_path / 'cache'}", "--data.resolution=64",
        "--data.bucket_step=32", "--data.captions.shuffle_tags=true", "--run.steps=10",
        "--run.batch_size=8", "--run.workers=0", "--run.mixed_precision=no",
        "--optimiser.lr=0.001", "--optimiser.warmup_steps=4", "--optimiser.cooldown_steps=4",
        "--data.held_out=0.15", "--run.validate_every=5",
    ]  # fmt: skip
    module = "tests.training.tiny_lora"
    (parts, state), (others, other) = one_and_two(tmp_path, started, module, *told)
    one, two = parts["weights"], others["weights"]
    total = sum(float(value.square().sum()) for value in one.values()) ** 0.5
    difference = sum(float((one[n] - two[n]).square().sum()) for n in one) ** 0.5
    # Sums in another order, passed on by AdamW for ten steps.
    assert difference <= 1e-5 * total
    assert state["best"] == pytest.approx(other["best"], rel=1e-5)


def test_two_processes_distil_what_one_does(tmp_path: Path, started: list[Process]) -> None:
    """With pictures of two shapes, the average of the weights as the target, and what is seen."""
    pictures = captioned(tmp_path / "pictures", [(64, 64), (96, 32)] * 5, "red")
    told = [
        f"--data.source={pictures}", f"--data.cache={tmp_path / 'cache'}", "--data.resolution=64",
        "--data.bucket_step=32", "--data.held_out=0.2", "--run.steps=4", "--run.batch_size=4",
        "--run.workers=0", "--run.mixed_precision=no", "--run.validate_every=4",
        "--optimiser.lr=0.001", "--optimiser.warmup_steps=0", "--optimiser.ema_decay=0.9",
        "--lcm.target=average",
    ]  # fmt: skip
    module = "tests.training.tiny_lcm"
    (parts, state), (others, other) = one_and_two(tmp_path, started, module, *told)
    for part in ("weights", "average"):
        one, two = parts[part], others[part]
        total = sum(float(value.square().sum()) for value in one.values()) ** 0.5
        difference = sum(float((one[n] - two[n]).square().sum()) for n in one) ** 0.5
        # Sums in another order, passed on by AdamW for four steps.
        assert difference <= 1e-5 * total, part
    assert state["best"] == pytest.approx(other["best"], rel=1e-5)


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
    ended(run)
    assert saved(tmp_path)[1]["processes"] == 2


@pytest.mark.parametrize(
    ("flags", "said", "each"),
    [
        ([], {}, CORES),
        (["--num_processes", "2"], {}, max(1, CORES // 2)),
        ([], {"OMP_NUM_THREADS": "1"}, 1),
        (["--num_cpu_threads_per_process", "1"], {}, 1),
    ],
)
def test_processes_share_the_cores_unless_somebody_says_otherwise(
    tmp_path: Path, flags: list[str], said: dict[str, str], each: int
) -> None:
    """accelerate by itself leaves all but one core idle."""
    script = tmp_path / "threads.py"
    script.write_text(
        "import os, pathlib, torch\n"
        "from ldm_pipeline.processes.start import start_the_others\n"
        "start_the_others(share_cores=True)\n"
        "threads = str(torch.get_num_threads())\n"
        "pathlib.Path(os.environ.get('RANK', '0') + '.txt').write_text(threads)\n"
    )
    ours = ("ACCELERATE_", "OMP_", "MKL_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)} | said
    environment |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf")}
    launch = [sys.executable, "-m", "accelerate.commands.launch", *flags, str(script)]
    subprocess.run(launch, cwd=tmp_path, env=environment, check=True, timeout=PATIENCE)
    told = [int(file.read_text()) for file in sorted(tmp_path.glob("?.txt"))]
    assert told == [each] * (2 if "--num_processes" in flags else 1)


def test_the_command_of_the_readme_trains_as_it_is_typed(
    tmp_path: Path, started: list[Process]
) -> None:
    """The real model, for two steps, where the shipped configuration looks for its pictures."""
    for name in ("train", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_concept(tmp_path / "cactus", "cactus", 4)
    write_folder(tmp_path / "world", 4)
    typed = "train/train_lora.py --config configs/lora_tiny.yaml --run.steps 2"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}  # no settings of ours
    started.append(
        subprocess.Popen(
            [str(Path(sys.executable).with_name("accelerate")), "launch", *typed.split()],
            cwd=tmp_path,
            env={**environment, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    )
    assert ended(started[-1]).splitlines()[-1] == "the trained model is in runs/lora/final"
    weights = load_file(tmp_path / "runs" / "lora" / "final" / FILE_NAME)
    assert any(value.any() for name, value in weights.items() if "lora_B" in name)


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
    output = ended(run, 130)
    assert f"stopped at step {saved(tmp_path)[1]['step']};" in output
    assert not group_is_alive(run.pid)


def test_two_runs_in_one_folder_are_refused_and_a_kill_leaves_no_lock(
    tmp_path: Path, started: list[Process]
) -> None:
    """Every process of the second run refuses, in one line. Its workers outlive a killed run for
    a while: the next run starts nevertheless."""
    told = ["--run.workers=1", "--run.save_every=20", "--run.batch_size=8"]
    once = [*told, "--run.steps=1"]
    first = start(tmp_path, *told, "--run.steps=1000000")
    started.append(first)
    until = time.monotonic() + PATIENCE
    while not list((tmp_path / "checkpoints").glob("step-*")):
        assert time.monotonic() < until, "no checkpoint"
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.02)
    port = free_port()
    second = [start(tmp_path, *once, rank=rank, ranks=2, port=port) for rank in range(2)]
    started.extend(second)
    for run in second:
        assert f"error: another run writes into run.out={tmp_path};" in ended(run, 2)
    assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    started.append(start(tmp_path, *once))
    ended(started[-1])
    assert (tmp_path / "final" / "toy.safetensors").is_file()
    assert not (tmp_path / ".lock").exists()


def group_is_alive(group: int) -> bool:
    """Whether any process of the group is left, 5 s later at the latest."""
    for _ in range(50):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    return True
