"""Stock's loaders of LoRAs and learnt words, from safetensors alone.

Stock falls back to pickles where a file is no safetensors file; here that is refused in one line.
What a LoRA is loaded with, `lora.attach`, needs no fallback: this is for those who call stock's
methods on our pipelines.
"""

from __future__ import annotations

from typing import Any

from diffusers.loaders import (
    StableDiffusionLoraLoaderMixin,
    StableDiffusionXLLoraLoaderMixin,
    TextualInversionLoaderMixin,
)

from ldm_pipeline.models.trust import check_adapter
from ldm_pipeline.stock_arguments import check_safe


class SafeLoaders(TextualInversionLoaderMixin, StableDiffusionLoraLoaderMixin):
    """`load_lora_weights` and `load_textual_inversion` for a UNet with one text encoder."""

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: Any, **told: Any
    ) -> tuple[Any, ...]:
        """Stock's, with its arguments, which `load_lora_weights` passes on; `UserError` for
        pickles."""
        told = safely(pretrained_model_name_or_path_or_dict, told)
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
        """Stock's, with its arguments; `UserError` for pickles."""
        source = pretrained_model_name_or_path
        for each in source if isinstance(source, list) else [source]:
            told = safely(each, told)
        super().load_textual_inversion(source, token, tokenizer, text_encoder, **told)


class SafeXLLoaders(StableDiffusionXLLoraLoaderMixin):
    """`load_lora_weights` for a UNet with SDXL's two text encoders."""

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: Any, **told: Any
    ) -> tuple[Any, ...]:
        """As `SafeLoaders.lora_state_dict`."""
        told = safely(pretrained_model_name_or_path_or_dict, told)
        state: tuple[Any, ...] = super().lora_state_dict(
            pretrained_model_name_or_path_or_dict, **told
        )
        return state


def safely(source: object, told: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a stock loader, with which it opens no pickle; `UserError` where they ask
    for one."""
    check_safe(told.get("use_safetensors"))
    check_adapter(source, told.get("weight_name"), told.get("subfolder"))
    return {**told, "use_safetensors": True}
