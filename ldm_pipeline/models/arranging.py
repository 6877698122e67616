"""A pipeline as a `Memory` wants it: hooks off, weights rounded, attention chosen, blocks compiled,
tiles set, and every network put where it belongs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ldm_pipeline.memory import Memory
from ldm_pipeline.models import attention, compiling, offloading, quantising


def resolve(memory: Memory, device: torch.device, dtype: torch.dtype) -> Memory:
    """What `memory` comes to on `device` in `dtype`: "auto" and xformers become what can run.

    Raises `UserError` for what this device or machine cannot do at all.
    """
    offloading.check(memory.offload, device)
    quantising.check(memory.quantise)
    if memory.compile:
        compiling.check(device)
    return replace(memory, attention=attention.resolve(memory.attention, device, dtype))


def arrange(pipe: Any, memory: Memory, device: torch.device | None = None) -> Memory:
    """Let `pipe` draw as `memory` says, on `device`; what it came to (`resolve`) is given back.

    Without a `device` it stays where it is, or with offload goes to this machine's GPU. Raises
    `UserError`, nothing changed, for what cannot be done here.
    """
    own: torch.device = pipe._execution_device
    if device is None:
        found = offloading.accelerator() if memory.offload != "none" and own.type == "cpu" else own
        device = found or own
    offloading.check_there(device)
    unet, vae = pipe.unet, pipe.vae
    dtype = torch.float32 if unet is None else unet.dtype
    resolved = resolve(memory, device, dtype)
    if unet is not None:
        quantising.quantise(unet, resolved.quantise)
    offloading.release(pipe)
    if unet is not None:
        attention.attend(unet, resolved.attention)
        compiling.compile_blocks(unet, resolved.compile)
    if vae is not None:
        (vae.enable_tiling if resolved.tiling else vae.disable_tiling)()
        (vae.enable_slicing if resolved.slicing else vae.disable_slicing)()
    offloading.place(pipe, resolved.offload, device)
    return resolved
