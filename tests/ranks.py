"""Two real processes of one run, forked from the test's own: no package is imported again.

They speak through gloo on this machine. What a process prints, and the lines of its log, are in
`said-<rank>.txt` of the folder that they are given.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import torch

PATIENCE = 120.0
"""Seconds until two processes count as stuck: they take one, on a busy machine more."""


def two_ranks(folder: Path, work: Callable[[int], object]) -> tuple[list[int], list[str]]:
    """Let two processes do `work`, told their rank; their exit codes and what they said."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    fork = get_context("fork")
    runs = [fork.Process(target=_one, args=(work, rank, port, folder)) for rank in range(2)]
    for run in runs:
        run.start()
    try:
        for run in runs:
            run.join(PATIENCE)
    finally:
        for run in runs:
            run.kill()
            run.join()
    codes = [run.exitcode for run in runs]
    said = [(folder / f"said-{rank}.txt").read_text() for rank in range(2)]
    assert all(code is not None for code in codes)
    return [code for code in codes if code is not None], said


def _one(work: Callable[[int], object], rank: int, port: int, folder: Path) -> None:
    """In the new process: join the other, and work."""
    os.environ |= {
        "ACCELERATE_USE_CPU": "true", "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)  # a forked process has none of the threads that there were
    sys.stdout = sys.stderr = (folder / f"said-{rank}.txt").open("w", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    logging.getLogger().handlers.clear()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    work(rank)
