"""What a run exports is half the size of what it trains: a copy in 16 bits."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

Part = TypeVar("Part")


def halved(part: Part) -> Part:
    """A copy of a component in float16, without hooks or adapters; what has no weights is given
    back. The one in use stays what it is."""
    if not isinstance(part, nn.Module):
        return part
    kind: Any = type(part)
    own = isinstance(part, PreTrainedModel)  # which transformers makes otherwise than diffusers
    made: Any = kind(part.config) if own else kind.from_config(part.config)
    made.load_state_dict(part.state_dict())
    half: Part = made.half()
    return half
