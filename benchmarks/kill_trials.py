"""Kill a training run while it saves, over and over, and see whether it still ends as it should.

    python benchmarks/kill_trials.py [TRIALS]

One run of a toy model saves a checkpoint after every step. It is killed (SIGKILL) after a random
time, started again, killed again, …; each start must find a whole checkpoint and go on from it.
At the end it is let finish, and compared bit for bit with a run that nobody killed. Printed are the
kills, those that fell into the writing of a checkpoint (a half-written folder was left), and those
after which the run could not resume, which must be 0; the exit code is 1 otherwise.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm_pipeline.training import checkpoint
from ldm_pipeline.training.config import OptimiserSettings, RunSettings, TrainingConfig
from ldm_pipeline.training.engine import fit
from tests.training.toy import Toy

ENDLESS = 10**9


def config(out: Path, steps: int, save_every: int) -> TrainingConfig:
    """A toy's run whose learning rate does not depend on when it ends."""
    run = RunSettings(
        out=out, steps=steps, batch_size=4, mixed_precision="no", workers=0,
        log_every=1000, validate_every=ENDLESS, save_every=save_every,
    )  # fmt: skip
    return TrainingConfig(run=run, optimiser=OptimiserSettings(lr=1e-2, warmup_steps=2))


def start(settings: TrainingConfig) -> int:
    """A process of its own that trains as told; its number."""
    number = os.fork()
    if number:
        return number
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    try:
        fit(Toy(settings), settings)
        os._exit(0)
    finally:
        os._exit(1)


def newest_step(folder: Path) -> int:
    """The step of the newest whole checkpoint, 0 without one."""
    found = checkpoint.newest(folder)
    return 0 if found is None else int(checkpoint.load(found)[1]["step"])


def main(trials: int) -> int:
    """Run the trials and print what came of them."""
    torch.set_num_threads(1)
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as place:
        killed, whole = Path(place) / "killed", Path(place) / "whole"
        checkpoints = killed / "checkpoints"
        reached = during = lost = 0
        for _ in tqdm(range(trials), unit="kill"):
            number = start(config(killed, ENDLESS, save_every=1))
            before = time.monotonic()
            while newest_step(checkpoints) <= reached:  # so that every kill counts
                if os.waitpid(number, os.WNOHANG)[0] or time.monotonic() - before > 60:
                    print("the run did not go on")
                    return 1
                time.sleep(0.01)
            time.sleep(chance.random() * 0.1)
            os.kill(number, signal.SIGKILL)
            os.waitpid(number, 0)
            during += any(checkpoints.glob(f"{checkpoint.UNFINISHED}*"))
            step = newest_step(checkpoints)
            lost += step < reached
            reached = step
        ends = []
        for out, save_every in ((killed, 1), (whole, ENDLESS)):
            _, status = os.waitpid(start(config(out, reached + 5, save_every)), 0)
            found = checkpoint.newest(out / "checkpoints")
            if status or found is None:
                print(f"the run in {out.name} did not end")
                return 1
            ends.append(checkpoint.load(found)[0])
        same = all(
            torch.equal(value, ends[1][part][name])
            for part, tensors in ends[0].items()
            for name, value in tensors.items()
        )
    print(f"{trials} kills up to step {reached}; {during} while a checkpoint was being written")
    print(f"{lost} after which the run could not resume where it was")
    print(f"the end is {'bit for bit' if same else 'NOT'} that of the run that nobody killed")
    return 0 if same and not lost else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 100))
