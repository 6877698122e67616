"""A UNet's conditioning: where Stable Diffusion 1.x/2.x and SDXL differ.

`conditioning_of` picks the kind for a pipeline; whoever trains goes through four questions:

    tokens(texts)            what the text encoders read of some texts
    encode(tokens)           their embeddings, with gradients
    micro_conditions(...)    SDXL's, of a picture: its size and how it was cut
    network(unet, cond)      the conditioned UNet, as a function of (x, t)

Legend
    n       texts, or samples of a batch
    cond    name -> tensor: embeds [n, L, C]; for SDXL also pooled [n, D] and time_ids [n, 6]; for
            UNets with a guidance embedding also w [n], guidance_scale - 1
    Size    (width, height) in pixels
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ldm_pipeline.diffusion.denoiser import Network
from ldm_pipeline.errors import UserError
from ldm_pipeline.models.text import asking_inner, reads_mask, tokenise
from ldm_pipeline.models.unet import bind, guidance_embedding

Size = tuple[int, int]
Cond = dict[str, Tensor]


class Conditioning(Protocol):
    """What differs between the families of models; `arguments` is for their pipelines."""

    tag: ClassVar[str]
    """How the Hugging Face hub calls the family."""

    @property
    def zero_empty_prompt(self) -> bool:
        """Whether zeros stand for the empty text, not the encoders' embeddings of it."""
        ...

    @property
    def encoders(self) -> dict[str, Any]:
        """The text encoders, by component."""
        ...

    @property
    def tokenizers(self) -> tuple[CLIPTokenizer, ...]:
        """One for each encoder, in the same order."""
        ...

    @property
    def unread(self) -> tuple[str, ...]:
        """Patterns (see `lora.targets`) of the modules that decide nothing of the conditioning."""
        ...

    def tokens(self, texts: Sequence[str]) -> Cond:
        """What the text encoders read of `texts`, each [n, …], on the CPU."""
        ...

    def encode(self, tokens: Mapping[str, Tensor]) -> Cond:
        """Their embeddings, on the encoders' device; gradients are the caller's choice."""
        ...

    def micro_conditions(self, original: Size, corner: Size, size: Size) -> Cond:
        """The micro-conditioning of one picture that was `original` before it was resized, and
        `size` after it was cut out at `corner` (left, top)."""
        ...

    def network(self, unet: UNet2DConditionModel, cond: Mapping[str, Tensor]) -> Network:
        """The UNet with `cond` bound."""
        ...

    def arguments(self, prompt: Cond, negative: Cond) -> dict[str, Tensor]:
        """The same as the family's pipeline takes it."""
        ...


@dataclass(frozen=True)
class OneEncoder:
    """Stable Diffusion 1.x and 2.x: the last hidden states of one text encoder."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    tag: ClassVar[str] = "stable-diffusion"
    zero_empty_prompt: ClassVar[bool] = False
    unread: ClassVar[tuple[str, ...]] = ()

    @property
    def encoders(self) -> dict[str, Any]:
        """The one."""
        return {"text_encoder": self.text_encoder}

    @property
    def tokenizers(self) -> tuple[CLIPTokenizer, ...]:
        """The one."""
        return (self.tokenizer,)

    def tokens(self, texts: Sequence[str]) -> Cond:
        """`tokens` [n, L], and `read` [n, L] for encoders with an attention mask."""
        read = tokenise(self.tokenizer, list(texts), warn=False)
        cond = {"tokens": read.input_ids}
        return cond | ({"read": read.attention_mask} if reads_mask(self.text_encoder) else {})

    def encode(self, tokens: Mapping[str, Tensor]) -> Cond:
        """`embeds` [n, L, C]."""
        device = self.text_encoder.device
        mask = tokens["read"].to(device) if "read" in tokens else None
        return {"embeds": self.text_encoder(tokens["tokens"].to(device), attention_mask=mask)[0]}

    def micro_conditions(self, original: Size, corner: Size, size: Size) -> Cond:
        """Nothing: these models have none."""
        return {}

    def network(self, unet: UNet2DConditionModel, cond: Mapping[str, Tensor]) -> Network:
        """The UNet under the embeddings."""
        strength = guidance_cond(unet, cond)
        return bind(unet, cond["embeds"].to(unet.dtype), timestep_cond=strength)

    def arguments(self, prompt: Cond, negative: Cond) -> dict[str, Tensor]:
        """As `StableDiffusionPipeline` and ours take them."""
        return {"prompt_embeds": prompt["embeds"], "negative_prompt_embeds": negative["embeds"]}


@dataclass(frozen=True)
class TwoEncoders:
    """SDXL (2307.01952): the last but one hidden states of two text encoders side by side, the
    pooled and projected answer of the second, and how the picture was cut.

    With `zero_empty_prompt` (`force_zeros_for_empty_prompt` of the pipeline) the empty text is
    zeros: so these models learnt to draw without words, and guidance draws so without a negative
    prompt.
    """

    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection
    zero_empty_prompt: bool
    tag: ClassVar[str] = "stable-diffusion-xl"

    @property
    def encoders(self) -> dict[str, Any]:
        """Both."""
        return {"text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}

    @property
    def tokenizers(self) -> tuple[CLIPTokenizer, ...]:
        """Both."""
        return self.tokenizer, self.tokenizer_2

    @property
    def unread(self) -> tuple[str, ...]:
        """The first encoder's last layer; the second's decides its pooled answer."""
        return (f"text_encoder.encoder.layers.{self.text_encoder.config.num_hidden_layers - 1}",)

    def tokens(self, texts: Sequence[str]) -> Cond:
        """`tokens` and `tokens_2` [n, L], and `said` [n]: 0 where zeros stand for the text."""
        first, second = (tokenise(each, list(texts), warn=False) for each in self.tokenizers)
        said = torch.tensor([float(bool(text) or not self.zero_empty_prompt) for text in texts])
        return {"tokens": first.input_ids, "tokens_2": second.input_ids, "said": said}

    def encode(self, tokens: Mapping[str, Tensor]) -> Cond:
        """`embeds` [n, L, C + C'] and `pooled` [n, D]."""
        device = self.text_encoder_2.device
        (first, _), (second, pooled) = (
            asking_inner(encoder, device)(tokens[name], tokens[name])
            for name, encoder in (("tokens", self.text_encoder), ("tokens_2", self.text_encoder_2))
        )
        assert pooled is not None
        embeds = torch.cat([first, second], dim=-1)
        said = tokens["said"].to(device, embeds.dtype)[:, None]
        return {"embeds": embeds * said[..., None], "pooled": pooled * said}

    def micro_conditions(self, original: Size, corner: Size, size: Size) -> Cond:
        """`time_ids` [6]: height and width before, the corner's top and left, height and width."""
        return {"time_ids": time_ids(original[::-1], corner[::-1], size[::-1])}

    def network(self, unet: UNet2DConditionModel, cond: Mapping[str, Tensor]) -> Network:
        """The UNet under the embeddings, the pooled answer and the picture's place."""
        added = {
            "text_embeds": cond["pooled"].to(unet.dtype),
            "time_ids": cond["time_ids"],
        }
        strength = guidance_cond(unet, cond)
        return bind(
            unet,
            cond["embeds"].to(unet.dtype),
            added_cond_kwargs=added,
            timestep_cond=strength,
        )

    def arguments(self, prompt: Cond, negative: Cond) -> dict[str, Tensor]:
        """As SDXL's pipelines take them, stock's and ours."""
        return {
            "prompt_embeds": prompt["embeds"],
            "negative_prompt_embeds": negative["embeds"],
            "pooled_prompt_embeds": prompt["pooled"],
            "negative_pooled_prompt_embeds": negative["pooled"],
        }


def guidance_cond(unet: UNet2DConditionModel, cond: Mapping[str, Tensor]) -> Tensor | None:
    """The embedding [n, time_cond_proj_dim] of the guidance w [n] that a full LCM's UNet takes;
    None for a UNet that takes none."""
    width = unet.config.time_cond_proj_dim
    if width is None or "w" not in cond:
        return None
    return guidance_embedding(cond["w"], width).to(unet.dtype)


def time_ids(original: Size, corner: Size, target: Size | tuple[float]) -> Tensor:
    """SDXL's numbers [6] of a picture: how high and wide it was, the top and left of what was cut
    out, how high and wide that is (2307.01952, section 2.2). Here heights come first. Its refiner
    takes an aesthetic score in place of the last two."""
    return torch.tensor([*original, *corner, *target], dtype=torch.float32)


def conditioning_of(pipe: Any) -> Conditioning:
    """The conditioning of the UNet of `pipe`.

    Raises `UserError` for models of another kind: inpainting and editing models, whose UNets read
    more than latents, and SDXL's refiner, which has one text encoder.
    """
    channels, latents = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
    if channels != latents:
        raise UserError(
            f"the model's UNet reads {channels} channels, not {latents}: it is one for inpainting"
            " or editing; name the text-to-image model that it was made of"
        )
    added = getattr(pipe.unet.config, "addition_embed_type", None)
    if added is None and not hasattr(pipe, "text_encoder_2"):
        return OneEncoder(pipe.tokenizer, pipe.text_encoder)
    if added != "text_time" or getattr(pipe, "text_encoder", None) is None:
        raise UserError(
            "the model is none of Stable Diffusion 1.x, 2.x and SDXL (base): its UNet is told"
            f" {added or 'nothing'} besides what its text encoders say"
        )
    return TwoEncoders(
        pipe.tokenizer,
        pipe.tokenizer_2,
        pipe.text_encoder,
        pipe.text_encoder_2,
        bool(pipe.config.get("force_zeros_for_empty_prompt", True)),
    )
