"""Whether a model can draw what a request asks for: refused in one line, before a network runs.

`request.py` looks at a request by itself; here it is held against the pipeline's components.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ldm_pipeline.canvas import Canvas
from ldm_pipeline.diffusion.prediction import PREDICTION_TYPES
from ldm_pipeline.drawing import Drawing
from ldm_pipeline.errors import UserError, choose
from ldm_pipeline.models import text
from ldm_pipeline.request import Request

TENSORS = (
    "latents",
    "masked_image_latents",
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
)
"""What a request may hold as a tensor."""

ENCODING = "encode a prompt (prompt_embeds and negative_prompt_embeds do without)"


class ModelChecks(Drawing):
    """What a pipeline checks of a request before it draws."""

    def _check_components(self, request: Request) -> None:
        """Raise `UserError` for what this pipeline's components cannot draw."""
        needed = {"unet": "draw", "scheduler": "draw"}
        if request.output_type != "latent":
            needed["vae"] = "decode latents (output_type='latent' skips that)"
        if request.image is not None:
            needed["vae"] = "encode and decode pictures"
        for name, purpose in needed.items():
            if getattr(self, name) is None:
                raise UserError(f"this pipeline has no {name} to {purpose}")
        self._check_family()
        for end in ("", "_2"):
            reader = getattr(self, f"tokenizer{end}", None)
            text.check_reader(reader, getattr(self, f"text_encoder{end}", None))
        self._check_words(request)
        self._check_tensors(request)
        choose("prediction_type", self._prediction_type, PREDICTION_TYPES)
        self._check_channels(request)
        self._check_image_prompt(request)

    def _check_family(self) -> None:
        """Raise `UserError` for a UNet that is told other things than this pipeline has to tell."""
        xl = self.unet.config.addition_embed_type == "text_time"
        if xl == ("text_encoder_2" in self.components):
            return
        own = "LatentDiffusionXLPipeline" if xl else "LatentDiffusionPipeline"
        raise UserError(
            f"this UNet is {'' if xl else 'not '}SDXL's; open the model with ldm_pipeline.load, or"
            f" use {own}"
        )

    def _check_tensors(self, request: Request) -> None:
        """Raise `UserError` for tensors that are none, hold what is not finite, or say to the UNet
        what it was not made to read."""
        for name in TENSORS:
            given = getattr(request, name, None)
            if given is None:
                continue
            if not isinstance(given, Tensor) or not given.is_floating_point():
                kind = given.dtype if isinstance(given, Tensor) else type(given).__name__
                raise UserError(f"{name} must be a torch.Tensor of floats, not {kind}")
            if not given.isfinite().all():
                raise UserError(f"{name} holds values that are not finite")
            read = self._read_channels(name)
            if read is not None and given.shape[-1] not in read:
                raise UserError(
                    f"{name} has {given.shape[-1]} channels, and this model's UNet reads"
                    f" {' or '.join(map(str, read))}; another model's embeddings?"
                )
        self._check_lengths(request)

    def _check_lengths(self, request: Request) -> None:
        """Raise `UserError` for embeddings of another length than the words beside them have."""
        ours, negative = request.prompt_embeds, request.negative_prompt_embeds
        if request.weighted or (ours is not None and not self._encodes_negative(request)):
            return
        reader = self.tokenizer if self.tokenizer is not None else self.tokenizer_2
        if ours is None and negative is not None and negative.shape[1] != reader.model_max_length:
            raise UserError(
                f"negative_prompt_embeds has {negative.shape[1]} tokens, and a prompt of words"
                f" has {reader.model_max_length}; pass prompt_embeds too, of as many"
            )
        if ours is not None and ours.shape[1] > reader.model_max_length:
            raise UserError(
                f"prompt_embeds has {ours.shape[1]} tokens, and a negative prompt of words at most"
                f" {reader.model_max_length}; pass negative_prompt_embeds too, of as many"
            )

    def _read_channels(self, name: str) -> Sequence[int] | None:
        """The widths of which the embeddings `name` may be; None where that is not told."""
        config = self.unet.config
        if name not in ("prompt_embeds", "negative_prompt_embeds"):
            return None
        if config.encoder_hid_dim_type == "text_proj":
            return [config.encoder_hid_dim]
        width = config.cross_attention_dim
        return [width] if isinstance(width, int) else list(width)

    def _check_channels(self, request: Request) -> None:
        """Raise `UserError` where the UNet reads another thing than the request has for it."""
        channels, latents = self.unet.config.in_channels, self.unet.config.out_channels
        if channels not in (latents, 2 * latents + 1):
            raise UserError(
                f"this model's UNet reads {channels} channels: it is neither for drawing"
                f" ({latents}) nor for inpainting ({2 * latents + 1})"
            )
        if self._reads_mask and not request.paints:
            raise UserError(
                f"this model's UNet reads {channels} channels: it paints into pictures; pass image"
                " and mask_image"
            )

    def _check_latents(self, request: Request, canvas: Canvas | None) -> None:
        """Raise `UserError` for latents of another shape than this model and size have."""
        shape = self._latent_shape(request, canvas)
        if request.latents is not None and tuple(request.latents.shape[1:]) != shape:
            raise UserError(
                f"latents has shape {tuple(request.latents.shape)}; it must be"
                f" {(request.image_count, *shape)} for this model and size"
            )
        staying = request.masked_image_latents
        if staying is not None and tuple(staying.shape[1:]) != shape:
            raise UserError(
                f"masked_image_latents has shape {tuple(staying.shape)}; it must be"
                f" [images, {', '.join(map(str, shape))}]"
            )
        if staying is not None and (not len(staying) or request.image_count % len(staying)):
            raise UserError(
                f"masked_image_latents has {len(staying)} rows for {request.image_count} images;"
                " pass one for all, or a number that divides them"
            )
        if canvas is not None and canvas.encoded and self._reads_mask and staying is None:
            raise UserError(
                "image holds latents, and this model's UNet reads what stays of the picture: pass"
                " masked_image_latents too"
            )

    def _check_words(self, request: Request) -> None:
        """Raise `UserError` where words must be encoded and cannot be."""
        if request.prompt_embeds is None or self._encodes_negative(request):
            for name in ("text_encoder", "tokenizer"):
                if getattr(self, name) is None:
                    raise UserError(f"this pipeline has no {name} to {ENCODING}")
        if request.prompt_embeds is None:
            text.check_clip_skip(self.text_encoder, request.clip_skip)

    def _encodes_negative(self, request: Request) -> bool:
        """Whether a negative prompt's words are encoded, if only the empty ones."""
        guides = request.guidance_scale > 1 and self._steerable
        return guides and request.negative_prompt_embeds is None
