"""The same pipeline for SDXL (2307.01952): two text encoders, and a UNet that is told sizes too.

What differs from `pipeline.py` is here: the components, the arguments, what is told to the UNet,
and that a run may stop half-way for another model to go on (`denoising_end`, `denoising_start`).

Legend
    B        images of a run = prompts x images per prompt
    embeds   [B, L, C + C'], both encoders side by side;  pooled  [B, D], of the second alone
    ids      [B, 6], what is told of the picture's size (`models.conditioning.time_ids`)
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    SchedulerMixin,
    UNet2DConditionModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl import StableDiffusionXLPipelineOutput
from diffusers.utils import is_invisible_watermark_available
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ldm_pipeline.canvas import Canvas
from ldm_pipeline.diffusion.course import Course
from ldm_pipeline.diffusion.loop import Plan
from ldm_pipeline.diffusion.noise import Noise
from ldm_pipeline.errors import UserError
from ldm_pipeline.models import autoencoder
from ldm_pipeline.models.conditioning import time_ids
from ldm_pipeline.models.precision import widened
from ldm_pipeline.pipeline import LatentDiffusionPipeline
from ldm_pipeline.request import MASK_TENSORS, Request
from ldm_pipeline.request_xl import (
    XL_CALLBACK_TENSORS,
    XL_GUIDANCE,
    XL_PAINTING_GUIDANCE,
    Pair,
    RequestXL,
)
from ldm_pipeline.running import Callback, Run, halves, tensors_for
from ldm_pipeline.stock_arguments import in_stock_order
from ldm_pipeline.stock_loaders import SafeXLLoaders
from ldm_pipeline.two_texts import TwoTexts
from ldm_pipeline.values import Text


class LatentDiffusionXLPipeline(  # type: ignore[misc]  # stock SDXL encodes with other arguments
    TwoTexts, SafeXLLoaders, LatentDiffusionPipeline
):
    """Pictures from words, and out of pictures or into them, with SDXL: its base, a fine-tuned
    model of the same shape, one for inpainting, or its refiner.

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
    _callback_tensor_inputs: ClassVar = [*XL_CALLBACK_TENSORS, *MASK_TENSORS]
    request_class = RequestXL
    _saved_class_name = "StableDiffusionXLPipeline"
    safety_checker: ClassVar = None

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny | None,
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
        requires_aesthetics_score: bool = False,
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
        refines = requires_aesthetics_score or self._refines
        self.register_to_config(requires_aesthetics_score=refines)
        if refines:  # stock has another class for it
            self._saved_class_name = "StableDiffusionXLImg2ImgPipeline"
        self.vae_scale_factor = autoencoder.downscale(vae)
        self._make_processors()
        self.watermark: Any = None
        if is_invisible_watermark_available() if add_watermarker is None else add_watermarker:
            from diffusers.pipelines.stable_diffusion_xl.watermark import (
                StableDiffusionXLWatermarker,
            )

            self.watermark = StableDiffusionXLWatermarker()

    @property
    def default_sample_size(self) -> int:
        """The side of the latents that the model was trained on; scripts for stock ask for it."""
        side: int = self.unet.config.sample_size
        return side

    # Drawing ----------------------------------------------------------------------------------

    @in_stock_order(2, "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline")
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
        eta: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        *,
        image: Any = None,
        mask_image: Any = None,
        masked_image_latents: Tensor | None = None,
        strength: float | None = None,
        padding_mask_crop: int | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Sequence[Tensor] | None = None,
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
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
        denoising_start: float | None = None,
        aesthetic_score: float = 6.0,
        negative_aesthetic_score: float = 2.5,
        sampler: str | None = None,
        seed: int | Sequence[int] | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        lcm: bool | str | os.PathLike[str] = False,
        weighted: bool = False,
        exact_steps: bool = False,
        keep_unmasked: bool = False,
    ) -> Any:
        """Draw pictures: from words, with `image` out of a picture, with `mask_image` into one.

        Arguments and defaults are those of the stock SDXL pipelines for these, and draw the same
        pictures: 50 steps of guidance 5 (7.5 with a mask). `RequestXL` documents each; the last
        seven are ours, as in `LatentDiffusionPipeline`. Stock has these for pictures alone:

        denoising_start     go on from `latents` that a run with `denoising_end` left; both runs
                            together are the whole one, where a step asks the network once and
                            needs no history
        aesthetic_score     with its negative one, what refiners are told

        In four points this differs from stock. `negative_original_size` and its like go to the
        negative half of every image; stock mixes the halves up where there are several. A
        `negative_crops_coords_top_left` is heard with an `image`, too. And where inpainting ends
        early (`denoising_end`), what is known is left at the level of the rest, not clean. And an
        autoencoder in bfloat16 encodes in it (stock makes it float32 for that moment, under the
        hands of other threads).

        Returns `images`, as a `StableDiffusionXLPipelineOutput` or, without `return_dict`, a tuple.
        Raises `UserError`, before any network is called, for what cannot be drawn.
        """
        guidance = XL_GUIDANCE if mask_image is None else XL_PAINTING_GUIDANCE
        usual_steps, usual_guidance = self._usual(lcm, guidance)
        names = tensors_for(
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            self._callback_tensor_inputs,
            paints=mask_image is not None,
        )
        request = RequestXL(
            prompt=prompt,
            prompt_2=prompt_2,
            height=height,
            width=width,
            num_inference_steps=usual_steps if num_inference_steps is None else num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            denoising_start=denoising_start,
            denoising_end=denoising_end,
            aesthetic_score=aesthetic_score,
            negative_aesthetic_score=negative_aesthetic_score,
            guidance_scale=usual_guidance if guidance_scale is None else guidance_scale,
            negative_prompt=negative_prompt,
            negative_prompt_2=negative_prompt_2,
            num_images_per_prompt=num_images_per_prompt,
            eta=eta,
            generator=generator,
            latents=latents,
            image=image,
            mask_image=mask_image,
            masked_image_latents=masked_image_latents,
            strength=strength,
            exact_steps=exact_steps,
            padding_mask_crop=padding_mask_crop,
            keep_unmasked=keep_unmasked,
            ip_adapter_image=ip_adapter_image,
            ip_adapter_image_embeds=ip_adapter_image_embeds,
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
            callback_on_step_end_tensor_inputs=names,
            sampler=sampler,
            seed=seed,
            guidance_interval=guidance_interval,
            lcm=lcm,
            weighted=weighted,
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

    def _plan(
        self,
        request: Request,
        canvas: Canvas | None,
        run: Run,
        course: Course,
        noise: Noise,
        like: Tensor,
    ) -> Plan:
        """Where to start and what stays. A picture that another run left gets no noise."""
        assert isinstance(request, RequestXL)
        goes_on = request.denoising_start is not None or request.latents is not None
        if canvas is None or request.paints or not goes_on:
            return super()._plan(request, canvas, run, course, noise, like)
        if request.latents is not None:
            return Plan(request.latents.to(like), course.times)
        return Plan(canvas.latents(self._encoder(canvas), request, noise, like), course.times)

    def _start(self, request: Request, z: Tensor | None, n: Tensor, course: Course) -> Plan:
        """Where the run starts; latents that another run left are taken as they are."""
        assert isinstance(request, RequestXL)
        if request.denoising_start is None:
            return super()._start(request, z, n, course)
        return Plan(n if z is None else z, course.times)

    def _encoder(self, canvas: Canvas | None) -> Any:
        """The autoencoder that reads the canvas, in float32 where it has to; latents need none."""
        if canvas is None or canvas.encoded:
            return self.vae
        return widened(self.vae, self._execution_device)

    def _decoded(self, z: Tensor, request: Request) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] of clean latents, watermarked where that is wanted."""
        vae = widened(self.vae, z.device)
        images = autoencoder.decode(vae, z.to(vae.dtype), request.generator)
        if self.watermark is not None:
            images = self.watermark.apply_watermark(images)
        return images

    # What the UNet is told --------------------------------------------------------------------

    def _tell(self, request: Request, canvas: Canvas | None, run: Run) -> None:
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
            weighted=request.weighted,
        )
        ids, negative_ids = (
            each.to(embeds).repeat(embeds.shape[0], 1)
            for each in self._time_ids(request, canvas, pooled.shape[-1])
        )
        run.prompt_embeds, run.add_text_embeds, run.add_time_ids = embeds, pooled, ids
        if run.guides:
            run.prompt_embeds = halves(negative, embeds)
            run.add_text_embeds = halves(negative_pooled, pooled)
            run.add_time_ids = halves(negative_ids, ids)

    def _time_ids(
        self, request: RequestXL, canvas: Canvas | None, pooled: int
    ) -> tuple[Tensor, Tensor]:
        """What is told of the picture, [6 or 5], to the prompted half and to the negative one,
        beside a pooled answer of `pooled` channels.

        Nothing said means a picture that was of the request's size and never cut.
        """
        _, high, wide = self._latent_shape(request, canvas)
        size = (
            request.height or high * self.vae_scale_factor,
            request.width or wide * self.vae_scale_factor,
        )
        original, target = request.original_size or size, request.target_size or size
        corner, against = request.crops_coords_top_left, request.negative_original_size
        negative_corner = request.negative_crops_coords_top_left
        if self._scores(pooled):
            return (
                time_ids(original, corner, (request.aesthetic_score,)),
                time_ids(against or original, negative_corner, (request.negative_aesthetic_score,)),
            )
        ids = time_ids(original, corner, target)
        against_target = request.negative_target_size
        if canvas is None and (against is None or against_target is None):
            return ids, ids  # stock pipelines for pictures tell what is given, and only they
        if canvas is not None and not any(negative_corner):
            negative_corner = corner  # as they do
        return ids, time_ids(against or original, negative_corner, against_target or target)

    # What fits this model ---------------------------------------------------------------------

    @property
    def _refines(self) -> bool:
        """Whether this is a refiner, as far as its parts tell: without the second encoder, the
        answer that is passed to a run says it there."""
        encoder = self.text_encoder_2
        return encoder is not None and self._scores(encoder.config.projection_dim)

    def _scores(self, pooled: int) -> bool:
        """Whether the UNet has room for five numbers beside a pooled answer of `pooled` channels,
        as a refiner, which is told a score.

        Told by the UNet and the answer, so that neither can be combined wrongly.
        """
        if self.unet is None:
            return False
        room = self.unet.config.projection_class_embeddings_input_dim
        each = self.unet.config.addition_time_embed_dim
        return room is not None and each is not None and bool(room - pooled == 5 * each)

    def _read_channels(self, name: str) -> Sequence[int] | None:
        """The widths of which the embeddings `name` may be; None where that is not told.

        Beside a pooled answer the UNet reads six numbers, or as a refiner five.
        """
        room = self.unet.config.projection_class_embeddings_input_dim
        each = self.unet.config.addition_time_embed_dim
        if "pooled" not in name or room is None or each is None:
            return super()._read_channels(name)
        return [room - 6 * each, room - 5 * each]
