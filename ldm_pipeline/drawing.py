"""A checked request to pictures: encode, plan, denoise, decode.

    words -> embeddings ─┐
    picture -> latents ──┴─> plan -> denoising loop -> clean latents -> pictures

`Drawing` is the half of the pipeline that works; `pipeline.py` is the half that people call.

Legend
    B        images of a run = prompts x images per prompt
    z, x, n  clean latents, noisy latents, unit noise, each [B, C, H/f, W/f] with the autoencoder's
             factor f
    embeds   text embeddings [B, L, channels]; with guidance [2B, …], the negative half first
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from ldm_pipeline.canvas import Canvas, open_canvas
from ldm_pipeline.diffusion import loop
from ldm_pipeline.diffusion.course import Course
from ldm_pipeline.diffusion.denoiser import Denoiser, guided, make_denoiser
from ldm_pipeline.diffusion.noise import Noise
from ldm_pipeline.diffusion.samplers import Consistency
from ldm_pipeline.diffusion.schedule import Schedule
from ldm_pipeline.errors import UserError
from ldm_pipeline.image_prompts import ImagePrompts
from ldm_pipeline.images import to_output, to_pictures
from ldm_pipeline.models import autoencoder
from ldm_pipeline.models.autoencoder import tiled
from ldm_pipeline.models.sampling import choose_sampler
from ldm_pipeline.models.unet import bind, guidance_embedding
from ldm_pipeline.randomness import batch_noise
from ldm_pipeline.request import Request
from ldm_pipeline.running import Callback, LiveValues, Run, halves, watcher
from ldm_pipeline.tasks.generate import generate
from ldm_pipeline.tasks.img2img import img2img
from ldm_pipeline.tasks.inpaint import inpaint


class Drawing(LiveValues, ImagePrompts, DiffusionPipeline):
    """How a pipeline draws, over the components that the pipeline holds."""

    def _draw(
        self, request: Request, canvas: Canvas | None, run: Run, callback: Callback | None
    ) -> Tensor:
        """Latents [B, C, h, w] for a request: encode, plan, denoise."""
        device = self._execution_device
        schedule = Schedule.from_config(self.scheduler.config)
        unet, distilled = self.unet, None
        if request.lcm:
            from ldm_pipeline.lora.few_steps import few_step_unet  # it imports peft

            unet, note = few_step_unet(self, request.lcm)
            distilled = Consistency(note.original_steps, note.timestep_scaling, note.spacing)
        sampler = choose_sampler(
            request.sampler_name,
            self.scheduler,
            eta=request.eta,
            timesteps=request.timesteps,
            sigmas=request.sigmas,
            consistency=distilled,
        )
        course = sampler.course(
            schedule, request.num_inference_steps or 1, request.share, request.exact_steps
        )
        course = self._portion(course, request)
        run.num_timesteps = len(course.times) - 1
        self._tell(request, canvas, run)
        assert run.prompt_embeds is not None
        if request.ip_adapter_image is not None or request.ip_adapter_image_embeds is not None:
            run.image_embeds = self.prepare_ip_adapter_image_embeds(
                request.ip_adapter_image,
                request.ip_adapter_image_embeds,
                device,
                request.image_count,
                run.guides,
            )

        noise = batch_noise(request.seeds or request.generator, request.image_count, device)
        plan = self._plan(request, canvas, run, course, noise, like=run.prompt_embeds)
        denoiser = self._denoiser(unet, run, schedule, plan.start)
        with self.progress_bar(total=run.num_timesteps) as bar:
            names = request.callback_on_step_end_tensor_inputs
            watch = watcher(self, run, callback, names, bar, course.own)
            return loop.run(plan, denoiser, course.step, noise, watch)

    def _portion(self, course: Course, request: Request) -> Course:
        """The part of the course that this request runs: all of it."""
        return course

    def _tell(self, request: Request, canvas: Canvas | None, run: Run) -> None:
        """Put into `run` what the words are, for the UNet."""
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
            weighted=request.weighted,
        )
        run.prompt_embeds = halves(negative, embeds) if run.guides else embeds
        run.negative_prompt_embeds = negative

    def _plan(
        self,
        request: Request,
        canvas: Canvas | None,
        run: Run,
        course: Course,
        noise: Noise,
        like: Tensor,
    ) -> loop.Plan:
        """Where to start and what stays; noise is drawn in the order of stock pipelines."""
        shape = self._latent_shape(request, canvas)
        known = request.paints and not self._reads_mask
        vae = self._encoder(canvas)
        z: Tensor | None = None
        if canvas is not None and (known or not request.begins_at_noise):
            z = canvas.latents(vae, request, noise, like)
        n = request.latents
        n = noise.draw(shape, like.dtype, like.device) if n is None else n.to(like)
        plan = self._start(request, z, n, course)
        if canvas is None or not request.paints:
            return plan

        sides = 2 if run.guides else 1
        count = request.image_count
        run.mask = tiled(canvas.latent_mask(shape[1:], count).to(like), sides * count)
        needed = self._reads_mask or "masked_image_latents" in (
            request.callback_on_step_end_tensor_inputs
        )
        staying = canvas.staying(vae, request, noise, like, shape, needed)
        if staying is not None:
            run.masked_image_latents = tiled(staying, sides * count)
        if not known:
            return plan
        return inpaint(plan, _sure(z), lambda: _sure(run.mask)[:count], n, course)

    def _encoder(self, canvas: Canvas | None) -> Any:
        """The autoencoder that reads the canvas."""
        return self.vae

    def _start(self, request: Request, z: Tensor | None, n: Tensor, course: Course) -> loop.Plan:
        """The way from noise, or from a picture's latents `z` under noise, to clean latents."""
        return generate(n, course) if request.begins_at_noise else img2img(_sure(z), n, course)

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
                beside=run.beside(rows) if self._reads_mask else None,
            )
            return bound(x, t)

        answers = guided(network, run.guidance, alone=network)
        return make_denoiser(answers, schedule, self._prediction_type)

    def _finish(
        self, z: Tensor, request: Request, canvas: Canvas | None
    ) -> tuple[Any, list[bool] | None]:
        """Pictures of clean latents as the caller wants them, and which a checker blacked out."""
        if request.output_type == "latent":
            return z, None
        images = self._decoded(z, request)
        if request.keep_unmasked and canvas is not None:
            images = canvas.keep(images)
        images, unsafe = self._checked(images, z.dtype)
        drawn = to_output(images, request.output_type, already=unsafe)
        if canvas is not None and canvas.box is not None:
            keep = request.keep_unmasked
            drawn = [canvas.lay_back(each, self.image_processor, keep) for each in drawn]
        return drawn, unsafe

    def _decoded(self, z: Tensor, request: Request) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] of clean latents."""
        return autoencoder.decode(self.vae, z, request.generator)

    def _checked(self, images: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[bool] | None]:
        """`images` with the unsafe ones blacked out by the safety checker, and which they are."""
        if self.safety_checker is None:
            return images, None
        shown = to_pictures(to_output(images, "np"))
        clip_input = self.feature_extractor(shown, return_tensors="pt").pixel_values
        images, unsafe = self.safety_checker(
            images=images, clip_input=clip_input.to(images.device, dtype)
        )
        return images, unsafe

    # What fits this model ---------------------------------------------------------------------

    def _canvas(self, request: Request) -> Canvas | None:
        """The picture that the request draws on, opened; `UserError` where it does not fit."""
        if request.image is None:
            return None
        size = request.height, request.width
        if request.paints:  # stock inpainting has the model's size, image-to-image the picture's
            _, high, wide = self._latent_shape(request)
            size = high * self.vae_scale_factor, wide * self.vae_scale_factor
        return open_canvas(request, self.image_processor, self.mask_processor, size)

    @property
    def _reads_mask(self) -> bool:
        """Whether the UNet was made for inpainting, and reads the mask beside the latents."""
        return bool(self.unet.config.in_channels > self.unet.config.out_channels)

    def _stock_class_name(self) -> str:
        if self.unet is not None and self._reads_mask:
            return self._saved_class_name.replace("Pipeline", "InpaintPipeline")
        return self._saved_class_name

    @property
    def _steerable(self) -> bool:
        """Whether guidance is two answers of the UNet, and not one of its inputs."""
        return self.unet is None or self.unet.config.time_cond_proj_dim is None

    @property
    def _prediction_type(self) -> str:
        return str(self.scheduler.config.get("prediction_type", "epsilon"))

    def _latent_shape(self, request: Request, canvas: Canvas | None = None) -> tuple[int, int, int]:
        """(C, h, w) of an image's latents: from height and width, `latents`, or the UNet; those
        of the picture where there is one."""
        factor = self.vae_scale_factor
        channels = self.unet.config.out_channels
        if canvas is not None:
            return channels, *canvas.latent_size(factor)
        own = self.unet.config.sample_size
        if request.latents is not None:
            own = tuple(request.latents.shape[-2:])
        if own is None and (request.height is None or request.width is None):
            raise UserError("this model has no size of its own; pass height and width")
        high, wide = own if isinstance(own, list | tuple) else (own, own)
        return (
            channels,
            high if request.height is None else request.height // factor,
            wide if request.width is None else request.width // factor,
        )


def _sure(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
