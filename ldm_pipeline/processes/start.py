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


def start_the_others(*, share_cores: bool = False) -> None:
    """On a machine without GPUs, become the processes that `accelerate launch` was told to start.

    There accelerate (1.15) starts one process whatever `--num_processes` says, unless MPI is used:
    it sets the address of a meeting point to which nobody else comes. torch's own launcher starts
    them all. Does nothing for processes that were started in any other way.

    accelerate has each process compute on one core, too, where nobody says on how many. With
    `share_cores` the processes share all of them; sums may then round otherwise from one number of
    processes, or machine, to the next.
    """
    alone = "ACCELERATE_MIXED_PRECISION" in os.environ and not STARTED & os.environ.keys()
    if not alone or torch.cuda.is_available():
        return
    cores = _free_cores() if share_cores else None
    if "MASTER_PORT" not in os.environ:
        if cores is not None:
            torch.set_num_threads(cores)
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
    if cores is not None:
        environment["OMP_NUM_THREADS"] = str(max(1, cores // count))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    os.execve(sys.executable, [*launcher, f"--nproc_per_node={count}", *command], environment)


def _free_cores() -> int | None:
    """The cores that this process may use, where only accelerate says that it is to use one; None
    where a person says how many."""
    if os.environ.get("OMP_NUM_THREADS") != "1":
        return None
    try:
        launcher = psutil.Process(os.getppid())
        flags = " ".join(launcher.cmdline()).replace("-", "_")
        if "OMP_NUM_THREADS" in launcher.environ() or "__num_cpu_threads" in flags:
            return None
    except psutil.Error:
        return None
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
