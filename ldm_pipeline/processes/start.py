"""Starting the processes that `accelerate launch` was told to start, where it does not."""

from __future__ import annotations

import os
import sys

import psutil
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from ldm_pipeline.errors import UserError

STARTED = {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"}
"""What torch's and MPI's launchers set in the processes that they start."""


def start_the_others() -> None:
    """On a machine without GPUs, become the processes that `accelerate launch` was told to start.

    There accelerate (1.15) starts one process whatever `--num_processes` says, unless MPI is used:
    it sets the address of a meeting point to which nobody else comes. torch's own launcher starts
    them all. Does nothing for processes that were started in any other way.
    """
    alone = "ACCELERATE_MIXED_PRECISION" in os.environ and not STARTED & os.environ.keys()
    if not alone or "MASTER_PORT" not in os.environ or torch.cuda.is_available():
        return
    told = psutil.Process(os.getppid()).cmdline()
    start = next((i for i, word in enumerate(told, 1) if word.endswith("launch")), len(told))
    asked = launch_command_parser().parse_known_args([*told[start:], sys.argv[0]])[0]
    count = asked.num_processes
    if not count and asked.config_file:
        count = load_config_from_file(asked.config_file).num_processes
    module = getattr(sys.modules["__main__"], "__spec__", None)
    # After "--" torch takes no flag for an abbreviation of its own, as --n of --nnodes.
    script = ["-m", "--", module.name] if module is not None else ["--", sys.argv[0]]
    command = [*script, *sys.argv[1:]]
    if not count:
        raise UserError(
            "accelerate starts a single process on a CPU; use torchrun --nproc_per_node N "
            f"{' '.join(command)}"
        )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MASTER_")}
    environment["ACCELERATE_USE_CPU"] = "true"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    os.execve(sys.executable, [*launcher, f"--nproc_per_node={count}", *command], environment)
