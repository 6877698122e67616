"""Pictures as prompts: IP-Adapters (2308.06721), through stock's loader, from safetensors alone.

Legend
    image_embeds  for each adapter a tensor [B, pictures, channels] (or [B, pictures, tokens,
                  channels]); with guidance [2B, …], the negative half first
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models import ImageProjection
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from ldm_pipeline.errors import UserError
from ldm_pipeline.models.quiet import quiet_transformers
from ldm_pipeline.models.trust import SAFE, check_adapter, check_part
from ldm_pipeline.request import Request

with quiet_transformers():
    from diffusers.loaders import IPAdapterMixin

Source = str | os.PathLike[str] | dict[str, Any]


class ImagePrompts(IPAdapterMixin):
    """Loading IP-Adapters, and what they read of pictures."""

    def load_ip_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Source | list[Source],
        subfolder: str | list[str],
        weight_name: str | list[str],
        image_encoder_folder: str | None = "image_encoder",
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str | None = None,
        low_cpu_mem_usage: bool = True,
    ) -> None:
        """Load one adapter, or several, and the image encoder that they share where there is none.

        As stock, but for pickles: weights whose name does not end in .safetensors are refused with
        a `UserError` (a state dict may be passed), and so is an image encoder without any, or one
        that is not safe to open.
        """
        sources = pretrained_model_name_or_path_or_dict
        first = sources[0] if isinstance(sources, list) else sources
        names = weight_name if isinstance(weight_name, list) else [weight_name]
        several = sources if isinstance(sources, list) else [sources] * len(names)
        for source, name in zip(several, names, strict=False):
            check_adapter(source, name)
        found: dict[str, Any] = {"cache_dir": cache_dir, "local_files_only": local_files_only}
        if self.image_encoder is None and image_encoder_folder and not isinstance(first, dict):
            inside = subfolder[0] if isinstance(subfolder, list) else subfolder
            plain = "/" not in image_encoder_folder
            place = Path(inside, image_encoder_folder) if plain else Path(image_encoder_folder)
            try:
                folder = Path(first)
                if not folder.is_dir():
                    wanted = [f"{place.as_posix()}/*{ending}" for ending in (SAFE, ".json")]
                    hub = {**found, "token": token, "revision": revision}
                    folder = Path(snapshot_download(str(first), allow_patterns=wanted, **hub))
                check_part(folder, place.as_posix())
                encoder = CLIPVisionModelWithProjection.from_pretrained(
                    folder,
                    subfolder=place.as_posix(),
                    dtype=self.dtype,
                    use_safetensors=True,
                    local_files_only=True,
                )
            except UserError:
                raise
            except (OSError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise UserError(
                    f"the image encoder in {first}/{place.as_posix()} cannot be loaded: {reason}"
                ) from error
            self.register_modules(image_encoder=encoder.to(self.device))
        super().load_ip_adapter(
            pretrained_model_name_or_path_or_dict,
            subfolder,
            weight_name,
            image_encoder_folder=image_encoder_folder,
            token=token,
            revision=revision,
            low_cpu_mem_usage=low_cpu_mem_usage,
            **found,
        )

    def encode_image(
        self,
        image: Any,
        device: torch.device | str,
        num_images_per_prompt: int,
        output_hidden_states: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What the image encoder says of pictures and, for guidance, of none: each [n, channels].

        With `output_hidden_states` its last but one layer, [n, tokens, channels]; then the
        negative is what it says of black, else zeros.
        """
        dtype = next(self.image_encoder.parameters()).dtype
        if not isinstance(image, Tensor):
            image = self.feature_extractor(image, return_tensors="pt").pixel_values
        image = image.to(device=device, dtype=dtype)
        if output_hidden_states:
            said, unsaid = (
                self.image_encoder(each, output_hidden_states=True).hidden_states[-2]
                for each in (image, torch.zeros_like(image))
            )
        else:
            said = self.image_encoder(image).image_embeds
            unsaid = torch.zeros_like(said)
        repeat = num_images_per_prompt
        return said.repeat_interleave(repeat, dim=0), unsaid.repeat_interleave(repeat, dim=0)

    def prepare_ip_adapter_image_embeds(
        self,
        ip_adapter_image: Any,
        ip_adapter_image_embeds: Sequence[Tensor] | None,
        device: torch.device | str,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
    ) -> list[Tensor]:
        """`image_embeds` of pictures, one entry for each adapter, or of what this made before.

        `num_images_per_prompt` is the number of images B. With one image and guidance the result
        can be kept and passed as `ip_adapter_image_embeds`, also where nothing guides. Raises
        `UserError` where the numbers of entries and adapters differ, and for tensors of another
        shape.
        """
        layers = self.unet.encoder_hid_proj.image_projection_layers
        pairs: list[tuple[Tensor, Tensor]] = []
        if ip_adapter_image_embeds is None:
            pictures = (
                ip_adapter_image if isinstance(ip_adapter_image, list) else [ip_adapter_image]
            )
            self._check_number("ip_adapter_image", pictures)
            for picture, layer in zip(pictures, layers, strict=True):
                hidden = not isinstance(layer, ImageProjection)
                said, unsaid = self.encode_image(picture, device, 1, hidden)
                pairs.append((unsaid[None], said[None]))
        else:
            self._check_number("ip_adapter_image_embeds", ip_adapter_image_embeds)
            self._check_halves(ip_adapter_image_embeds, do_classifier_free_guidance)
            pairs = [(embeds[:1], embeds[-1:]) for embeds in ip_adapter_image_embeds]
        halves = slice(None) if do_classifier_free_guidance else slice(1, None)
        return [
            torch.cat([half for half in pair[halves] for _ in range(num_images_per_prompt)]).to(
                device
            )
            for pair in pairs
        ]

    def _check_number(self, name: str, entries: Sequence[Any]) -> None:
        """Raise `UserError` unless there is one entry for each adapter."""
        count = len(self.unet.encoder_hid_proj.image_projection_layers)
        if len(entries) != count:
            raise UserError(f"{name} has {len(entries)} entries for {count} IP-Adapters")

    def _check_image_prompt(self, request: Request) -> None:
        """Raise `UserError` where pictures are passed as prompts and nothing reads them, or not
        passed and something does."""
        loaded = self.unet.config.encoder_hid_dim_type == "ip_image_proj"
        images, embeds = request.ip_adapter_image, request.ip_adapter_image_embeds
        if not loaded and not (images is None and embeds is None):
            raise UserError(
                "no IP-Adapter is loaded to read ip_adapter_image; call load_ip_adapter first"
            )
        if not loaded:
            return
        if images is None and embeds is None:
            raise UserError(
                "an IP-Adapter is loaded: pass ip_adapter_image, or call unload_ip_adapter"
            )
        if embeds is None:
            if self.image_encoder is None or self.feature_extractor is None:
                raise UserError(
                    "this pipeline has no image_encoder and feature_extractor to read"
                    " ip_adapter_image; pass ip_adapter_image_embeds"
                )
            self._check_number("ip_adapter_image", images if isinstance(images, list) else [images])
            return
        if not isinstance(embeds, list | tuple):
            raise UserError("ip_adapter_image_embeds must be a list, one tensor for each adapter")
        self._check_number("ip_adapter_image_embeds", embeds)
        self._check_halves(embeds, request.guidance_scale > 1 and self._steerable)

    def _check_halves(self, embeds: Sequence[Any], guides: bool) -> None:
        """Raise `UserError` unless each entry is of one image: with guidance both halves, else the
        prompted one, before which the negative one may stand."""
        for entry in embeds:
            shape = tuple(getattr(entry, "shape", ()))
            if len(shape) not in (3, 4) or shape[0] not in ((2,) if guides else (1, 2)):
                raise UserError(
                    f"ip_adapter_image_embeds holds {shape}; each must be [{2 if guides else 1},"
                    " pictures, channels], with guidance the negative half first, as"
                    " prepare_ip_adapter_image_embeds makes it of one image"
                )
