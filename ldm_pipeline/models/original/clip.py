"""The text encoders' names in the original layout.

CLIP as OpenAI's (SD 1.x, SDXL's first) is stored under transformers' own names. OpenCLIP (SD 2.x,
SDXL's second) has its own, with queries, keys and values stacked into one matrix, and the
projection transposed.
"""

from __future__ import annotations

from dataclasses import dataclass

from ldm_pipeline.models.original.names import Names, Tensors
from ldm_pipeline.models.original.tensors import Stored, joined

BODY = "text_model"
"""Under this name transformers keeps all but the projection; since its fifth version not for
`CLIPTextModel`, though it still reads both."""

CLIP_NAMES = Names({BODY: f"transformer.{BODY}"})

_HERE, _THERE = f"{BODY}.encoder.layers", "transformer.resblocks"
_STACKED = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class OpenClip:
    """OpenCLIP's layout for a text encoder of so many layers.

    The original has one layer more than SD 2.x reads; what is beyond `layers` has no name here.
    """

    layers: int

    @property
    def _names(self) -> Names:
        pairs = {
            f"{BODY}.embeddings.token_embedding": "model.token_embedding",
            f"{BODY}.embeddings.position_embedding.weight": "model.positional_embedding",
            f"{BODY}.embeddings.position_ids": "model.position_ids",
            f"{BODY}.final_layer_norm": "model.ln_final",
        }
        for i in range(self.layers):
            here, there = f"{_HERE}.{i}", f"model.{_THERE}.{i}"
            pairs |= {
                f"{here}.layer_norm1": f"{there}.ln_1",
                f"{here}.layer_norm2": f"{there}.ln_2",
                f"{here}.mlp.fc1": f"{there}.mlp.c_fc",
                f"{here}.mlp.fc2": f"{there}.mlp.c_proj",
                f"{here}.self_attn.out_proj": f"{there}.attn.out_proj",
            }
        return Names(pairs)

    def to_original(self, here: Tensors) -> dict[str, Stored]:
        """See `NameMap`."""
        found = self._names.to_original(here)
        if "text_projection.weight" in here:
            found["model.text_projection"] = here["text_projection.weight"].transposed()
        for i in range(self.layers):
            for leaf in ("weight", "bias"):
                keys = [f"{_HERE}.{i}.self_attn.{part}.{leaf}" for part in _STACKED]
                if all(key in here for key in keys):
                    stack = joined(here[key] for key in keys)
                    found[f"model.{_THERE}.{i}.attn.in_proj_{leaf}"] = stack
        return found

    def to_diffusers(self, there: Tensors) -> dict[str, Stored]:
        """See `NameMap`; the projection comes too, for encoders that have one."""
        found = self._names.to_diffusers(there)
        if "model.text_projection" in there:
            found["text_projection.weight"] = there["model.text_projection"].transposed()
        for i in range(self.layers):
            for leaf in ("weight", "bias"):
                stack = there.get(f"model.{_THERE}.{i}.attn.in_proj_{leaf}")
                if stack is not None:
                    for part, third in zip(_STACKED, stack.thirds(), strict=True):
                        found[f"{_HERE}.{i}.self_attn.{part}.{leaf}"] = third
        return found


def with_body(key: str) -> str:
    """A tensor's name with the `text_model` that newer versions of transformers leave out."""
    bare = not key.startswith((BODY, "text_projection"))
    return f"{BODY}.{key}" if bare else key
