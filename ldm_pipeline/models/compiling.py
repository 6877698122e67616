"""Compiled attention blocks: `torch.compile` where a UNet repeats itself, so that it waits little.

A block is compiled once for all that are alike; the whole UNet would take many times as long, and
draw hardly faster. Only these blocks are: no convolution, whose gradients below an upsampling the
compiler of torch 2.13 loses on a CPU (`training.start.compiled`).

What was compiled is kept in `folder()`, for the next process.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from ldm_pipeline.caches import user_cache
from ldm_pipeline.errors import UserError

SETTING = "TORCHINDUCTOR_CACHE_DIR"
BACKEND = "inductor"


def folder() -> Path:
    """Where compiled code is kept: what TORCHINDUCTOR_CACHE_DIR says, or a folder of our own in the
    user's cache. Its contents are run, so it is nobody else's to write."""
    if told := os.environ.get(SETTING):
        return Path(told)
    return user_cache("compiled")


def check(device: torch.device) -> None:
    """Raise `UserError` where the compiler that torch calls for the CPU's code is not there."""
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    name = os.environ.get("CXX") or usual
    if device.type == "cpu" and shutil.which(name) is None:
        raise UserError(
            f"compile needs a C++ compiler, and {name} is not there; install it, name another in"
            " CXX, or leave compile out"
        )


def compiled(network: nn.Module) -> bool:
    """Whether the blocks of `network` are compiled, or will be when they first run."""
    return any(block._compiled_call_impl is not None for block in _blocks(network))


def compile_blocks(network: nn.Module, wanted: bool) -> None:
    """Have the attention blocks of `network` compiled when they first run, or not at all."""
    if wanted and not compiled(network):
        place = folder()
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.environ[SETTING] = str(place)
        for block in _blocks(network):
            block.compile(backend=BACKEND)
    elif not wanted:
        for block in _blocks(network):
            block._compiled_call_impl = None


def _blocks(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, BasicTransformerBlock)]
