"""The pipeline: words in, pictures out.

    request -> text embeddings -> plan -> denoising loop -> clean latents -> pictures

`LatentDiffusionPipeline` is a `DiffusionPipeline` with Stable Diffusion's component and argument
names, and a thin one: `request.py` checks what was asked, `model_checks.py` whether the model can,
`canvas.py` opens the picture to draw on, `drawing.py` goes the way above, `tasks/` says where it
starts and what stays, `diffusion/` does the work, `models/` calls the networks, `running.py` keeps
a run's values.

Legend
    B        images of a run = prompts x images per prompt
    z, x     clean latents, noisy latents [B, C, H/f, W/f]; f is the autoencoder's factor
    embeds   text embeddings [B, L, channels]; with guidance [2B, …], the negative half first
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    SchedulerMixin,
    UNet2DConditionModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ldm_pipeline.errors import UserError
from ldm_pipeline.loading import FolderPipeline
from ldm_pipeline.memory import Memory
from ldm_pipeline.model_checks import ModelChecks
from ldm_pipeline.models import arranging, autoencoder, chunks, text
from ldm_pipeline.models.offloading import in_turn
from ldm_pipeline.models.sampling import upgrade_config
from ldm_pipeline.request import (
    CALLBACK_TENSORS,
    GUIDANCE,
    LCM_GUIDANCE,
    LCM_STEPS,
    MASK_TENSORS,
    STEPS,
    Request,
)
from ldm_pipeline.running import Callback, Run, tensors_for, under_way
from ldm_pipeline.stock_arguments import in_stock_order
from ldm_pipeline.stock_loaders import SafeLoaders
from ldm_pipeline.values import Text, listed, negatives


class LatentDiffusionPipeline(
    ModelChecks,
    FolderPipeline,
    StableDiffusionMixin,
    SafeLoaders,
):
    """Pictures from words, and out of pictures or into them, with a Stable Diffusion shaped model
    (1.x, 2.x, or the bundled one).

    Any component may be None where it is not needed: text parts alone encode prompts, and all
    but the text parts draw from embeddings. One pipeline serves any number of threads at once.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->unet->vae"
    _optional_components: ClassVar = ["safety_checker", "feature_extractor", "image_encoder"]
    _exclude_from_cpu_offload: ClassVar = ["safety_checker"]
    _callback_tensor_inputs: ClassVar = [*CALLBACK_TENSORS, *MASK_TENSORS]
    request_class: ClassVar[type[Request]] = Request
    """What a call is checked as; it knows the tasks, and their defaults."""

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny | None,
        text_encoder: CLIPTextModel | None,
        tokenizer: CLIPTokenizer | None,
        unet: UNet2DConditionModel | None,
        scheduler: SchedulerMixin | None,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        image_encoder: Any = None,
        requires_safety_checker: bool = False,
    ) -> None:
        super().__init__()
        if safety_checker is not None and feature_extractor is None:
            raise UserError("a safety_checker needs a feature_extractor; pass both or neither")
        upgrade_config(scheduler)
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )
        self.register_to_config(requires_safety_checker=requires_safety_checker)
        self.vae_scale_factor = autoencoder.downscale(vae)
        self._make_processors()

    def _make_processors(self) -> None:
        """What makes tensors of pictures and masks, for the autoencoder's factor."""
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self.mask_processor = VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor,
            do_normalize=False,
            do_binarize=True,
            do_convert_grayscale=True,
        )

    def arrange(self, memory: Memory, device: torch.device | str | None = None) -> Self:
        """Draw as `memory` says from now on, on `device`; the pipeline itself is given back.

        Without a `device` the networks stay where they are, or with offload go to this machine's
        GPU. Pictures stay the same within the precision. Nothing may be drawn meanwhile. Raises
        `UserError` for what cannot be done here.
        """
        if not isinstance(memory, Memory):
            raise UserError(f"memory={memory!r} must be a Memory, such as Memory(tiling=True)")
        try:
            place = None if device is None else torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise UserError(f"device={device!r} is not known; name one as in cuda:1") from error
        arranging.arrange(self, memory, place)
        return self

    # Drawing ----------------------------------------------------------------------------------

    @in_stock_order(1, "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
    @torch.no_grad()
    def __call__(
        self,
        prompt: Text | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        negative_prompt: Text | None = None,
        num_images_per_prompt: int = 1,
        eta: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
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
        clip_skip: int | None = None,
        callback_on_step_end: Callback | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
        sampler: str | None = None,
        seed: int | Sequence[int] | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        lcm: bool | str | os.PathLike[str] = False,
        weighted: bool = False,
        exact_steps: bool = False,
        keep_unmasked: bool = False,
    ) -> Any:
        """Draw pictures: from words, with `image` out of a picture, with `mask_image` into one.

        Arguments and defaults are those of the stock Stable Diffusion pipelines for these, and
        draw the same pictures: 50 steps of guidance 7.5. `Request` documents each. Without names
        they stand in the order of theirs. Ours are the last seven:

        sampler             a name of `request.SAMPLER_NAMES`; None runs the pipeline's scheduler
        seed                image i is drawn with seed + i, or with entry i of a list, and is
                            then the same picture whatever the batch
        guidance_interval   guidance acts between these two fractions of the run (2404.07724)
        lcm                 few steps (2311.05556): draw this call with the LCM adapter in this
                            file, in 4 steps without guidance unless told otherwise; True is the one
                            known for this model: the bundled model's own, or the published LCM-LoRA
                            of Stable Diffusion 1.x and SDXL (from the hub or its cache); a full LCM
                            (whose UNet takes the guidance) needs none
        weighted            prompts may be of any length and hold (word:1.3), [word] and BREAK;
                            they are filled up to the longest one's chunks of 77 tokens
        exact_steps         with an image, run all steps and not only the share `strength` of them
        keep_unmasked       leave pixels outside the mask as they are, to the last of their bits

        `callback_on_step_end(pipe, step, timestep, tensors)` may change `latents`,
        `prompt_embeds`, `pipe._guidance_scale`, and set `pipe._interrupt`.

        Returns `images` and `nsfw_content_detected`, as a `StableDiffusionPipelineOutput` or,
        without `return_dict`, a tuple. Images are pictures ("pil"), an array [B, H, W, 3]
        ("np") or a tensor [B, 3, H, W] ("pt"), both in [0, 1], or the latents ("latent").
        Raises `UserError`, before any network is called, for what cannot be drawn.
        """
        usual_steps, usual_guidance = self._usual(lcm, GUIDANCE)
        names = tensors_for(
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            self._callback_tensor_inputs,
            paints=mask_image is not None,
        )
        request = Request(
            prompt=prompt,
            height=height,
            width=width,
            num_inference_steps=usual_steps if num_inference_steps is None else num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            guidance_scale=usual_guidance if guidance_scale is None else guidance_scale,
            negative_prompt=negative_prompt,
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
            output_type=output_type,
            cross_attention_kwargs=cross_attention_kwargs,
            guidance_rescale=guidance_rescale,
            clip_skip=clip_skip,
            callback_on_step_end_tensor_inputs=names,
            sampler=sampler,
            seed=seed,
            guidance_interval=guidance_interval,
            lcm=lcm,
            weighted=weighted,
        )
        images, unsafe = self._answer(request, callback_on_step_end)
        if not return_dict:
            return images, unsafe
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=unsafe)

    def _answer(self, request: Request, callback: Callback | None) -> tuple[Any, list[bool] | None]:
        """What was asked for, drawn: the images, and which a checker blacked out."""
        self._check_components(request)
        canvas = self._canvas(request)
        self._check_latents(request, canvas)
        with in_turn(self), under_way(self, self._begin(request)) as run:
            z = self._draw(request, canvas, run, callback)
            images, unsafe = self._finish(z, request, canvas)
            self.maybe_free_model_hooks()
        return images, unsafe

    def _usual(self, lcm: bool | str | os.PathLike[str], guidance: float) -> tuple[int, float]:
        """Steps and guidance where nobody names them; `guidance` without `lcm`."""
        if not lcm:
            return STEPS, guidance
        return LCM_STEPS, LCM_GUIDANCE if self._steerable else guidance

    def _begin(self, request: Request) -> Run:
        """The values with which a run starts."""
        return Run(
            guidance_scale=request.guidance_scale,
            guidance_rescale=request.guidance_rescale,
            guidance_interval=request.guidance_interval,
            clip_skip=request.clip_skip,
            cross_attention_kwargs=request.cross_attention_kwargs,
            steerable=self._steerable,
        )

    # Words ------------------------------------------------------------------------------------

    def encode_prompt(
        self,
        prompt: Text | None,
        device: torch.device | str,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
        negative_prompt: Text | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
        weighted: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings of the prompts and, with guidance, of the negative ones: each [B, L, C].

        Embeddings that were passed are only repeated for the images of each prompt. No negative
        prompt means the empty text. `clip_skip` concerns the prompts alone, as in stock
        pipelines. With `weighted`, texts are read as `models.chunks` does, and L is that of as
        many chunks as the longest one needs. Raises `UserError` where words must be encoded and
        there is no text encoder.
        """
        prompts = listed(prompt)
        count = len(prompts) if prompt_embeds is None else prompt_embeds.shape[0]
        unwanted = negatives(negative_prompt, count)

        def convert(texts: list[str]) -> list[str]:
            return self.maybe_convert_prompt(texts, self.tokenizer)

        against = unwanted if negative_prompt_embeds is None else negative_prompt_embeds
        encode_both = chunks.encode_both if weighted else text.encode_both
        with text.adapter_scale(self.text_encoder, lora_scale):
            prompt_embeds, negative = encode_both(
                self.tokenizer,
                self.text_encoder,
                prompts if prompt_embeds is None else prompt_embeds,
                against if do_classifier_free_guidance else None,
                device=device,
                clip_skip=clip_skip,
                convert=convert,
            )
        owner = self.text_encoder if self.text_encoder is not None else self.unet
        dtype = owner.dtype if owner is not None else prompt_embeds.dtype
        repeat = num_images_per_prompt
        prompt_embeds = prompt_embeds.to(device, dtype).repeat_interleave(repeat, dim=0)
        if negative is not None:
            negative_prompt_embeds = negative.to(device, dtype).repeat_interleave(repeat, dim=0)
        return prompt_embeds, negative_prompt_embeds
