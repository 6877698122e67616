"""The pipeline: words in, pictures out.

    request -> text embeddings -> plan -> denoising loop -> clean latents -> pictures

`LatentDiffusionPipeline` is a `DiffusionPipeline` with Stable Diffusion's component and argument
names, and a thin one: `request.py` checks what was asked, `tasks/` says where to start,
`diffusion/` does the work, `models/` calls the networks, `running.py` keeps a run's values.

Legend
    B        images of a run = prompts x images per prompt
    z, x     clean latents, noisy latents [B, C, H/f, W/f]; f is the autoencoder's factor
    embeds   text embeddings [B, L, channels]; with guidance [2B, …], the negative half first
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    SchedulerMixin,
    UNet2DConditionModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ldm_pipeline.diffusion import loop
from ldm_pipeline.diffusion.course import Course
from ldm_pipeline.diffusion.denoiser import Denoiser, guided, make_denoiser
from ldm_pipeline.diffusion.noise import Noise
from ldm_pipeline.diffusion.prediction import PREDICTION_TYPES
from ldm_pipeline.diffusion.samplers import Consistency
from ldm_pipeline.diffusion.schedule import Schedule
from ldm_pipeline.errors import UserError, choose
from ldm_pipeline.images import to_output, to_pictures
from ldm_pipeline.loading import FolderPipeline
from ldm_pipeline.models import autoencoder, text
from ldm_pipeline.models.sampling import choose_sampler, settle
from ldm_pipeline.models.unet import bind, guidance_embedding
from ldm_pipeline.randomness import batch_noise
from ldm_pipeline.request import (
    CALLBACK_TENSORS,
    GUIDANCE,
    LCM_GUIDANCE,
    LCM_STEPS,
    STEPS,
    Request,
    Text,
)
from ldm_pipeline.running import LiveValues, Run, halves, under_way
from ldm_pipeline.tasks.generate import generate

ENCODING = "encode a prompt (prompt_embeds and negative_prompt_embeds do without)"

Callback = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any] | None]


class LatentDiffusionPipeline(
    LiveValues,
    FolderPipeline,
    StableDiffusionMixin,
    TextualInversionLoaderMixin,
    StableDiffusionLoraLoaderMixin,
):
    """Text to image with a Stable Diffusion shaped model (1.x, 2.x, or the bundled one).

    Any component may be None where it is not needed: text parts alone encode prompts, and all
    but the text parts draw from embeddings. One pipeline serves any number of threads at once.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->unet->vae"
    _optional_components: ClassVar = ["safety_checker", "feature_extractor", "image_encoder"]
    _exclude_from_cpu_offload: ClassVar = ["safety_checker"]
    _callback_tensor_inputs: ClassVar = list(CALLBACK_TENSORS)

    def __init__(
        self,
        vae: AutoencoderKL | None,
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
        settle(scheduler)
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
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    # Drawing ----------------------------------------------------------------------------------

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
        eta: float = 0.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        *,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        sampler: str | None = None,
        seed: int | Sequence[int] | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        lcm: bool | str | os.PathLike[str] = False,
    ) -> Any:
        """Draw pictures. Arguments and defaults are those of a stock Stable Diffusion pipeline,
        and draw the same pictures: 50 steps of guidance 7.5. `Request` documents each. Ours are
        the last four:

        sampler             a name of `request.SAMPLER_NAMES`; None runs the pipeline's scheduler
        seed                image i is drawn with seed + i, or with entry i of a list, and is
                            then the same picture whatever the batch
        guidance_interval   guidance acts between these two fractions of the run (2404.07724)
        lcm                 few steps (2311.05556): draw this call with the LCM adapter in this
                            file, True is the bundled model's, in 4 steps without guidance unless
                            told otherwise; a full LCM (whose UNet takes the guidance) needs none

        `callback_on_step_end(pipe, step, timestep, tensors)` may change `latents`,
        `prompt_embeds`, `pipe._guidance_scale`, and set `pipe._interrupt`.

        Returns `images` and `nsfw_content_detected`, as a `StableDiffusionPipelineOutput` or,
        without `return_dict`, a tuple. Images are pictures ("pil"), an array [B, H, W, 3]
        ("np") or a tensor [B, 3, H, W] ("pt"), both in [0, 1], or the latents ("latent").
        Raises `UserError`, before any network is called, for what cannot be drawn.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if num_inference_steps is None:
            num_inference_steps = LCM_STEPS if lcm else STEPS
        if guidance_scale is None:
            guidance_scale = LCM_GUIDANCE if lcm and self._steerable else GUIDANCE
        request = Request(
            prompt=prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            eta=eta,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            output_type=output_type,
            cross_attention_kwargs=cross_attention_kwargs,
            guidance_rescale=guidance_rescale,
            clip_skip=clip_skip,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            sampler=sampler,
            seed=seed,
            guidance_interval=guidance_interval,
            lcm=lcm,
        )
        images, unsafe = self._answer(request, callback_on_step_end)
        if not return_dict:
            return images, unsafe
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=unsafe)

    def _answer(self, request: Request, callback: Callback | None) -> tuple[Any, list[bool] | None]:
        """What was asked for, drawn: the images, and which a checker blacked out."""
        self._check_components(request)
        with under_way(self, self._begin(request)) as run:
            z = self._draw(request, run, callback)
            images, unsafe = self._finish(z, request)
        self.maybe_free_model_hooks()
        return images, unsafe

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

    def _draw(self, request: Request, run: Run, callback: Callback | None) -> Tensor:
        """Latents [B, C, h, w] for a request: encode, plan, denoise."""
        device = self._execution_device
        schedule = Schedule.from_config(self.scheduler.config)
        unet, distilled = self.unet, None
        if request.lcm:
            from ldm_pipeline.lora.few_steps import few_step_unet  # it imports peft

            unet, note = few_step_unet(self, request.lcm)
            distilled = Consistency(note.original_steps, note.timestep_scaling)
        sampler = choose_sampler(
            request.sampler_name,
            self.scheduler,
            eta=request.eta,
            timesteps=request.timesteps,
            sigmas=request.sigmas,
            consistency=distilled,
        )
        course = sampler.course(schedule, request.num_inference_steps or 1)
        course = self._portion(course, request)
        run.num_timesteps = len(course.times) - 1
        self._tell(request, run)
        assert run.prompt_embeds is not None
        noise = batch_noise(request.seeds or request.generator, request.image_count, device)
        plan = self._plan(request, course, noise, like=run.prompt_embeds)
        denoiser = self._denoiser(unet, run, schedule, plan.start)
        with self.progress_bar(total=run.num_timesteps) as bar:
            watch = self._watch(run, callback, request.callback_on_step_end_tensor_inputs, bar)
            return loop.run(plan, denoiser, course.step, noise, watch)

    def _portion(self, course: Course, request: Request) -> Course:
        """The part of the course that this request runs: all of it."""
        return course

    def _tell(self, request: Request, run: Run) -> None:
        """Put into `run` all that the UNet is told."""
        embeds, negative = self.encode_prompt(
            request.prompts or None,
            self._execution_device,
            request.num_images_per_prompt,
            run.guides,
            request.negative_prompts,
            prompt_embeds=request.prompt_embeds,
            negative_prompt_embeds=request.negative_prompt_embeds,
            lora_scale=run.adapter_scale,
            clip_skip=run.clip_skip,
        )
        run.prompt_embeds = halves(negative, embeds) if run.guides else embeds
        run.negative_prompt_embeds = negative

    def _plan(self, request: Request, course: Course, noise: Noise, like: Tensor) -> loop.Plan:
        """Where the run starts and which levels it visits, in the dtype of `like`."""
        n = request.latents
        if n is None:
            n = noise.draw(self._latent_shape(request), like.dtype, like.device)
        return generate(n.to(like.device), course)

    def _denoiser(
        self, unet: UNet2DConditionModel, run: Run, schedule: Schedule, like: Tensor
    ) -> Denoiser:
        """The UNet with this run's conditioning, read anew at every call, and its guidance."""
        strength = None
        if not run.steerable:
            w = torch.tensor(run.guidance_scale - 1).repeat(like.shape[0])
            strength = guidance_embedding(w, self.unet.config.time_cond_proj_dim).to(like)

        def network(x: Tensor, t: Tensor) -> Tensor:
            rows = x.shape[0]
            bound = bind(
                unet,
                run.embeds_for(rows),
                timestep_cond=strength,
                cross_attention_kwargs=run.cross_attention_kwargs,
                added_cond_kwargs=run.added(rows),
            )
            return bound(x, t)

        answers = guided(network, run.guidance, alone=network)
        return make_denoiser(answers, schedule, self._prediction_type)

    def _watch(
        self, run: Run, callback: Callback | None, names: Sequence[str], bar: Any
    ) -> loop.Watch:
        """What happens after every step: the caller's callback, the progress bar, an interrupt."""

        def watch(i: int, t: float, s: float, x: Tensor) -> Tensor | loop.Stop:
            if callback is not None:
                timestep = torch.tensor(int(t) if t.is_integer() else t)
                passed = {n: x if n == "latents" else getattr(run, n) for n in names}
                changed = callback(self, i, timestep, passed) or {}
                x = changed.get("latents", x)
                for name in self._callback_tensor_inputs[1:]:
                    setattr(run, name, changed.get(name, getattr(run, name)))
            run.steps_done = i + 1
            bar.update()
            return loop.Stop(x) if run.interrupt else x

        return watch

    def _finish(self, z: Tensor, request: Request) -> tuple[Any, list[bool] | None]:
        """Pictures of clean latents as the caller wants them, and which a checker blacked out."""
        if request.output_type == "latent":
            return z, None
        images = autoencoder.decode(self.vae, z, request.generator)
        if self.safety_checker is None:
            return to_output(images, request.output_type), None
        shown = to_pictures(to_output(images, "np"))
        clip_input = self.feature_extractor(shown, return_tensors="pt").pixel_values
        images, unsafe = self.safety_checker(
            images=images, clip_input=clip_input.to(images.device, z.dtype)
        )
        return to_output(images, request.output_type, already=unsafe), unsafe

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
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings of the prompts and, with guidance, of the negative ones: each [B, L, C].

        Embeddings that were passed are only repeated for the images of each prompt. No negative
        prompt means the empty text. `clip_skip` concerns the prompts alone, as in stock
        pipelines. Raises `UserError` where words must be encoded and there is no text encoder.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
        count = len(prompts) if prompt_embeds is None else prompt_embeds.shape[0]
        if negative_prompt is None or isinstance(negative_prompt, str):
            negatives = [negative_prompt or ""] * count
        else:
            negatives = list(negative_prompt)
        if len(negatives) != count:
            raise UserError(f"negative_prompt has {len(negatives)} texts for {count} prompts")

        def convert(texts: list[str]) -> list[str]:
            return self.maybe_convert_prompt(texts, self.tokenizer)

        with text.adapter_scale(self.text_encoder, lora_scale):
            if prompt_embeds is None:
                prompt_embeds = text.encode(
                    self.tokenizer,
                    self.text_encoder,
                    prompts,
                    device=device,
                    clip_skip=clip_skip,
                    convert=convert,
                )
            if do_classifier_free_guidance and negative_prompt_embeds is None:
                negative_prompt_embeds = text.encode(
                    self.tokenizer,
                    self.text_encoder,
                    negatives,
                    device=device,
                    length=prompt_embeds.shape[1],
                    convert=convert,
                )
        owner = self.text_encoder if self.text_encoder is not None else self.unet
        dtype = owner.dtype if owner is not None else prompt_embeds.dtype
        repeat = num_images_per_prompt
        prompt_embeds = prompt_embeds.to(device, dtype).repeat_interleave(repeat, dim=0)
        if negative_prompt_embeds is not None and do_classifier_free_guidance:
            negative_prompt_embeds = negative_prompt_embeds.to(device, dtype)
            negative_prompt_embeds = negative_prompt_embeds.repeat_interleave(repeat, dim=0)
        return prompt_embeds, negative_prompt_embeds

    # What fits this model ---------------------------------------------------------------------

    def _check_components(self, request: Request) -> None:
        """Raise `UserError` for what this pipeline's components cannot draw."""
        needed = {"unet": "draw", "scheduler": "draw"}
        if request.output_type != "latent":
            needed["vae"] = "decode latents (output_type='latent' skips that)"
        for name, purpose in needed.items():
            if getattr(self, name) is None:
                raise UserError(f"this pipeline has no {name} to {purpose}")
        self._check_words(request)
        choose("prediction_type", self._prediction_type, PREDICTION_TYPES)
        shape = self._latent_shape(request)
        if request.latents is not None and tuple(request.latents.shape[1:]) != shape:
            raise UserError(
                f"latents has shape {tuple(request.latents.shape)}; it must be"
                f" {(request.image_count, *shape)} for this model and size"
            )

    def _check_words(self, request: Request) -> None:
        """Raise `UserError` where words must be encoded and cannot be."""
        unguided = request.guidance_scale <= 1 or request.negative_prompt_embeds is not None
        if self.text_encoder is None and (request.prompt_embeds is None or not unguided):
            raise UserError(f"this pipeline has no text_encoder to {ENCODING}")
        if request.prompt_embeds is None:
            text.check_clip_skip(self.text_encoder, request.clip_skip)

    @property
    def _steerable(self) -> bool:
        """Whether guidance is two answers of the UNet, and not one of its inputs."""
        return self.unet is None or self.unet.config.time_cond_proj_dim is None

    @property
    def _prediction_type(self) -> str:
        return str(self.scheduler.config.get("prediction_type", "epsilon"))

    def _latent_shape(self, request: Request) -> tuple[int, int, int]:
        """(C, h, w) of an image's latents: from height and width, `latents`, or the UNet."""
        own = self.unet.config.sample_size
        if request.latents is not None:
            own = tuple(request.latents.shape[-2:])
        if own is None and (request.height is None or request.width is None):
            raise UserError("this model has no size of its own; pass height and width")
        high, wide = own if isinstance(own, list | tuple) else (own, own)
        factor = self.vae_scale_factor
        return (
            self.unet.config.in_channels,
            high if request.height is None else request.height // factor,
            wide if request.width is None else request.width // factor,
        )
