"""How the processes of a run stay together: one start, one sum of gradients, one decision to stop.

Each process computes its share of a batch without a word to the others; then `agree` tells what
happened anywhere (on the host, so that no accelerator is waited for), and `average` takes the mean
of everything in one collective. A process that ran out of memory can still say so: the others have
not yet begun to wait for its gradients. One that is gone is a `LostPeer` for all that wait for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor

from ldm_pipeline.errors import UserError

PATIENCE = timedelta(days=30)
"""How long processes wait where each has work of its own; elsewhere torch gives up after half an
hour at most. One that ended is noticed at once either way."""


class LostPeer(ConnectionError):
    """Another process of the run has ended, or answers no more, while this one waits for it."""


def launched() -> PartialState:
    """What accelerate launched; the first call in a process joins it to the others.

    accelerate itself heeds ACCELERATE_USE_CPU only where it is told so; without, processes that
    have no GPU would each believe that they are alone. Raises `UserError` under DeepSpeed.
    """
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise UserError(
            "DeepSpeed is not supported; to share the frozen weights out over the processes use"
            " accelerate launch --config_file configs/accelerate/fsdp.yaml"
        )
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    without = several and not torch.accelerator.is_available()
    return PartialState(cpu=without or parse_flag_from_env("ACCELERATE_USE_CPU"))


def leave() -> None:
    """Take leave of the other processes, however the run ended: an interpreter that ends while
    gloo's threads still listen may be aborted, with an exit code of its own."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Ranks:
    """The processes that accelerate launched; one alone needs no collective."""

    def __init__(self, state: PartialState) -> None:
        self.index, self.count = state.process_index, state.num_processes
        self._hosts = self._patient = None
        if self.count > 1:
            with _listening():
                self._patient = dist.new_group(backend="gloo", timeout=PATIENCE)
                if dist.get_backend() != "gloo":
                    self._hosts = dist.new_group(backend="gloo")

    def start_alike(self, tensors: Iterable[Tensor]) -> None:
        """Every process takes the values of the first one."""
        if self.count > 1:
            with _listening():
                for tensor in tensors:
                    dist.broadcast(tensor.detach(), 0)

    def agree(self, *happened: bool) -> tuple[bool, ...]:
        """Which of these happened in any process."""
        if self.count == 1:
            return happened
        flags = torch.tensor(happened, dtype=torch.int32)
        with _listening():
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._hosts)
        return tuple(bool(flag) for flag in flags.tolist())

    def average(self, buffer: Tensor) -> None:
        """Put the mean over all processes into `buffer`."""
        if self.count > 1:
            with _listening():
                dist.all_reduce(buffer)
            buffer.div_(self.count)

    def total(self, values: Tensor) -> Tensor:
        """The sum of `values`, on the host, over all processes."""
        if self.count > 1:
            with _listening():
                dist.all_reduce(values, group=self._hosts)
        return values

    def wait(self) -> None:
        """Until every process has called this, for a month at most."""
        self.told("")

    def told(self, text: str) -> list[str]:
        """What each process says, empty answers left out; all are waited for, a month at most."""
        if self.count == 1:
            return [text] if text else []
        answers: list[str] = [""] * self.count
        with _listening():
            dist.all_gather_object(answers, text, group=self._patient)
        return [answer for answer in answers if answer]


@contextmanager
def _listening() -> Iterator[None]:
    """Within the block, in which processes wait for each other, a failure is a `LostPeer`."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        why = " ".join(str(error).split())
        raise LostPeer(
            f"another process of this run ended; its message says why ({why})"
        ) from error
