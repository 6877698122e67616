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
from ldm_pipeline.model_checks import ENCODING
from ldm_pipeline.models import chunks, text
from ldm_pipeline.request import Request
from ldm_pipeline.values import Text, listed, negatives

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
        weighted: bool = False,
    ) -> Told:
        """(embeds, negative, pooled, negative pooled) of the prompts; negative ones with guidance.

        Without a negative prompt they are zeros where the model's `force_zeros_for_empty_prompt`
        says so, as its training did, else the empty text. `clip_skip` concerns the prompts alone.
        With `weighted`, texts are read as `models.chunks` does, and L is that of as many chunks as
        the longest one needs. Raises `UserError` where words must be encoded and there is no text
        encoder.
        """
        device = device or self._execution_device
        zeros = negative_prompt is None and self.config.force_zeros_for_empty_prompt
        with (
            text.adapter_scale(self.text_encoder, lora_scale),
            text.adapter_scale(self.text_encoder_2, lora_scale),
        ):
            if prompt_embeds is None:
                prompts = listed(prompt)
                both = prompts, listed(prompt_2) or prompts
                if weighted:
                    together = do_classifier_free_guidance and negative_prompt_embeds is None
                    against = None  # in as many chunks as the prompts
                    if together and not zeros:
                        against = _pair(negative_prompt, negative_prompt_2, len(prompts))
                    prompt_embeds, negative, pooled_prompt_embeds, negative_pooled = (
                        self._encode_chunks(both, against, device, clip_skip)
                    )
                    if against is not None:
                        negative_prompt_embeds = negative
                        negative_pooled_prompt_embeds = negative_pooled
                else:
                    prompt_embeds, pooled_prompt_embeds = self._encode(*both, device, clip_skip)
            if pooled_prompt_embeds is None:
                raise UserError(
                    "pass pooled_prompt_embeds with prompt_embeds, of one encode_prompt"
                )
            if do_classifier_free_guidance and negative_prompt_embeds is None:
                if zeros:
                    negative_prompt_embeds = torch.zeros_like(prompt_embeds)
                    negative_pooled_prompt_embeds = torch.zeros_like(pooled_prompt_embeds)
                else:
                    count, length = prompt_embeds.shape[:2]
                    negative_prompt_embeds, negative_pooled_prompt_embeds = self._encode(
                        *_pair(negative_prompt, negative_prompt_2, count), device, length=length
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
        negative = dealt(negative_prompt_embeds)
        return told, negative, pooled, dealt(negative_pooled_prompt_embeds, None)

    def _encode(
        self,
        texts: list[str],
        texts_2: list[str],
        device: torch.device | str,
        clip_skip: int | None = None,
        length: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What both encoders say, side by side, and the pooled answer of the second."""
        embeds, pooled = [], None
        readers = self._readers(clip_skip)
        words_of = [texts, texts_2][: len(readers)]
        for (tokenizer, encoder, convert), words in zip(readers, words_of, strict=True):
            tokens = text.tokenise(tokenizer, words, length=length, convert=convert)
            ask = text.asking_inner(encoder, device, clip_skip)
            said, answer = ask(tokens.input_ids, tokens.attention_mask)
            embeds.append(said)
            pooled = answer if answer is not None else pooled
        if pooled is None:
            raise UserError("text_encoder_2 has no projection; it must be one as SDXL has it")
        return torch.cat(embeds, dim=-1), pooled

    def _encode_chunks(
        self,
        prompts: tuple[list[str], list[str]],
        negatives: tuple[list[str], list[str]] | None,
        device: torch.device | str,
        clip_skip: int | None,
    ) -> Told:
        """What both say to texts of any length, with weights, and to the negative ones."""
        tokenizers, encoders, converts = zip(*self._readers(clip_skip), strict=True)
        return chunks.encode_both_xl(
            tokenizers,
            encoders,
            prompts[: len(encoders)],
            None if negatives is None else negatives[: len(encoders)],
            device=device,
            clip_skip=clip_skip,
            converts=converts,
        )

    def _readers(self, clip_skip: int | None) -> list[tuple[Any, Any, text.Convert]]:
        """Each text encoder that is there, after its tokenizer, and how that rewrites learnt words.

        SDXL's refiner has the second alone, which then reads what is for the first.
        """

        def convert(tokenizer: Any) -> text.Convert:
            return lambda texts: list(self.maybe_convert_prompt(texts, tokenizer))

        both = [(self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)]
        there = both if self.text_encoder is not None else both[1:]
        for tokenizer, encoder in there:
            if tokenizer is None or encoder is None:
                raise UserError(
                    "this pipeline lacks a tokenizer or text encoder; pass prompt_embeds and"
                    " pooled_prompt_embeds instead of prompt"
                )
            _check_skip(encoder, clip_skip)
        return [(tokenizer, encoder, convert(tokenizer)) for tokenizer, encoder in there]

    def _check_words(self, request: Request) -> None:
        """Raise `UserError` where words must be encoded and cannot be."""
        encodes_negative = self._encodes_negative(request)
        if request.prompt_embeds is None or encodes_negative:
            for name in ("text_encoder_2", "tokenizer_2"):
                if getattr(self, name) is None:
                    raise UserError(f"this pipeline has no {name} to {ENCODING}")
        given = request.prompt_embeds is not None, request.negative_prompt_embeds is not None
        if request.weighted and given[0] != given[1] and request.guidance_scale > 1:
            if given[0] and not encodes_negative:
                return
            raise UserError(
                "weighted makes texts as long as each other: pass texts for both the prompt and the"
                " negative prompt, or embeddings for both"
            )

    def _encodes_negative(self, request: Request) -> bool:
        """Whether the words of a negative prompt are encoded; none may be zeros instead."""
        silent = request.negative_prompt is None and self.config.force_zeros_for_empty_prompt
        guides = request.guidance_scale > 1 and self._steerable
        return bool(guides and request.negative_prompt_embeds is None and not silent)


def _pair(first: Text | None, second: Text | None, count: int) -> tuple[list[str], list[str]]:
    """Negative texts for both encoders, of `count` prompts; none for the second is the first's."""
    texts = negatives(first, count)
    return texts, negatives(second, count) if second else texts


def _check_skip(encoder: Any, clip_skip: int | None) -> None:
    """SDXL leaves the last layer out by itself: one less is there to be skipped."""
    most = encoder.config.num_hidden_layers - 1
    if clip_skip is not None and clip_skip > most:
        raise UserError(f"clip_skip={clip_skip} is more than the {most} layers it can leave out")
