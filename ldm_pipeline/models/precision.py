"""Autoencoders in float16, whose numbers end at 65,504: what overflows is computed anew in float32.

Every picture is looked at by itself, and the autoencoder stays as it is: so a picture is the same
alone, in any batch, and whatever was drawn before it. An autoencoder whose configuration says that
it overflows (`force_upcast`) is not tried first, but kept in float32 from the start.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

_widening = threading.Lock()
_told: WeakSet[nn.Module] = WeakSet()
"""The autoencoders of which was said that they overflow."""


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
    with _widening:
        if vae not in _told:
            _told.add(vae)
            logger.warning("this autoencoder overflows in float16: such pictures take float32")
    lost = ~whole
    answer = answer.float()
    answer[lost] = ask(_wide(vae, x.device), x[lost].float())
    return answer


def widen(vae: Any) -> None:
    """Keep an autoencoder that is known to overflow in float16 in float32 from here on."""
    with _widening:
        if vae.dtype == torch.float16 and vae.config.force_upcast:
            logger.warning("this autoencoder overflows in float16; it is kept in float32 from here")
            vae.to(torch.float32)


def _wide(vae: Any, device: torch.device) -> Any:
    """A float32 copy of `vae` on `device`, with its settings, under no hooks; it takes no time that
    one would see beside decoding, and is not kept."""
    with torch.device("meta"):
        made = type(vae).from_config(vae.config)
    weights = {name: tensor.to(device, torch.float32) for name, tensor in vae.state_dict().items()}
    made.load_state_dict(weights, assign=True)
    vars(made).update({k: v for k, v in vars(vae).items() if isinstance(v, bool | int | float)})
    return made
