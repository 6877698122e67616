"""Networks that lie in the computer's memory until the GPU needs them.

Whoever draws with such a pipeline takes turns: a run moves the networks that another one is
computing with.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks import HookRegistry
from diffusers.hooks.group_offloading import (
    _GROUP_OFFLOADING,
    _LAYER_EXECUTION_TRACKER,
    _LAZY_PREFETCH_GROUP_OFFLOADING,
    _is_group_offload_enabled,
)
from torch import nn

from ldm_pipeline.errors import UserError

_turn = threading.RLock()
"""One for all pipelines: they may share networks, and the memory that is saved."""


def check(how: str, device: torch.device) -> None:
    """Raise `UserError` where nothing can be offloaded: on a CPU, where all lies already."""
    if how != "none" and device.type == "cpu":
        raise UserError(
            f"offload={how!r} keeps networks in the computer's memory until a GPU needs them, and"
            " this would draw on the CPU, which computes there; leave it out"
        )


def check_there(device: torch.device) -> None:
    """Raise `UserError` for a device that this machine has not, or torch was not built for."""
    found = accelerator()
    if device.type not in ("cpu", "meta", found.type if found is not None else "cpu"):
        raise UserError(f"device={str(device)!r} is not here: torch finds {found or 'no GPU'}")


def accelerator() -> torch.device | None:
    """The GPU of this machine, or None."""
    return torch.accelerator.current_accelerator(check_available=True)


def place(pipe: Any, how: str, device: torch.device) -> None:
    """Put the networks of `pipe` where `how`, one of `memory.OFFLOAD`, wants them, to draw on
    `device`; they are under no hooks yet (`release`)."""
    pipe.to(device if how == "none" else "cpu", silence_dtype_warnings=True)
    if how == "parts":
        pipe.enable_model_cpu_offload(device=device)
    elif how == "layers":
        kept = [name for name in pipe._exclude_from_cpu_offload if name in pipe.components]
        pipe.enable_group_offload(device, offload_type="leaf_level", exclude_modules=kept)


def release(pipe: Any) -> None:
    """Take all hooks off that move the networks of `pipe`, whoever put them on."""
    pipe.remove_all_hooks()
    for network in _networks(pipe):
        if _is_group_offload_enabled(network):
            registry = HookRegistry.check_if_exists_or_initialize(network)
            for hook in (
                _GROUP_OFFLOADING,
                _LAYER_EXECUTION_TRACKER,
                _LAZY_PREFETCH_GROUP_OFFLOADING,
            ):
                registry.remove_hook(hook, recurse=True)


def moves(network: nn.Module) -> bool:
    """Whether `network`, or a layer of it, comes and goes by hooks."""
    by_hook = any(hasattr(module, "_hf_hook") for module in network.modules())
    return by_hook or _is_group_offload_enabled(network)


@contextmanager
def in_turn(pipe: Any) -> Iterator[None]:
    """Within the block no other thread draws with networks that come and go; for other pipelines
    this is nothing. A run that starts another within itself goes on."""
    if not any(map(moves, _networks(pipe))):
        yield
        return
    with _turn:
        yield


def _networks(pipe: Any) -> list[nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, nn.Module)]
