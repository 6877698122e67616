"""SDXL's UNet under the names of its first release (sgm), which kohya's files for SDXL use.

There the blocks are one list: `input_blocks` has the first convolution, and for each of the three
levels two layers and what halves the resolution; `output_blocks` has three layers for each level.
A layer's part 0 is its resnet (or what halves), 1 its transformer, 2 what doubles.
"""

from __future__ import annotations

from ldm_pipeline.errors import UserError
from ldm_pipeline.models.original.unet import ENDS as ENDS_OF_ALL
from ldm_pipeline.models.original.unet import RESNET as RESNET_OF_ALL

LAYERS = 2
"""Layers of each level going down, of SDXL and all that was made from it; one more going up."""

ENDS = {name: sgm for name, sgm in ENDS_OF_ALL.items() if "norm" not in name and "cond" not in name}
RESNET = {name: sgm for name, sgm in RESNET_OF_ALL.items() if "norm" not in name}
"""What a LoRA adapts of those: layers with a matrix, which SDXL has."""
_ENDS_BACK = {sgm: name for name, sgm in ENDS.items()}
_RESNET_BACK = {sgm: name for name, sgm in RESNET.items()}


def to_sgm(name: str) -> str:
    """The sgm name of the UNet's module `name`; `UserError` where SDXL has no such place."""
    if name in ENDS:
        return ENDS[name]
    level, _, place = name.partition(".")
    try:
        if level == "mid_block":
            kind, number, rest = _inner(place)
            position = {("resnets", 0): 0, ("attentions", 0): 1, ("resnets", 1): 2}[kind, number]
            return f"middle_block.{position}.{_rest(kind, rest, RESNET)}"
        block, _, place = place.partition(".")
        kind, number, rest = _inner(place)
        if level == "down_blocks":
            if (kind, number, rest) == ("downsamplers", 0, "conv"):
                return f"input_blocks.{(LAYERS + 1) * (int(block) + 1)}.0.op"
            position = (LAYERS + 1) * int(block) + _below(number, LAYERS) + 1
            return f"input_blocks.{position}.{_part(kind)}.{_rest(kind, rest, RESNET)}"
        if level == "up_blocks":
            position = (LAYERS + 1) * int(block)
            if (kind, number, rest) == ("upsamplers", 0, "conv"):
                return f"output_blocks.{position + LAYERS}.2.conv"
            position += _below(number, LAYERS + 1)
            return f"output_blocks.{position}.{_part(kind)}.{_rest(kind, rest, RESNET)}"
    except (KeyError, ValueError):
        pass
    raise UserError(f"unet.{name} has no place in SDXL's UNet, and so no name in kohya's layout")


def from_sgm(name: str) -> str:
    """The diffusers name of an sgm module; other names, and those of no module, as they are."""
    if name in _ENDS_BACK:
        return _ENDS_BACK[name]
    words = name.split(".")
    try:
        level, position, part = words[0], int(words[1]), words[2]
        rest = ".".join(words[3:])
        if level == "middle_block":
            kind, number = {0: ("resnets", 0), 1: ("attentions", 0), 2: ("resnets", 1)}[position]
            rest = _rest(kind, ".".join(words[2:]), _RESNET_BACK)
            return f"mid_block.{kind}.{number}.{rest}"
        if level == "input_blocks":
            block, layer = divmod(position - 1, LAYERS + 1)
            if rest == "op":
                return f"down_blocks.{block}.downsamplers.0.conv"
            kind = {"0": "resnets", "1": "attentions"}[part]
            return f"down_blocks.{block}.{kind}.{layer}.{_rest(kind, rest, _RESNET_BACK)}"
        if level == "output_blocks":
            block, layer = divmod(position, LAYERS + 1)
            if rest == "conv":
                return f"up_blocks.{block}.upsamplers.0.conv"
            kind = {"0": "resnets", "1": "attentions"}[part]
            return f"up_blocks.{block}.{kind}.{layer}.{_rest(kind, rest, _RESNET_BACK)}"
    except (KeyError, ValueError, IndexError):
        pass
    return name


def _inner(place: str) -> tuple[str, int, str]:
    """(kind, number, the rest) of what follows a block's name."""
    kind, number, rest = place.split(".", 2)
    return kind, int(number), rest


def _part(kind: str) -> int:
    return {"resnets": 0, "attentions": 1}[kind]


def _rest(kind: str, rest: str, resnet: dict[str, str]) -> str:
    """What stands behind a resnet's or a transformer's name; `KeyError` for what a resnet lacks."""
    return resnet[rest] if kind == "resnets" else rest


def _below(number: int, most: int) -> int:
    if not 0 <= number < most:
        raise ValueError
    return number
