"""Where a training run starts: from weights that were trained before, in what precision and how."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from ldm_pipeline.errors import UserError
from ldm_pipeline.lora import files
from ldm_pipeline.lora.inject import Adapter
from ldm_pipeline.lora.weights import LORA_A, LORA_B, split
from ldm_pipeline.models import compiling
from ldm_pipeline.models.precision import quick_in_bfloat16
from ldm_pipeline.processes.ranks import launched
from ldm_pipeline.training.block_attention import BlockAttention
from ldm_pipeline.training.config import RunSettings

log = logging.getLogger(__name__)

SMALL_GRID = 32
"""Places along each side; of 64 the matrix takes 268 MB in each attention of Stable Diffusion."""

SPARE_SHAPES = 8
"""Compilations for what cannot be foreseen: pieces that were halved, or a sample by itself."""

RANK_AXIS = {LORA_A: 0, LORA_B: 1}
"""Which axis of a LoRA's parts counts its ranks."""

NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")


def part_of(folder: Path, part: str) -> Path:
    """The folder of a part of what a run exported, or `folder` itself where it is that already."""
    return folder / part if (folder / part).is_dir() else folder


def take_weights(module: nn.Module, folder: Path, setting: str = "begin_from") -> None:
    """Put the weights of the model in `folder` into `module`, in the module's own precision.

    Raises UserError, which calls the `setting` that named the folder by its name, where the folder
    has none or they are those of a model of another shape.
    """
    file = weights_in(folder, setting)
    try:
        module.load_state_dict(load_file(file))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{setting}: {file} cannot be read ({error})") from error
    except RuntimeError as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{setting}: {file} is a model of another shape ({why})") from error


def weights_in(folder: Path, setting: str = "begin_from") -> Path:
    """The file of weights in a model's folder; UserError, as of `take_weights`, for none."""
    found = [folder / name for name in NAMES if (folder / name).is_file()]
    if not found:
        raise UserError(f"{setting}: {folder} holds none of {', '.join(NAMES)}")
    return found[0]


def check_adapter(place: Path) -> None:
    """Raise UserError where begin_from's `place` has no LoRA; its header alone is read."""
    try:
        files.inspect(place)
    except UserError as error:
        raise UserError(f"begin_from: {error}") from error


@torch.no_grad()
def take_adapter(adapter: Adapter, place: Path) -> None:
    """Put a LoRA file into `adapter`, which then changes its networks as the file does.

    Its ranks may be higher than the file's: the further rows of A stay as they were drawn, and the
    further columns of B zero. Where alphas differ, B makes up for it. Raises UserError, and leaves
    `adapter` as it was, for a file of other modules, of a higher rank, or of another kind (DoRA).
    """
    loaded = files.load(place)
    odd = sorted(loaded.tensors.keys() ^ adapter.parameters.keys())
    if odd:
        raise UserError(
            f"begin_from: {place} does not adapt what lora.* asks for ({len(odd)} differences, as"
            f" {odd[0]})"
        )
    for name, parameter in adapter.parameters.items():
        there, here = tuple(loaded.tensors[name].shape), tuple(parameter.shape)
        if not _fits(there, here, RANK_AXIS.get(split(name)[2])):
            raise UserError(
                f"begin_from: {name} in {place} has the shape {list(there)}, not {list(here)}: it"
                " is another model's, or of a higher rank than lora.* asks for (ldm lora resize"
                " lowers it)"
            )
    for name, parameter in adapter.parameters.items():
        component, module, part = split(name)
        found = loaded.tensors[name]
        if part == LORA_B:
            theirs, ours = (w.layouts[component].scale(module) for w in (loaded, adapter))
            found = found.float() * (theirs / ours)  # in 16 bits, small numbers would be lost
        parameter[tuple(slice(n) for n in found.shape)] = found


def _fits(found: Sequence[int], ours: Sequence[int], rank_axis: int | None) -> bool:
    """Whether two shapes of a LoRA's part are the same but for a lower rank of the one found."""
    if len(found) != len(ours):
        return False
    apart = [axis for axis, (n, m) in enumerate(zip(found, ours, strict=True)) if n != m]
    return not apart or (apart == [rank_axis] and found[apart[0]] < ours[apart[0]])


def precision(asked: str, device: str | None = None) -> str:
    """What `mixed_precision` comes to on a kind of device (the process's own unless one is named):
    "no", "bf16" or "fp16".

    "auto" is bf16 where the hardware multiplies it sooner than float32 (about twice as fast), and
    float32 elsewhere.
    """
    if asked != "auto":
        return asked
    return "bf16" if quick_in_bfloat16(device or launched().device.type) else "no"


def warn_of_accelerate(run: RunSettings) -> None:
    """Say in one line what `accelerate launch` was asked for that `run` decides otherwise.

    "no" and 1 are what it sets where nobody asks.
    """
    odd = []
    for flag, name, ours in (
        ("mixed_precision", "mixed_precision", precision(run.mixed_precision)),
        ("gradient_accumulation_steps", "accumulation", str(run.accumulation)),
    ):
        asked = os.environ.get(f"ACCELERATE_{flag.upper()}", "no").lower()
        if asked not in ("no", "1", "auto", ours):
            odd.append(f"--{flag} {asked} has no effect, run.{name} counts: {ours}")
    if odd:
        log.warning("accelerate's %s", "; ".join(odd))


def attend_quickly(unet: UNet2DConditionModel, precision: str, device: str) -> None:
    """Let a UNet that is trained attend in the way whose backward pass is quickest there.

    On a CPU the fused attention's backward in bf16 takes 24 % of the bundled model's step; with
    plain matrix products a step is 1.5 x faster (109 samples/s instead of 70, on 2 cores). Those
    keep the matrix of all pairs of places, so that only small grids attend so; large ones do it
    block by block.
    """
    if precision == "bf16" and device == "cpu":
        small = (unet.config.sample_size or SMALL_GRID) <= SMALL_GRID
        unet.set_attn_processor(AttnProcessor() if small else BlockAttention())


def recompute(*networks: nn.Module) -> None:
    """Let networks of diffusers and transformers that are trained compute their layers again in the
    backward pass, and not keep what those say."""
    for network in networks:
        if isinstance(network, ModelMixin):
            network.enable_gradient_checkpointing()
        else:
            assert isinstance(network, PreTrainedModel)
            # Later versions of transformers 5 call it otherwise, and warn of the earlier name.
            earlier = network.gradient_checkpointing_enable
            getattr(network, "activation_checkpointing_enable", earlier)({"use_reentrant": False})


def compiles() -> bool:
    """Whether this machine can compile what is trained; where it cannot, a line says why."""
    state = launched()
    try:
        compiling.check(state.device)
    except UserError as error:
        if state.is_main_process:
            log.warning("going on without run.compile: %s", error)
        return False
    return True


def compiled(module: nn.Module, shapes: int = 1) -> Any:
    """What calls `module`, compiled at its first call, and anew for inputs of other shapes.

    `shapes` are as many as it may meet: torch alone gives up after its eighth compilation, and
    calls the module as it is, at its old speed.

    Layouts stay as they are: where the compiler of torch 2.13 changes them on a CPU, the gradient
    of a nearest-neighbour upsampling before a convolution is lost, and a UNet trains at its finest
    level alone, without a word.
    """
    settings = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, shapes + SPARE_SHAPES)
    return torch.compile(module, dynamic=False, options={"layout_optimization": False})
