"""How a training script runs: parse, check, build, fit; whatever ends it ends in one line.

Exit codes: 0 trained, 1 numbers that are not finite or a disk that takes no more, 2 a person's
mistake, 130 stopped.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

import psutil
import torch
from accelerate.commands.launch import launch_command_parser
from torch import nn

from ldm_pipeline.data.writing import in_one_line
from ldm_pipeline.errors import UserError
from ldm_pipeline.training.config import TrainingConfig, parse, read_yaml
from ldm_pipeline.training.engine import Interrupted, check, fit, on_signals
from ldm_pipeline.training.lock import alone_in
from ldm_pipeline.training.ranks import Ranks, launched, leave

STARTED = {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"}
"""What torch's and MPI's launchers set in the processes that they start."""

Config = TypeVar("Config", bound=TrainingConfig)


def launch(config: type[Config], objective: Callable[[Config], nn.Module]) -> None:
    """Train `objective` with the configuration on the command line and say where the model is."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        settings = parse(config)
        _start_the_others()
        _check_writable(settings.run.out)
        check(settings)
        with alone_in(settings.run.out, Ranks(launched())):
            final = fit(_built(objective, settings), settings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(130)
    except KeyboardInterrupt:
        print("stopped at once; the same command goes on from what is saved", file=sys.stderr)
        sys.exit(130)
    except (FloatingPointError, OSError) as error:
        print(f"error: {in_one_line(error)}", file=sys.stderr)
        sys.exit(1)
    finally:
        leave()
    if launched().is_main_process:
        print(f"the trained model is in {final}")


def _built(objective: Callable[[Config], nn.Module], settings: Config) -> nn.Module:
    """The objective, which may take long to encode its data; Interrupted by SIGINT and SIGTERM."""
    try:
        with on_signals(_interrupt):
            return objective(settings)
    except KeyboardInterrupt:
        raise Interrupted("stopped while encoding; the same command goes on from there") from None


def _interrupt(number: int) -> NoReturn:
    raise KeyboardInterrupt


def _check_writable(folder: Path) -> None:
    """Raise UserError where a run could not write its folder; nothing is written to find out."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        why = "cannot be written to" if place.is_dir() else "is a file"
        raise UserError(f"run.out={folder}: {place} {why}; choose another folder")


def _start_the_others() -> None:
    """On a machine without GPUs, become the processes that `accelerate launch` was told to start.

    There accelerate (1.15) starts one process whatever `--num_processes` says, unless MPI is used:
    it sets the address of a meeting point to which nobody else comes. torch's own launcher starts
    them all.
    """
    alone = "ACCELERATE_MIXED_PRECISION" in os.environ and not STARTED & os.environ.keys()
    if not alone or "MASTER_PORT" not in os.environ or torch.cuda.is_available():
        return
    told = psutil.Process(os.getppid()).cmdline()
    start = next((i for i, word in enumerate(told, 1) if word.endswith("launch")), len(told))
    asked = launch_command_parser().parse_known_args([*told[start:], sys.argv[0]])[0]
    count = asked.num_processes
    if not count and asked.config_file:
        count = read_yaml(Path(asked.config_file)).get("num_processes")
    script, arguments = sys.argv[0], sys.argv[1:]
    if not count:
        raise UserError(
            "accelerate starts a single process on a CPU; use torchrun --nproc_per_node N "
            f"{script} {' '.join(arguments)}"
        )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MASTER_")}
    environment["ACCELERATE_USE_CPU"] = "true"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, f"--nproc_per_node={count}", script, *arguments]
    os.execve(sys.executable, command, environment)
