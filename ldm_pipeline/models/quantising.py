"""Weights of a UNet in 8 bits, by torchao: a quarter of float32, half of bfloat16 and float16.

Only the linear layers of attention blocks are rounded, 86 % of the weights of SDXL's UNet and 28 %
of Stable Diffusion 1.5's: torchao has nothing for the convolutions, and the layers that are told
the time are left exact. Each row of a matrix has its own scale; what is computed is computed in the
pipeline's precision.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from ldm_pipeline.errors import UserError

if TYPE_CHECKING:
    from torch import nn

KINDS = {"Int8Tensor": "int8", "Float8Tensor": "float8"}
"""What torchao calls the weights of each kind."""


def check(how: str) -> None:
    """Raise `UserError` where torchao is asked for and missing."""
    if how != "none" and find_spec("torchao") is None:
        raise UserError(
            f"quantise={how!r} needs torchao, which is not installed: pip install"
            " 'ldm-pipeline[quantise]'"
        )


def quantised(network: nn.Module) -> str:
    """In what the weights of `network` are kept: "int8", "float8", or "none" of these."""
    for weight in network.parameters():
        if (kind := KINDS.get(type(weight).__name__)) is not None:
            return kind
    return "none"


def quantise(network: nn.Module, how: str) -> None:
    """Round the weights of the attention blocks of `network` to `how`, layer by layer.

    Adapters' own layers stay as they are. Raises `UserError` where the weights are rounded to
    something else already.
    """
    if (now := quantised(network)) == how:
        return
    if now != "none":
        raise UserError(
            f"quantise={how!r}: the weights were rounded to {now}; open the model anew for that"
        )
    check(how)
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    config = {"int8": Int8WeightOnlyConfig, "float8": Float8WeightOnlyConfig}[how]()
    quantize_(network, config, filter_fn=_attends)


def _attends(module: nn.Module, name: str) -> bool:
    """Whether `module` is a linear layer of an attention block, and no adapter's."""
    from torch import nn  # the command asks this module what is installed, before torch is there

    return isinstance(module, nn.Linear) and "attentions." in name and "lora_" not in name
