"""How a pipeline's networks lie in memory and do their work: every choice, checked, as one value.

    load("my-model").arrange(Memory(attention="sliced", tiling=True))

What each choice does is in `models/arranging.py` and the modules that it calls. Nothing here
imports torch, so that the command refuses a mistake at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ldm_pipeline.errors import UserError, choose
from ldm_pipeline.values import check_flag

ATTENTION = ("auto", "sdpa", "xformers", "sliced")
OFFLOAD = ("none", "parts", "layers")
QUANTISE = ("none", "int8", "float8")


@dataclass(frozen=True)
class Memory:
    """What is given for less memory, or for speed; `UserError` for what does not go together.

    attention   how the UNet attends: "sdpa" is torch's own, "xformers" that of the package, where
                it is installed and can run (else sdpa, and a logged line says why), "sliced" does
                one head at a time: less memory where sdpa has no kernel of its own, and slower.
                "auto" is xformers where it runs on a GPU, and sdpa elsewhere
    offload     what lies in the computer's memory until the GPU needs it: "parts" are whole
                networks (text encoders, UNet, autoencoder), "layers" the layers of each: the least
                memory, and the slowest
    tiling      the autoencoder takes large pictures tile by tile; seams are blended
    slicing     the autoencoder takes the pictures of a batch one by one
    quantise    the UNet's attention layers keep their weights in "int8" or "float8", and compute in
                the pipeline's precision; this rounds the weights, for good
    compile     the UNet's attention layers are compiled (`torch.compile`) when they first run
    """

    attention: str = "auto"
    offload: str = "none"
    tiling: bool = False
    slicing: bool = False
    quantise: str = "none"
    compile: bool = False

    def __post_init__(self) -> None:
        choose("attention", self.attention, ATTENTION)
        choose("offload", self.offload, OFFLOAD)
        choose("quantise", self.quantise, QUANTISE)
        for name in ("tiling", "slicing", "compile"):
            check_flag(name, getattr(self, name))
        if self.compile and self.offload == "layers":
            raise UserError(
                "offload='layers' does not go with compile: what is compiled would be cut at every"
                " layer that comes and goes; take offload='parts', or leave one out"
            )

    @property
    def seen(self) -> Memory:
        """Only what can be seen in a picture, if at the last of its bits."""
        return replace(self, offload="none", slicing=False)

    def words(self) -> list[str]:
        """The arguments of `ldm generate` that ask for what is `seen`, but for the attention."""
        words = ["--tiling"] if self.tiling else []
        words += ["--quantise", self.quantise] if self.quantise != "none" else []
        return words + (["--compile"] if self.compile else [])

    @staticmethod
    def of(values: Mapping[str, Any]) -> Memory:
        """The inverse of `asdict`; ValueError or TypeError for what it never gave."""
        for name, value in asdict(Memory(**values)).items():
            if type(value) is not type(getattr(PLAIN, name)):
                raise TypeError(f"{name} is of another type")
        return Memory(**values)


PLAIN = Memory(attention="sdpa")
"""How every pipeline draws unless told otherwise."""
