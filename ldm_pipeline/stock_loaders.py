"""Stock's loaders of LoRAs and learnt words, from safetensors alone.

Stock falls back to pickles where a file is no safetensors file; here that is refused in one line.
What a LoRA is loaded with, `lora.attach`, needs no fallback: this is for those who call stock's
methods on our pipelines.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from diffusers.loaders import (
    StableDiffusionLoraLoaderMixin,
    StableDiffusionXLLoraLoaderMixin,
    TextualInversionLoaderMixin,
)
from safetensors.torch import load_file
from torch import Tensor

from ldm_pipeline.errors import UserError
from ldm_pipeline.models.headers import read_header
from ldm_pipeline.models.reading import reading
from ldm_pipeline.models.trust import SAFE, check_adapter
from ldm_pipeline.stock_arguments import check_safe

NO_LORA = "this LoRA cannot be loaded"


class SafeLoaders(TextualInversionLoaderMixin, StableDiffusionLoraLoaderMixin):
    """`load_lora_weights` and `load_textual_inversion` for a UNet with one text encoder."""

    def load_lora_weights(self, *told: Any, **named: Any) -> None:
        """Stock's, with its arguments; `UserError` for pickles and for what does not fit."""
        with reading(NO_LORA):
            super().load_lora_weights(*told, **named)

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: Any, **told: Any
    ) -> tuple[Any, ...]:
        """Stock's, with its arguments, which `load_lora_weights` passes on; `UserError` for
        pickles."""
        told = safely(pretrained_model_name_or_path_or_dict, told)
        with reading(NO_LORA):
            state: tuple[Any, ...] = super().lora_state_dict(
                pretrained_model_name_or_path_or_dict, **told
            )
        return state

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: Any,
        token: str | list[str] | None = None,
        tokenizer: Any = None,
        text_encoder: Any = None,
        **told: Any,
    ) -> None:
        """Stock's, with its arguments; `UserError` for pickles, for what is no learnt word, and for
        one that does not fit.

        A file with the vectors of both of SDXL's text encoders goes to both, where no encoder is
        named; without a `token`, the word is the file's name.
        """
        source = pretrained_model_name_or_path
        for each in source if isinstance(source, list) else [source]:
            told = safely(each, told)
        with reading("this learnt word cannot be loaded"):
            vectors = _of_two_encoders(source) if text_encoder is None else None
            if vectors is None:
                super().load_textual_inversion(source, token, tokenizer, text_encoder, **told)
                return
            word = token or Path(source).stem
            for tokens, encoder, learnt in self._of_each(vectors, word, source):
                super().load_textual_inversion({word: learnt}, word, tokens, encoder, **told)

    def _of_each(
        self, vectors: dict[str, Tensor], word: object, source: object
    ) -> list[tuple[Any, Any, Tensor]]:
        """Tokenizer, text encoder and vectors of each; `UserError`, before anything is changed,
        where one of them cannot take the `word`."""
        pipe: Any = self
        if getattr(pipe, "text_encoder_2", None) is None:
            raise UserError(f"{source} is for SDXL's two text encoders, and this model has one")
        found = [
            (pipe.tokenizer, pipe.text_encoder, vectors["clip_l"]),
            (pipe.tokenizer_2, pipe.text_encoder_2, vectors["clip_g"]),
        ]
        for tokens, encoder, learnt in found:
            width = None if encoder is None else encoder.config.hidden_size
            if learnt.shape[-1] != width:
                raise UserError(
                    f"{source} has vectors of {learnt.shape[-1]} numbers for a text encoder that"
                    f" takes {width}; it is for another model"
                )
            if word in tokens.get_vocab():
                raise UserError(f"{word} is a word already; pass another as token")
        return found


class SafeXLLoaders(StableDiffusionXLLoraLoaderMixin):
    """`load_lora_weights` for a UNet with SDXL's two text encoders."""

    def load_lora_weights(self, *told: Any, **named: Any) -> None:
        """As `SafeLoaders.load_lora_weights`."""
        with reading(NO_LORA):
            super().load_lora_weights(*told, **named)

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: Any, **told: Any
    ) -> tuple[Any, ...]:
        """As `SafeLoaders.lora_state_dict`."""
        told = safely(pretrained_model_name_or_path_or_dict, told)
        with reading(NO_LORA):
            state: tuple[Any, ...] = super().lora_state_dict(
                pretrained_model_name_or_path_or_dict, **told
            )
        return state


def safely(source: object, told: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a stock loader, with which it opens no pickle; `UserError` where they ask
    for one, or name a file that is not there."""
    check_safe(told.get("use_safetensors"))
    file = Path(source) if isinstance(source, str | os.PathLike) else None
    if file is not None and file.suffix == SAFE and not file.exists():
        raise UserError(f"there is no file {source}")
    check_adapter(source, told.get("weight_name"), told.get("subfolder"))
    return {**told, "use_safetensors": True}


def _of_two_encoders(source: object) -> dict[str, Tensor] | None:
    """The vectors in a file that has those of both of SDXL's text encoders; None for all else."""
    if not isinstance(source, str | os.PathLike) or not os.fspath(source).endswith(SAFE):
        return None
    file = Path(source)
    if read_header(file).shapes.keys() != {"clip_l", "clip_g"}:
        return None
    return load_file(file)
