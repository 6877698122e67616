"""Narrow numbers: where bfloat16 is quick, and autoencoders that overflow in float16.

Float16's numbers end at 65,504, and what overflows is computed anew in float32. Every picture is
looked at by itself, and the autoencoder, which other pipelines may share, stays as it is: so a
picture is the same alone, in any batch, and whatever was drawn before it. SDXL's, whose
configuration says that it overflows (`force_upcast`), is not tried first (`widened`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakSet

import torch
from accelerate.utils.modeling import get_state_dict_offloaded_model
from torch import Tensor, nn

logger = logging.getLogger(__name__)

_telling = threading.Lock()
_told: WeakSet[nn.Module] = WeakSet()
"""The autoencoders of which was said that they overflow."""


def quick_in_bfloat16(device: str) -> bool:
    """Whether a kind of device multiplies bfloat16 sooner than float32: all GPUs that CUDA calls
    able, and CPUs with AMX, or with AVX512-BF16 unless they are Intel's.

    A Xeon with both does it by AMX; where a virtual machine hides that, AVX512-BF16 multiplied
    matrices at 0.53 of float32's rate, convolutions too (170 GFLOP/s for 318, on 2 cores).
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities() if device == "cpu" else {}
    if able.get("amx_bf16"):
        return True
    return bool(able.get("avx512_bf16")) and not str(able.get("cpu_name")).startswith("Intel")


def emulates_bfloat16() -> bool:
    """Whether this CPU is known to emulate it, some 30 times slower than it computes in float32;
    torch tells it of Intel's and AMD's."""
    able = torch.cpu.get_capabilities()
    return able.get("avx512_bf16") is False and not able.get("amx_bf16")


def finite(vae: Any, x: Tensor, ask: Callable[[Any, Tensor], Tensor]) -> Tensor:
    """ask(vae, x) [N, …], rows of it in float32 where float16 does not hold them.

    Where any row is computed anew, all come back in float32. x is [N, …], in any precision.
    """
    answer = ask(vae, x.to(vae.dtype))
    if vae.dtype != torch.float16:
        return answer
    whole = answer.isfinite().flatten(1).all(dim=1)
    if whole.all():
        return answer
    _tell(vae, "such pictures take float32")
    lost = ~whole
    answer = answer.float()
    answer[lost] = ask(_wide(vae, x.device), x[lost].float())
    return answer


def widened(vae: Any, device: torch.device) -> Any:
    """What to compute with on `device`: `vae`, or where it is known to overflow in float16, and is
    in it, a float32 copy of its weights as they are now."""
    if vae.dtype != torch.float16 or not vae.config.force_upcast:
        return vae
    _tell(vae, "it is computed with in float32")
    return _wide(vae, device)


def _tell(vae: nn.Module, so: str) -> None:
    """Say once of an autoencoder that it overflows, and what is done about it."""
    with _telling:
        if vae not in _told:
            _told.add(vae)
            logger.warning("this autoencoder overflows in float16: %s", so)


def _wide(vae: Any, device: torch.device) -> Any:
    """A float32 copy of `vae` on `device`, with its settings, under no hooks; it takes no time that
    one would see beside decoding, and is not kept."""
    vae = getattr(vae, "_orig_mod", vae)  # torch.compile's wrapper holds it
    if hasattr(vae, "_hf_hook"):
        vae._hf_hook.pre_forward(vae)  # as before its own methods: offloaded networks make room
    with torch.device("meta"):
        made = type(vae).from_config(vae.config)
    weights = vae.state_dict()
    if any(tensor.is_meta for tensor in weights.values()):  # its layers come and go
        weights = get_state_dict_offloaded_model(vae)
    own = {name: weights[name].to(device, torch.float32) for name in made.state_dict()}
    made.load_state_dict(own, assign=True)
    vars(made).update({k: v for k, v in vars(vae).items() if isinstance(v, bool | int | float)})
    return made


def of_component(wanted: torch.dtype | Mapping[str, torch.dtype], component: str) -> torch.dtype:
    """The dtype of one component, as diffusers reads a dictionary; `default` is the others'."""
    if isinstance(wanted, Mapping):
        return wanted.get(component, wanted.get("default", torch.float32))
    return wanted
