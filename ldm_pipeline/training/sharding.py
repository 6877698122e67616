"""FSDP2 of what is frozen: each process keeps a part of the base, and gathers a block to use it.

What is trained stays whole in every process: it is small, and the engine averages its gradients in
one collective. So the updates are those of a run that shares nothing out. Text encoders stay whole,
too: transformers finds the layers whose states it returns by their class, which FSDP changes.

A process that calls a network waits for all others to call it too: their calls have to be the same
in number and order, except within `whole`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ldm_pipeline.errors import UserError
from ldm_pipeline.training.objective import Sharing

log = logging.getLogger(__name__)

BLOCKS = (BasicTransformerBlock, ResnetBlock2D)
"""Classes whose weights are gathered together; what is left of the network is one more block."""


def sharding(state: PartialState) -> bool:
    """Whether accelerate was told to use FSDP; `UserError` for its first version."""
    asked = parse_flag_from_env("ACCELERATE_USE_FSDP")
    if asked and os.environ.get("FSDP_VERSION") != "2":
        raise UserError("FSDP of version 1 is not supported; set fsdp_version: 2")
    return asked and state.num_processes > 1


class Shards:
    """The frozen weights of an objective's network, shared out where `sharding` says so."""

    def __init__(
        self, objective: object, trained: Iterable[nn.Parameter], state: PartialState
    ) -> None:
        self.blocks: list[Any] = []
        if not sharding(state):
            return
        if not isinstance(objective, Sharing):
            raise UserError(
                "FSDP shares out what is frozen, and this kind of training saves that too; launch"
                " with --multi_gpu"
            )
        network, kept = objective.shared, set(trained)
        total = _held(network, kept)
        mesh = init_device_mesh(state.device.type, (state.num_processes,))
        self.blocks = [part for part in network.modules() if isinstance(part, BLOCKS)]
        self.blocks.append(network)
        for block in self.blocks:
            fully_shard(block, mesh=mesh, ignored_params=kept)
        if state.is_main_process:
            share = _held(network, kept)
            log.info("FSDP: each process holds %d of the network's %d weights", share, total)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within the block every process has all weights, and calls networks as it likes.

        All processes have to enter it.
        """
        for block in self.blocks:
            block.set_reshard_after_forward(False, recurse=False)
            block.unshard()
        try:
            yield
        finally:
            for block in self.blocks:
                block.reshard()
                block.set_reshard_after_forward(True, recurse=False)

    def out_of_memory(self) -> None:
        """Raise `UserError` where the others wait for this process's part of the weights, so that
        it cannot try again with less."""
        if self.blocks:
            raise UserError(
                "out of memory: under FSDP a step cannot be cut into smaller pieces while it runs;"
                " raise run.accumulation"
            )


def _held(module: nn.Module, kept: set[nn.Parameter]) -> int:
    """How many frozen weights of `module` this process has."""
    frozen = [p for p in module.parameters() if p not in kept]
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in frozen)
