"""What can be asked of an SDXL pipeline besides: a second text, sizes, and a part of the run.

As in `request.py`, building one checks it, and nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from ldm_pipeline.errors import UserError
from ldm_pipeline.request import (
    CALLBACK_TENSORS,
    TASKS,
    Request,
    Task,
)
from ldm_pipeline.values import Text, as_number, as_shape, as_texts, as_whole, shown

if TYPE_CHECKING:
    import torch

XL_GUIDANCE, XL_PAINTING_GUIDANCE = 5.0, 7.5
"""Guidance where nobody names it, and where a part of a picture is painted."""

XL_CALLBACK_TENSORS = ("latents", "prompt_embeds", "add_text_embeds", "add_time_ids")

XL_STRENGTHS = {"text-to-image": 1.0, "image-to-image": 0.3, "inpainting": 0.9999}

XL_TASKS = tuple(
    replace(
        task,
        strength=XL_STRENGTHS[task.name],
        tensors=XL_CALLBACK_TENSORS + task.tensors[len(CALLBACK_TENSORS) :],
    )
    for task in TASKS
)
"""The tasks of SDXL: the same, with what its stock pipelines have."""

Pair = tuple[int, int]


@dataclass(frozen=True, eq=False, kw_only=True)
class RequestXL(Request):
    """One request to an SDXL pipeline; the fields are `Request`'s and these.

    prompt_2, negative_prompt_2     what the second text encoder reads; None is the same text
    pooled_prompt_embeds, …         [prompts, D], with prompt_embeds and with negative_prompt_embeds
    original_size, target_size      (height, width) told of the picture; None is that of the request
    crops_coords_top_left           (top, left) told of it
    negative_original_size, …       the same for the negative half, where both sizes are given
    denoising_end                   in (0, 1]: end the run at this fraction of the noise levels
    denoising_start                 in (0, 1): go on there, from `latents` of a run that ended so,
                                    or from `image`, which then gets no noise
    latents                         with an `image` that is drawn anew as a whole: start at these
    aesthetic_score, …              told to refiners in place of the target size
    """

    prompt_2: Text | None = None
    negative_prompt_2: Text | None = None
    pooled_prompt_embeds: torch.Tensor | None = None
    negative_pooled_prompt_embeds: torch.Tensor | None = None
    original_size: Pair | None = None
    crops_coords_top_left: Pair = (0, 0)
    target_size: Pair | None = None
    negative_original_size: Pair | None = None
    negative_crops_coords_top_left: Pair = (0, 0)
    negative_target_size: Pair | None = None
    denoising_end: float | None = None
    denoising_start: float | None = None
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5

    tasks: ClassVar[tuple[Task, ...]] = XL_TASKS

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_second_words()
        self._check_pooled()
        self._check_sizes()
        self._check_part()

    @cached_property
    def prompts_2(self) -> list[str]:
        """The second encoder's prompts, one for each prompt; empty when embeddings were passed."""
        return as_texts("prompt_2", self.prompt_2) or self.prompts

    @cached_property
    def negative_prompts_2(self) -> list[str] | None:
        """Its negative prompts, or None where none was given."""
        if self.negative_prompt_2 is None:
            return self.negative_prompts
        texts = as_texts("negative_prompt_2", self.negative_prompt_2)
        return texts * self.prompt_count if len(texts) == 1 else texts

    @property
    def share(self) -> float:
        """The share of the noise levels that is run; `denoising_start` takes its place."""
        return super().share if self.denoising_start is None else 1.0

    @property
    def begins_at_noise(self) -> bool:
        """Whether the run starts at pure noise; not where it goes on with a picture."""
        return super().begins_at_noise and (self.denoising_start is None or self.image is None)

    def _check_second_words(self) -> None:
        """As many texts for the second encoder as for the first, and none beside embeddings."""
        for name, text, embeds in (
            ("prompt_2", self.prompt_2, self.prompt_embeds),
            ("negative_prompt_2", self.negative_prompt_2, self.negative_prompt_embeds),
        ):
            if text is not None and embeds is not None:
                other = name.replace("_2", "_embeds")
                raise UserError(f"{name} and {other} were both passed; pass only one of them")
        for name, texts in (
            ("prompt_2", self.prompts_2),
            ("negative_prompt_2", self.negative_prompts_2),
        ):
            if texts and len(texts) != self.prompt_count:
                raise UserError(
                    f"{name} has {len(texts)} texts for {self.prompt_count} prompts; pass one for"
                    " each prompt"
                )

    def _check_pooled(self) -> None:
        """Embeddings come with their pooled ones: neither can be made from the other."""
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            embeds, pooled = getattr(self, name), getattr(self, _pooled(name))
            if (embeds is None) != (pooled is None):
                raise UserError(
                    f"{name} and {_pooled(name)} belong together; pass both, as encode_prompt"
                    " returns them"
                )
            if pooled is not None:
                shape = as_shape(_pooled(name), pooled)
                if len(shape) != 2 or shape[0] != embeds.shape[0]:
                    raise UserError(
                        f"{_pooled(name)} has shape {shape}; it must be [{embeds.shape[0]},"
                        " channels], a row for each prompt"
                    )

    def _check_sizes(self) -> None:
        """Sizes and corners are two whole numbers each."""
        for name in (
            "original_size",
            "target_size",
            "negative_original_size",
            "negative_target_size",
            "crops_coords_top_left",
            "negative_crops_coords_top_left",
        ):
            pair = getattr(self, name)
            if pair is None:
                continue
            if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
                raise UserError(
                    f"{name}={shown(pair)} must be two whole numbers, as in (1024, 1024)"
                )
            for number in pair:
                as_whole(name, number, 0)

    def _check_part(self) -> None:
        """The part of the run that is asked for is there, and can begin where it begins."""
        for name in ("denoising_start", "denoising_end"):
            value = getattr(self, name)
            whole = name == "denoising_end" and value == 1
            if value is not None and not (0 < as_number(name, value, 0.0, 1.0) < 1 or whole):
                raise UserError(f"{name}={value!r} must lie between 0 and 1; None is the whole run")
        for name in ("aesthetic_score", "negative_aesthetic_score"):
            as_number(name, getattr(self, name), 0.0, 10.0)
        start, end = self.denoising_start, self.denoising_end
        if start is not None and end is not None and start >= end:
            raise UserError(f"denoising_start={start!r} must lie below denoising_end={end!r}")
        if start is not None and self.latents is None and self.image is None:
            raise UserError(
                "denoising_start goes on from latents; pass those of a run that had"
                f" denoising_end={start!r} and output_type='latent'"
            )


def _pooled(name: str) -> str:
    return name.replace("prompt_embeds", "pooled_prompt_embeds")
