"""The same pipeline for SDXL (2307.01952): two text encoders, and a UNet that is told sizes too.

What differs from `pipeline.py` is here: the components, the arguments, what is told to the UNet,
and that a run may stop half-way for another model to go on (`denoising_end`, `denoising_start`).

Legend
    B        images of a run = prompts x images per prompt
    embeds   [B, L, C + C'], both encoders side by side;  pooled  [B, D], of the second alone
    ids      [B, 6], what is told of the picture's size (`models.conditioning.time_ids`)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl import StableDiffusionXLPipelineOutput
from diffusers.utils import is_invisible_watermark_available
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ldm_pipeline.diffusion.course import Course
from ldm_pipeline.diffusion.loop import Plan
from ldm_pipeline.diffusion.noise import Noise
from ldm_pipeline.errors import UserError
from ldm_pipeline.images import to_output
from ldm_pipeline.models import autoencoder, text
from ldm_pipeline.models.conditioning import time_ids
from ldm_pipeline.pipeline import ENCODING, Callback, LatentDiffusionPipeline
from ldm_pipeline.request import LCM_GUIDANCE, LCM_STEPS, STEPS, Request, Text
from ldm_pipeline.request_xl import XL_CALLBACK_TENSORS, XL_GUIDANCE, Pair, RequestXL
from ldm_pipeline.running import Run, halves

logger = logging.getLogger(__name__)

Told = tuple[Tensor, Tensor | None, Tensor, Tensor | None]
"""(embeds, negative embeds, pooled, negative pooled), as a stock SDXL pipeline returns them."""


class LatentDiffusionXLPipeline(StableDiffusionXLLoraLoaderMixin, LatentDiffusionPipeline):
    """Text to image with SDXL: its base, or a fine-tuned model of the same shape.

    Any component may be None where it is not needed. One pipeline serves any number of threads.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->image_encoder->unet->vae"
    _optional_components: ClassVar = [
        "tokenizer",
        "tokenizer_2",
        "text_encoder",
        "text_encoder_2",
        "image_encoder",
        "feature_extractor",
    ]
    _exclude_from_cpu_offload: ClassVar = []
    _callback_tensor_inputs: ClassVar = list(XL_CALLBACK_TENSORS)
    _saved_class_name = "StableDiffusionXLPipeline"
    safety_checker: ClassVar = None

    def __init__(
        self,
        vae: AutoencoderKL | None,
        text_encoder: CLIPTextModel | None,
        text_encoder_2: CLIPTextModelWithProjection | None,
        tokenizer: CLIPTokenizer | None,
        tokenizer_2: CLIPTokenizer | None,
        unet: UNet2DConditionModel | None,
        scheduler: SchedulerMixin | None,
        image_encoder: Any = None,
        feature_extractor: Any = None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
    ) -> None:
        DiffusionPipeline.__init__(self)
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=scheduler,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )
        self.register_to_config(force_zeros_for_empty_prompt=force_zeros_for_empty_prompt)
        self.vae_scale_factor = autoencoder.downscale(vae)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self.watermark: Any = None
        if is_invisible_watermark_available() if add_watermarker is None else add_watermarker:
            from diffusers.pipelines.stable_diffusion_xl.watermark import (
                StableDiffusionXLWatermarker,
            )

            self.watermark = StableDiffusionXLWatermarker()

    # Drawing ----------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(  # type: ignore[override]  # the order of the arguments is stock SDXL's
        self,
        prompt: Text | None = None,
        prompt_2: Text | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        denoising_end: float | None = None,
        guidance_scale: float | None = None,
        negative_prompt: Text | None = None,
        negative_prompt_2: Text | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        *,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        original_size: Pair | None = None,
        crops_coords_top_left: Pair = (0, 0),
        target_size: Pair | None = None,
        negative_original_size: Pair | None = None,
        negative_crops_coords_top_left: Pair = (0, 0),
        negative_target_size: Pair | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        denoising_start: float | None = None,
        sampler: str | None = None,
        seed: int | Sequence[int] | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        lcm: bool | str | os.PathLike[str] = False,
    ) -> Any:
        """Draw pictures. Arguments and defaults are those of a stock SDXL pipeline, and draw the
        same pictures: 50 steps of guidance 5. `RequestXL` documents each; the last five are ours,
        and the last four as in `LatentDiffusionPipeline`:

        denoising_start     go on from `latents` that a run with `denoising_end` left; both runs
                            together are the whole one, where a step asks the network once and
                            needs no history

        In one point this differs from stock: `negative_original_size` and its like go to the
        negative half of every image; stock mixes the halves up where there are several.

        Returns `images`, as a `StableDiffusionXLPipelineOutput` or, without `return_dict`, a tuple.
        Raises `UserError`, before any network is called, for what cannot be drawn.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if num_inference_steps is None:
            num_inference_steps = LCM_STEPS if lcm else STEPS
        if guidance_scale is None:
            guidance_scale = LCM_GUIDANCE if lcm and self._steerable else XL_GUIDANCE
        request = RequestXL(
            prompt=prompt,
            prompt_2=prompt_2,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            denoising_start=denoising_start,
            denoising_end=denoising_end,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            negative_prompt_2=negative_prompt_2,
            num_images_per_prompt=num_images_per_prompt,
            eta=eta,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            output_type=output_type,
            cross_attention_kwargs=cross_attention_kwargs,
            guidance_rescale=guidance_rescale,
            original_size=original_size,
            crops_coords_top_left=crops_coords_top_left,
            target_size=target_size,
            negative_original_size=negative_original_size,
            negative_crops_coords_top_left=negative_crops_coords_top_left,
            negative_target_size=negative_target_size,
            clip_skip=clip_skip,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            sampler=sampler,
            seed=seed,
            guidance_interval=guidance_interval,
            lcm=lcm,
        )
        images, _ = self._answer(request, callback_on_step_end)
        return StableDiffusionXLPipelineOutput(images=images) if return_dict else (images,)

    def _begin(self, request: Request) -> Run:
        """The values with which a run starts."""
        assert isinstance(request, RequestXL)
        run = super()._begin(request)
        run.denoising_start, run.denoising_end = request.denoising_start, request.denoising_end
        return run

    def _portion(self, course: Course, request: Request) -> Course:
        """The part of the course between `denoising_start` and `denoising_end`.

        Both are fractions of the training's noise levels: 0.8 ends where a fifth of them is left.
        Raises `UserError` where no step of the course begins within.
        """
        assert isinstance(request, RequestXL)
        start, end = request.denoising_start, request.denoising_end
        if start is None and end is None:
            return course
        total = self.scheduler.config.num_train_timesteps
        high = float("inf") if start is None else round(total - start * total)
        low = float("-inf") if end is None else round(total - end * total)
        part = course.between(high, low)
        if len(part.times) < 2:
            raise UserError(
                f"denoising_start={start!r}, denoising_end={end!r}: none of the"
                f" {len(course.times) - 1} steps begins there; draw with more steps"
            )
        return part

    def _plan(self, request: Request, course: Course, noise: Noise, like: Tensor) -> Plan:
        """Where the run starts; latents that another run left are taken as they are."""
        assert isinstance(request, RequestXL)
        if request.denoising_start is None:
            return super()._plan(request, course, noise, like)
        assert request.latents is not None
        return Plan(request.latents.to(like.device, like.dtype), course.times)

    def _finish(self, z: Tensor, request: Request) -> tuple[Any, None]:
        """Pictures of clean latents, as the caller wants them."""
        if request.output_type == "latent":
            return z, None
        if self.vae.dtype == torch.float16 and self.vae.config.force_upcast:
            logger.warning("this autoencoder overflows in float16; it is kept in float32 from here")
            self.vae.to(torch.float32)
        images = autoencoder.decode(self.vae, z.to(self.vae.dtype), request.generator)
        if self.watermark is not None:
            images = self.watermark.apply_watermark(images)
        return to_output(images, request.output_type), None

    # What the UNet is told --------------------------------------------------------------------

    def _tell(self, request: Request, run: Run) -> None:
        """Put into `run` what both encoders say, and the picture's sizes."""
        assert isinstance(request, RequestXL)
        embeds, negative, pooled, negative_pooled = self.encode_prompt(
            request.prompts or None,
            request.prompts_2 or None,
            self._execution_device,
            request.num_images_per_prompt,
            run.guides,
            request.negative_prompts,
            request.negative_prompts_2,
            prompt_embeds=request.prompt_embeds,
            negative_prompt_embeds=request.negative_prompt_embeds,
            pooled_prompt_embeds=request.pooled_prompt_embeds,
            negative_pooled_prompt_embeds=request.negative_pooled_prompt_embeds,
            lora_scale=run.adapter_scale,
            clip_skip=run.clip_skip,
        )
        ids, negative_ids = (
            each.to(embeds).repeat(embeds.shape[0], 1) for each in self._time_ids(request)
        )
        run.prompt_embeds, run.add_text_embeds, run.add_time_ids = embeds, pooled, ids
        if run.guides:
            run.prompt_embeds = halves(negative, embeds)
            run.add_text_embeds = halves(negative_pooled, pooled)
            run.add_time_ids = halves(negative_ids, ids)

    def _time_ids(self, request: RequestXL) -> tuple[Tensor, Tensor]:
        """What is told of the picture, [6], to the prompted half and to the negative one.

        Nothing said means a picture that was of the request's size and never cut.
        """
        _, high, wide = self._latent_shape(request)
        size = (
            request.height or high * self.vae_scale_factor,
            request.width or wide * self.vae_scale_factor,
        )
        original, target = request.original_size or size, request.target_size or size
        ids = time_ids(original, request.crops_coords_top_left, target)
        against = request.negative_original_size, request.negative_target_size
        if against[0] is None or against[1] is None:
            return ids, ids
        return ids, time_ids(against[0], request.negative_crops_coords_top_left, against[1])

    def encode_prompt(  # type: ignore[override]  # the order of the arguments is stock SDXL's
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

        SDXL's refiner has the second alone.
        """
        both = [(self.tokenizer_2, self.text_encoder_2, texts_2)]
        if self.text_encoder is not None:
            both.insert(0, (self.tokenizer, self.text_encoder, texts))
        embeds, pooled = [], None
        for tokenizer, encoder, words in both:
            if tokenizer is None or encoder is None:
                raise UserError(
                    "this pipeline lacks a tokenizer or text encoder; pass prompt_embeds and"
                    " pooled_prompt_embeds instead of prompt"
                )

            def convert(given: list[str], tokenizer: Any = tokenizer) -> list[str]:
                return self.maybe_convert_prompt(given, tokenizer)

            _check_skip(encoder, clip_skip)
            tokens = text.tokenise(tokenizer, words, length=length, convert=convert)
            ask = text.asking_inner(encoder, device, clip_skip)
            said, answer = ask(tokens.input_ids, tokens.attention_mask)
            embeds.append(said)
            pooled = answer if answer is not None else pooled
        if pooled is None:
            raise UserError("text_encoder_2 has no projection; it must be one as SDXL has it")
        return torch.cat(embeds, dim=-1), pooled

    # What fits this model ---------------------------------------------------------------------

    def _check_components(self, request: Request) -> None:
        """Raise `UserError` for what this pipeline's components cannot draw."""
        super()._check_components(request)
        if self.unet.config.addition_embed_type != "text_time":
            raise UserError("this UNet is not SDXL's; open the model with ldm_pipeline.load")

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
