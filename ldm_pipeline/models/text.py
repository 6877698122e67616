"""Words to embeddings: one tokenizer and one CLIP text encoder, as Stable Diffusion uses them.

Legend
    texts   prompts
    L       tokens per prompt, 77 for CLIP
    C       channels of the text encoder

Everything that touches the tokenizer or rescales adapter layers holds a lock: a fast tokenizer
keeps its padding and truncation settings in one object and refuses two threads at once, and
diffusers scales adapter layers in place.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils.peft_utils import scale_lora_layers
from torch import Tensor
from transformers import (
    BatchEncoding,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from ldm_pipeline.errors import UserError

logger = logging.getLogger(__name__)

Convert = Callable[[list[str]], list[str]]

NO_ENCODER = "this pipeline has no text encoder; pass prompt_embeds instead of prompt"

SHORTEST, LONGEST = 3, 10**6
"""Tokens of a text, with its begin and end; transformers gives tokenizers that do not say how many
are read an astronomic number."""

MOST_NAMED = 300
"""Letters of a text that was cut off which a warning names."""

_tokenising = threading.RLock()
_scaling = threading.RLock()


def tokenise(
    tokenizer: CLIPTokenizer,
    texts: list[str],
    *,
    length: int | None = None,
    convert: Convert | None = None,
    warn: bool = True,
) -> BatchEncoding:
    """Token ids and attention mask [len(texts), L], padded and cut to `length`.

    `length` defaults to the most that the tokenizer's model reads. `convert` rewrites the texts
    first (textual inversion turns one word into several). Where text is cut off, a warning names
    the words that were not read, unless `warn` is False.
    """
    with _tokenising:
        if convert is not None:
            texts = convert(texts)
        limit = length or tokenizer.model_max_length
        tokens = tokenizer(
            texts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
        )
        if warn:
            with _of_any_length(tokenizer):
                whole = tokenizer(texts).input_ids
            unread = [ids[limit - 1 : -1] for ids in whole if len(ids) > limit]
            if unread:
                words = [_begun(each) for each in tokenizer.batch_decode(unread)]
                logger.warning(
                    "CLIP reads at most %d tokens; this part of the prompt was cut off: %s",
                    limit,
                    words,
                )
    return tokens


def _begun(words: str) -> str:
    """Words as a warning names them: not all of a book."""
    return words if len(words) <= MOST_NAMED else f"{words[:MOST_NAMED]}…"


def encode(
    tokenizer: CLIPTokenizer | None,
    text_encoder: CLIPTextModel | None,
    texts: list[str],
    *,
    device: torch.device | str | None = None,
    length: int | None = None,
    clip_skip: int | None = None,
    convert: Convert | None = None,
) -> Tensor:
    """Text embeddings [len(texts), L, C]: the encoder's last hidden states, layer-normed.

    With `clip_skip=k` the states of k layers earlier are taken and go through the same final
    layer norm. Raises `UserError` where there is no text encoder, or it has fewer layers.
    """
    if tokenizer is None or text_encoder is None:
        raise UserError(NO_ENCODER)
    tokens = tokenise(tokenizer, texts, length=length, convert=convert)
    return asking(text_encoder, device, clip_skip)(tokens.input_ids, tokens.attention_mask)[0]


def encode_both(
    tokenizer: CLIPTokenizer | None,
    text_encoder: CLIPTextModel | None,
    prompts: list[str] | Tensor,
    negatives: list[str] | Tensor | None,
    *,
    device: torch.device | str | None = None,
    clip_skip: int | None = None,
    convert: Convert | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Embeddings [n, L, C] of prompts and of negative prompts, where there are any, by `encode`.

    Embeddings may stand for texts, and are given back. `clip_skip` concerns the prompts alone, as
    in stock pipelines; negative prompts are cut or padded to the prompts' tokens.
    """
    parts = tokenizer, text_encoder
    if not isinstance(prompts, Tensor):
        prompts = encode(*parts, prompts, device=device, clip_skip=clip_skip, convert=convert)
    if isinstance(negatives, list):
        length = prompts.shape[1]
        negatives = encode(*parts, negatives, device=device, length=length, convert=convert)
    return prompts, negatives


def words(
    tokenizer: CLIPTokenizer, texts: list[str], convert: Convert | None = None
) -> list[list[int]]:
    """The token ids of each text, however many, without start and end."""
    if not texts:
        return []
    with _tokenising, _of_any_length(tokenizer):
        converted = convert(texts) if convert is not None else texts
        return tokenizer(converted, add_special_tokens=False).input_ids


@contextmanager
def _of_any_length(tokenizer: CLIPTokenizer) -> Iterator[None]:
    """Within the block `tokenizer` does not warn of texts that are longer than its model reads."""
    said = tokenizer.deprecation_warnings
    quiet = {"sequence-length-is-longer-than-the-specified-maximum": True}
    tokenizer.deprecation_warnings = {**said, **quiet}
    try:
        yield
    finally:
        tokenizer.deprecation_warnings = said


def asking(
    text_encoder: CLIPTextModel,
    device: torch.device | str | None = None,
    clip_skip: int | None = None,
) -> Callable[[Tensor, Tensor], tuple[Tensor, None]]:
    """Token ids and attention mask [n, L] to what the encoder says, [n, L, C], as `encode` does.

    Nothing is pooled: Stable Diffusion 1.x and 2.x draw without. Raises `UserError` for a
    `clip_skip` that the encoder has not the layers for.
    """
    check_clip_skip(text_encoder, clip_skip)
    device = device if device is not None else text_encoder.device

    def ask(ids: Tensor, mask: Tensor) -> tuple[Tensor, None]:
        _check_known(text_encoder, ids)
        ids = ids.to(device)
        told = mask.to(device) if reads_mask(text_encoder) else None
        if clip_skip is None:
            return text_encoder(ids, attention_mask=told)[0], None
        states = text_encoder(ids, attention_mask=told, output_hidden_states=True).hidden_states
        # transformers moved the norm from `text_model` to the model itself in its fifth version.
        body = getattr(text_encoder, "text_model", text_encoder)
        return body.final_layer_norm(states[-(clip_skip + 1)]), None

    return ask


def asking_inner(
    text_encoder: CLIPTextModel | CLIPTextModelWithProjection,
    device: torch.device | str | None = None,
    clip_skip: int | None = None,
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]:
    """Token ids and attention mask [n, L] to what SDXL takes of one of its encoders.

    These are the last but one hidden states [n, L, C], or those of `clip_skip` layers earlier,
    without the final norm; and the pooled and projected answer [n, D] of an encoder that has a
    projection, else None. SDXL tells no encoder which tokens are padding.
    """
    device = device if device is not None else text_encoder.device

    def ask(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        _check_known(text_encoder, ids)
        said = text_encoder(ids.to(device), output_hidden_states=True)
        return said.hidden_states[-(2 + (clip_skip or 0))], getattr(said, "text_embeds", None)

    return ask


def reads_mask(text_encoder: CLIPTextModel) -> bool:
    """Whether a Stable Diffusion model's encoder is told which tokens are padding."""
    return bool(getattr(text_encoder.config, "use_attention_mask", False))


def check_reader(tokenizer: CLIPTokenizer | None, text_encoder: Any) -> None:
    """Raise `UserError` where a tokenizer gives what no text encoder, or not the one beside it, can
    read: texts of no told length or another one, or a padding that has no embedding."""
    if tokenizer is None:
        return
    length = tokenizer.model_max_length
    if isinstance(length, int | float) and length > LONGEST:
        raise UserError(
            "this model's tokenizer does not say how many tokens are read: set model_max_length in"
            " its tokenizer_config.json (77 is CLIP's)"
        )
    config = getattr(text_encoder, "config", None)
    most = getattr(config, "max_position_embeddings", LONGEST)
    if not isinstance(length, int) or not SHORTEST <= length <= most:
        upto = f" to {most}, which its text encoder reads" if most != LONGEST else ""
        raise UserError(
            f"this model's tokenizer_config.json says model_max_length={length!r}; it must be a"
            f" whole number from {SHORTEST}{upto} (77 is CLIP's)"
        )
    if config is None or tokenizer.pad_token_id is None:
        return
    rows = text_encoder.get_input_embeddings().num_embeddings
    if tokenizer.pad_token_id >= rows:
        raise UserError(
            f"this model's tokenizer fills texts up with {tokenizer.pad_token!r}, number"
            f" {tokenizer.pad_token_id}, and its text encoder knows {rows} tokens; mend pad_token"
            " in its tokenizer_config.json"
        )


def _check_known(text_encoder: Any, ids: Tensor) -> None:
    """Raise `UserError` for tokens that the encoder has no embedding for; those that are on a
    device already, as in training, are let be, as looking at them would wait for it."""
    rows = text_encoder.get_input_embeddings().num_embeddings
    if ids.device.type == "cpu" and int(ids.max()) >= rows:
        raise UserError(
            f"the tokenizer finds token number {int(ids.max())} in this prompt, and the text"
            f" encoder knows {rows} tokens: a word was added to one of them alone"
            " (load_textual_inversion teaches both)"
        )


def check_clip_skip(text_encoder: CLIPTextModel, clip_skip: int | None) -> None:
    """Raise `UserError` where `clip_skip` leaves out more layers than the encoder has."""
    layers = text_encoder.config.num_hidden_layers
    if clip_skip is not None and clip_skip > layers:
        raise UserError(f"clip_skip={clip_skip} is more than the text encoder's {layers} layers")


@contextmanager
def adapter_scale(model: torch.nn.Module | None, scale: float | None) -> Iterator[None]:
    """Within the block the adapter (LoRA) layers of `model` count `scale` times as much."""
    if model is None or not has_adapters(model):
        yield
        return
    with _scaling, scaling_kept(model):
        scale_lora_layers(model, 1.0 if scale is None else scale)
        yield


@contextmanager
def scaling_kept(model: torch.nn.Module) -> Iterator[None]:
    """After the block the adapter layers of `model` count as before, to the last bit. Diffusers
    divides by its scale instead, and after 0 forgets the weight with which they were attached."""
    every = [getattr(module, "scaling", None) for module in model.modules()]
    kept = [(scaling, {**scaling}) for scaling in every if isinstance(scaling, dict)]
    try:
        yield
    finally:
        for scaling, before in kept:
            scaling.update(before)


def has_adapters(model: torch.nn.Module) -> bool:
    """Whether PEFT adapter layers have been injected into `model`."""
    return bool(getattr(model, "peft_config", None))
