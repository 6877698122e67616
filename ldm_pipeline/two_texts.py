"""What SDXL's two text encoders say, side by side (2307.01952, section 2).

Legend
    L        tokens, 77 for CLIP;  C, C', D   channels of both encoders, of the pooled answer
    embeds   [B, L, C + C'], the last but one states of both;  pooled   [B, D], of the second alone
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ldm_pipeline.errors import UserError
from ldm_pipeline.models import text
from ldm_pipeline.pipeline import ENCODING
from ldm_pipeline.request import Request, Text

Told = tuple[Tensor, Tensor | None, Tensor, Tensor | None]
"""(embeds, negative embeds, pooled, negative pooled), as a stock SDXL pipeline returns them."""


class TwoTexts(DiffusionPipeline):
    """How a pipeline with two tokenizers and text encoders, of which the first may be None, reads
    prompts."""

    maybe_convert_prompt: Any
    """From `TextualInversionLoaderMixin`."""

    def encode_prompt(
        self,
        prompt: Text | None,
        prompt_2: Text | None = None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: Text | None = None,
        negative_prompt_2: Text | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> Told:
        """(embeds, negative, pooled, negative pooled) of the prompts; negative ones with guidance.

        Without a negative prompt they are zeros where the model's `force_zeros_for_empty_prompt`
        says so, as its training did, else the empty text. `clip_skip` concerns the prompts alone.
        Raises `UserError` where words must be encoded and there is no text encoder.
        """
        device = device or self._execution_device
        with (
            text.adapter_scale(self.text_encoder, lora_scale),
            text.adapter_scale(self.text_encoder_2, lora_scale),
        ):
            if prompt_embeds is None:
                prompts = _listed(prompt)
                prompt_embeds, pooled_prompt_embeds = self._encode(
                    prompts, _listed(prompt_2) or prompts, device, clip_skip
                )
            if pooled_prompt_embeds is None:
                raise UserError(
                    "pass pooled_prompt_embeds with prompt_embeds, of one encode_prompt"
                )
            if do_classifier_free_guidance and negative_prompt_embeds is None:
                if negative_prompt is None and self.config.force_zeros_for_empty_prompt:
                    negative_prompt_embeds = torch.zeros_like(prompt_embeds)
                    negative_pooled_prompt_embeds = torch.zeros_like(pooled_prompt_embeds)
                else:
                    count, length = prompt_embeds.shape[:2]
                    first = _each(negative_prompt or "", count)
                    second = _each(negative_prompt_2, count) if negative_prompt_2 else first
                    negative_prompt_embeds, negative_pooled_prompt_embeds = self._encode(
                        first, second, device, length=length
                    )
        owner = self.text_encoder_2 if self.text_encoder_2 is not None else self.unet
        dtype = owner.dtype if owner is not None else prompt_embeds.dtype

        def dealt(embeds: Tensor | None, to: torch.dtype | None = dtype) -> Tensor | None:
            """One row for each image, instead of each prompt."""
            if embeds is None:
                return None
            return embeds.to(device, to).repeat_interleave(num_images_per_prompt, dim=0)

        told, pooled = dealt(prompt_embeds), dealt(pooled_prompt_embeds, None)
        assert told is not None
        assert pooled is not None
        if not do_classifier_free_guidance:
            return told, negative_prompt_embeds, pooled, negative_pooled_prompt_embeds
        against = dealt(negative_prompt_embeds), dealt(negative_pooled_prompt_embeds, None)
        return told, against[0], pooled, against[1]

    def _encode(
        self,
        texts: list[str],
        texts_2: list[str],
        device: torch.device | str,
        clip_skip: int | None = None,
        length: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What both encoders say, side by side, and the pooled answer of the second.

        SDXL's refiner has the second alone, which then reads what is for the first.
        """
        both = [(self.tokenizer_2, self.text_encoder_2, texts)]
        if self.text_encoder is not None:
            both = [(self.tokenizer, self.text_encoder, texts), (*both[0][:2], texts_2)]
        for tokenizer, encoder, _ in both:
            if tokenizer is None or encoder is None:
                raise UserError(
                    "this pipeline lacks a tokenizer or text encoder; pass prompt_embeds and"
                    " pooled_prompt_embeds instead of prompt"
                )
            _check_skip(encoder, clip_skip)
        embeds, pooled = [], None
        for tokenizer, encoder, words in both:

            def convert(given: list[str], tokenizer: Any = tokenizer) -> list[str]:
                return self.maybe_convert_prompt(given, tokenizer)

            tokens = text.tokenise(tokenizer, words, length=length, convert=convert)
            ask = text.asking_inner(encoder, device, clip_skip)
            said, answer = ask(tokens.input_ids, tokens.attention_mask)
            embeds.append(said)
            pooled = answer if answer is not None else pooled
        if pooled is None:
            raise UserError("text_encoder_2 has no projection; it must be one as SDXL has it")
        return torch.cat(embeds, dim=-1), pooled

    def _check_words(self, request: Request) -> None:
        """Raise `UserError` where words must be encoded and cannot be."""
        unguided = request.guidance_scale <= 1 or request.negative_prompt_embeds is not None
        silent = request.negative_prompt is None and self.config.force_zeros_for_empty_prompt
        if request.prompt_embeds is None or not (unguided or silent):
            for name in ("text_encoder_2", "tokenizer_2"):
                if getattr(self, name) is None:
                    raise UserError(f"this pipeline has no {name} to {ENCODING}")


def _listed(texts: Text | None) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts or [])


def _each(texts: Text, count: int) -> list[str]:
    """`texts` as one text for each of `count` prompts."""
    listed = [texts] * count if isinstance(texts, str) else list(texts)
    if len(listed) != count:
        raise UserError(f"negative_prompt has {len(listed)} texts for {count} prompts")
    return listed


def _check_skip(encoder: Any, clip_skip: int | None) -> None:
    """SDXL leaves the last layer out by itself: one less is there to be skipped."""
    most = encoder.config.num_hidden_layers - 1
    if clip_skip is not None and clip_skip > most:
        raise UserError(f"clip_skip={clip_skip} is more than the {most} layers it can leave out")
