"""Every choice that a caller can make, checked once, at the door.

`Request` holds what was asked for under the names that Stable Diffusion pipelines use. Building
one checks it: a mistake raises `UserError`, one line that says what was passed, what is allowed
and what to do, before any model is loaded or called. Nothing here imports torch, so the command
refuses a bad argument at once; tensors and generators pass through as they are and only their
shapes are read.

Legend: n = number of images = prompts x images per prompt.
"""

from __future__ import annotations

import math
import operator
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from ldm_pipeline.errors import UserError, choose
from ldm_pipeline.values import (
    Text,
    as_number,
    as_shape,
    as_texts,
    as_whole,
    check_flag,
    check_levels,
    shown,
)

if TYPE_CHECKING:
    import torch

#: Written here, in `diffusion`.
NATIVE_SAMPLERS = ("ddim", "ddpm", "euler", "euler_a", "heun", "dpmpp_2m", "lcm")
#: Schedulers of diffusers, run through the adapter in `models/schedulers.py`.
STOCK_SAMPLERS = ("pndm", "unipc", "deis", "kdpm2", "kdpm2_a", "dpmpp_2s", "dpmpp_2m_sde", "tcd")
#: Those that consistency models draw with.
FEW_STEP_SAMPLERS = ("lcm", "tcd")
#: Those that hear `eta`.
ETA_SAMPLERS = ("ddim", "tcd")
#: Every name that `sampler=` accepts.
SAMPLER_NAMES = NATIVE_SAMPLERS + STOCK_SAMPLERS

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")
MASK_TENSORS = ("mask", "masked_image_latents")
#: Largest seed: torch takes 64 signed bits.
MAX_SEED = 2**63 - 1
#: Latents are an eighth of the picture on each side.
SIZE_STEP = 8
#: Far beyond what models draw well; more only fills the memory.
MAX_SIDE, MAX_PIXELS = 2**14, 2**26
#: Of one prompt; weeks of drawing.
MAX_IMAGES = 1_000_000
#: A thousand times what is used; far beyond it numbers overflow.
MAX_GUIDANCE = 10_000.0
#: Steps and guidance where nobody names them, with `lcm` and without.
LCM_STEPS, LCM_GUIDANCE = 4, 1.0
STEPS, GUIDANCE = 50, 7.5


@dataclass(frozen=True)
class Task:
    """What is drawn, told by which inputs are there.

    needs        the inputs that are there and make it this task
    takes        what may come besides, and is refused where the task is another
    strength     how much is drawn anew where the caller does not say, as stock pipelines have it
    tensors      what a callback may ask for
    """

    name: str
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    strength: float = 1.0
    tensors: tuple[str, ...] = CALLBACK_TENSORS


_REDRAWING = ("strength", "exact_steps")
TASKS = (
    Task("text-to-image"),
    Task("image-to-image", ("image",), _REDRAWING, strength=0.8),
    Task(
        "inpainting",
        ("image", "mask_image"),
        (*_REDRAWING, "masked_image_latents", "padding_mask_crop", "keep_unmasked"),
        tensors=CALLBACK_TENSORS + MASK_TENSORS,
    ),
)
"""The tasks of Stable Diffusion 1.x and 2.x."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """One request for pictures; the fields carry the names and defaults of a stock pipeline.

    Raises `UserError` (a `ValueError`) when a value or a combination cannot be drawn.

    prompt, negative_prompt     a text or a list of them; one negative text serves every prompt
    prompt_embeds, …            [prompts, tokens, channels], instead of the texts
    height, width               pixels, multiples of 8, up to 16384 a side and 2**26 together; None
                                is the model's own size
    num_inference_steps         at least 1; ignored when `timesteps` or `sigmas` are given
    timesteps, sigmas           custom noise levels, descending; at most one of the two
    guidance_scale              0 to 10,000; guidance is on above 1
    guidance_rescale            0 to 1 (Lin et al. 2305.08891, section 3.4)
    guidance_interval           (lo, hi): the fractions of the run between which guidance acts
    image                       a picture, an array [H, W, 3] or a tensor [3, H, W] in [0, 1], a
                                list or a batch of them, or latents; dealt out to the images in turn
    mask_image                  the same with one channel: white (1) is painted, black (0) stays
    strength                    above 0, up to 1: how much of the picture is drawn anew; of
                                num_inference_steps that share is run, and one step at least
    exact_steps                 run all num_inference_steps within that share
    padding_mask_crop           draw only a part of the picture, enlarged: the mask with this
                                many pixels around it
    masked_image_latents        for UNets of 9 channels: what stays, encoded already
    keep_unmasked               put every pixel where the mask is black back as it was
    ip_adapter_image            a picture, or a list of pictures for each IP-Adapter
    ip_adapter_image_embeds     what `prepare_ip_adapter_image_embeds` made of them
    seed                        a number (image i is drawn with seed + i) or a list, one per image
    generator                   a torch.Generator, or a list with one per image
    sampler                     one of `SAMPLER_NAMES`; None is the pipeline's own scheduler
    eta                         0 to 1, the share of fresh noise: of `ETA_SAMPLERS`, and of the
                                pipeline's own scheduler where it knows it; TCD's gamma (2402.19159,
                                alg. 4). None is 0, and 0.3 of "tcd"
    clip_skip                   number of the text encoder's last layers to leave out
    output_type                 one of `OUTPUT_TYPES`
    lcm                         the file of an LCM adapter to draw with, in few steps; True is the
                                one known for this model: the bundled model's own, or the published
                                LCM-LoRA of Stable Diffusion 1.x and SDXL; a full LCM needs none
    weighted                    whether prompts are read with weights and BREAK, at any length
    """

    prompt: Text | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = STEPS
    timesteps: Sequence[int] | None = None
    sigmas: Sequence[float] | None = None
    guidance_scale: float = GUIDANCE
    negative_prompt: Text | None = None
    num_images_per_prompt: int = 1
    eta: float | None = None
    generator: torch.Generator | Sequence[torch.Generator] | None = None
    latents: torch.Tensor | None = None
    image: Any = None
    mask_image: Any = None
    masked_image_latents: torch.Tensor | None = None
    strength: float | None = None
    exact_steps: bool = False
    padding_mask_crop: int | None = None
    keep_unmasked: bool = False
    ip_adapter_image: Any = None
    ip_adapter_image_embeds: Sequence[torch.Tensor] | None = None
    prompt_embeds: torch.Tensor | None = None
    negative_prompt_embeds: torch.Tensor | None = None
    output_type: str = "pil"
    cross_attention_kwargs: Mapping[str, Any] | None = None
    guidance_rescale: float = 0.0
    clip_skip: int | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)
    sampler: str | None = None
    seed: int | Sequence[int] | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    lcm: bool | str | os.PathLike[str] = False
    weighted: bool = False

    tasks: ClassVar[tuple[Task, ...]] = TASKS
    """Every task; which of the inputs that any of them needs are there decides between them."""

    def __post_init__(self) -> None:
        for name in ("weighted", "exact_steps", "keep_unmasked"):
            check_flag(name, getattr(self, name))
        self._check_words()
        self._check_numbers()
        self._check_randomness()
        self._check_pictures()
        told = self.cross_attention_kwargs
        if told is not None and not isinstance(told, Mapping):
            raise UserError(
                f"cross_attention_kwargs={shown(told)} must be a dictionary, as {{'scale': 0.8}}"
            )
        if told is not None and "scale" in told:
            as_number("cross_attention_kwargs: scale", told["scale"], -math.inf, math.inf)
        if self.sampler is not None:
            choose("sampler", self.sampler, SAMPLER_NAMES)
        if not isinstance(self.lcm, bool | str | os.PathLike):
            raise UserError(f"lcm={shown(self.lcm)} must be True, False or the path of an adapter")
        if self.lcm == "":
            raise UserError("lcm='' names no file; pass True, False or the path of an adapter")
        if self.lcm and self.sampler not in (None, *FEW_STEP_SAMPLERS):
            raise UserError(
                f"sampler={self.sampler!r} does not go with lcm; leave it out, or choose one of"
                f" {', '.join(FEW_STEP_SAMPLERS)}"
            )
        if self.eta and self.sampler_name not in (None, *ETA_SAMPLERS):
            raise UserError(
                f"eta={self.eta!r} does nothing with sampler={self.sampler_name!r}; leave it out,"
                f" or choose one of {', '.join(ETA_SAMPLERS)}"
            )
        choose("output_type", self.output_type, OUTPUT_TYPES)
        names = self.callback_on_step_end_tensor_inputs
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise UserError(
                f"callback_on_step_end_tensor_inputs={shown(names)} must be a list of names, as"
                " ['latents']"
            )
        for name in names:
            choose("callback_on_step_end_tensor_inputs", name, self.task.tensors)

    # What the rest of the package reads -----------------------------------------------------

    @cached_property
    def task(self) -> Task:
        """The task that the inputs ask for; `UserError` where they fit none."""
        deciding = {name for task in self.tasks for name in task.needs}
        there = {name for name in deciding if _is_there(getattr(self, name))}
        for task in self.tasks:
            if there == set(task.needs):
                return task
        raise UserError(
            f"{', '.join(sorted(there))} alone cannot be drawn from; pass"
            f" {' or '.join(' and '.join(task.needs) for task in self.tasks if task.needs)}"
        )

    @property
    def share(self) -> float:
        """The share of the noise levels that is run: `strength`, or the task's own."""
        return self.task.strength if self.strength is None else self.strength

    @property
    def paints(self) -> bool:
        """Whether only a part of a picture is drawn."""
        return self.mask_image is not None

    @property
    def begins_at_noise(self) -> bool:
        """Whether the run starts at pure noise: without a picture, and in inpainting at strength 1
        or where `latents` say where to start."""
        if self.image is None:
            return True
        return self.paints and (self.share == 1 or self.latents is not None)

    @property
    def sampler_name(self) -> str | None:
        """The sampler to draw with, that of few steps where they are asked for."""
        return "lcm" if self.lcm and self.sampler is None else self.sampler

    @cached_property
    def prompts(self) -> list[str]:
        """The prompts as a list; empty when embeddings were passed."""
        return as_texts("prompt", self.prompt)

    @cached_property
    def negative_prompts(self) -> list[str] | None:
        """One negative prompt per prompt, or None where none was given."""
        if self.negative_prompt is None:
            return None
        texts = as_texts("negative_prompt", self.negative_prompt)
        return texts * self.prompt_count if len(texts) == 1 else texts

    @property
    def prompt_count(self) -> int:
        """How many prompts there are, as texts or as embeddings."""
        return len(self.prompts) if self.prompt_embeds is None else int(self.prompt_embeds.shape[0])

    @property
    def image_count(self) -> int:
        """How many images will be drawn: prompts x images per prompt."""
        return self.prompt_count * self.num_images_per_prompt

    @property
    def seeds(self) -> tuple[int, ...] | None:
        """One seed per image, or None where no seed was given."""
        if self.seed is None:
            return None
        if isinstance(self.seed, Sequence):
            return tuple(operator.index(s) for s in self.seed)
        first = operator.index(self.seed)
        return tuple(range(first, first + self.image_count))

    # The checks -----------------------------------------------------------------------------

    def _check_words(self) -> None:
        """Exactly one source of words, in matching numbers."""
        if self.prompt is None and self.prompt_embeds is None:
            raise UserError("nothing to draw: pass prompt or prompt_embeds")
        for name, text, embeds in (
            ("prompt", self.prompt, self.prompt_embeds),
            ("negative_prompt", self.negative_prompt, self.negative_prompt_embeds),
        ):
            if text is not None and embeds is not None:
                raise UserError(f"{name} and {name}_embeds were both passed; pass only one of them")
            shape = (1, 1, 1) if embeds is None else as_shape(name + "_embeds", embeds)
            if len(shape) != 3 or 0 in shape:
                raise UserError(
                    f"{name}_embeds has shape {shape};"
                    " it must be [prompts, tokens, channels], as encode_prompt returns it"
                )
        if self.prompt is not None:
            as_texts("prompt", self.prompt)
        negatives = self.negative_prompts
        if negatives is not None and len(negatives) != self.prompt_count:
            raise UserError(
                f"negative_prompt has {len(negatives)} texts for {self.prompt_count} prompts;"
                " pass one text for all, or one for each prompt"
            )
        given = self.negative_prompt_embeds
        if given is not None and given.shape[0] != self.prompt_count:
            raise UserError(
                f"negative_prompt_embeds has {given.shape[0]} rows for {self.prompt_count} prompts;"
                " pass one row for each prompt"
            )
        ours = self.prompt_embeds
        if ours is not None and given is not None and ours.shape != given.shape:
            raise UserError(
                f"prompt_embeds has shape {tuple(ours.shape)} and negative_prompt_embeds"
                f" {tuple(given.shape)}; they must be the same"
            )

    def _check_numbers(self) -> None:
        """Sizes, counts and strengths within their ranges."""
        for name in ("height", "width"):
            size = getattr(self, name)
            if size is not None and as_whole(name, size, 1) % SIZE_STEP:
                near = max(SIZE_STEP, round(size / SIZE_STEP) * SIZE_STEP)
                raise UserError(
                    f"{name}={size} is not a multiple of {SIZE_STEP}; the nearest is {near}"
                )
            if size is not None and size > MAX_SIDE:
                raise UserError(f"{name}={size} is too large; a side has {MAX_SIDE} pixels at most")
        if self.height and self.width and self.height * self.width > MAX_PIXELS:
            raise UserError(
                f"height={self.height} is too much with width={self.width}; a picture has"
                f" {MAX_PIXELS} pixels at most, such as 8192x8192"
            )
        if self.timesteps is not None and self.sigmas is not None:
            raise UserError("timesteps and sigmas were both passed; pass only one of them")
        for name in ("timesteps", "sigmas"):
            levels = getattr(self, name)
            if levels is not None:
                check_levels(name, levels)
        if self.timesteps is None and self.sigmas is None:
            as_whole("num_inference_steps", self.num_inference_steps, 1)
        if as_whole("num_images_per_prompt", self.num_images_per_prompt, 1) > MAX_IMAGES:
            raise UserError(
                f"num_images_per_prompt={self.num_images_per_prompt} is too large; at most"
                f" {MAX_IMAGES} pictures are drawn of a prompt"
            )
        if self.clip_skip is not None:
            as_whole("clip_skip", self.clip_skip, 0)
        as_number("guidance_scale", self.guidance_scale, 0.0, MAX_GUIDANCE)
        as_number("guidance_rescale", self.guidance_rescale, 0.0, 1.0)
        if self.eta is not None:
            as_number("eta", self.eta, 0.0, 1.0)
        self._check_interval()

    def _check_interval(self) -> None:
        interval = self.guidance_interval
        if not isinstance(interval, Sequence) or len(interval) != 2:
            raise UserError(
                f"guidance_interval={shown(interval)} must be two fractions of the run,"
                " such as (0.2, 0.8)"
            )
        lo, hi = (as_number("guidance_interval", end, 0.0, 1.0) for end in interval)
        if lo >= hi:
            raise UserError(
                f"guidance_interval={interval!r} is empty; the first must be below the second"
            )

    def _check_randomness(self) -> None:
        """One source of randomness, in a number that fits the images."""
        if self.seed is not None and self.generator is not None:
            raise UserError("seed and generator were both passed; pass only one of them")
        if self.seed is not None:
            told = self.seed if isinstance(self.seed, list | tuple | range) else [self.seed]
            try:
                seeds = [as_whole("seed", seed, 0) for seed in told]
            except UserError as error:
                raise UserError(f"{error}, or a list of them, one per image") from None
            if max(seeds, default=0) > MAX_SEED - self.image_count:
                raise UserError(f"seed={max(seeds)} is too large; it must be below 2**63")
        if self.generator is not None:
            given = self.generator
            for generator in given if isinstance(given, Sequence) else [given]:
                torch = sys.modules.get("torch")  # where there is a generator, it was imported
                if torch is None or not isinstance(generator, torch.Generator):
                    raise UserError(
                        f"generator={shown(generator)} must be a torch.Generator, or a list with"
                        " one per image; a number is passed as seed"
                    )
        for name, one_each in (("seed", self.seed), ("generator", self.generator)):
            if isinstance(one_each, Sequence) and len(one_each) != self.image_count:
                raise UserError(
                    f"{name} has {len(one_each)} entries for {self.image_count} images"
                    f" ({self.prompt_count} prompts x {self.num_images_per_prompt});"
                    " pass one per image"
                )
        if self.latents is not None:
            shape = as_shape("latents", self.latents)
            if len(shape) != 4 or shape[0] != self.image_count or 0 in shape:
                raise UserError(
                    f"latents has shape {shape}; it must be [{self.image_count}, channels,"
                    " height/8, width/8], one per image"
                )

    def _check_pictures(self) -> None:
        """Inputs that make a task together, and pictures that are pictures."""
        for name in (name for task in self.tasks for name in task.takes):
            if _is_there(getattr(self, name)) and name not in self.task.takes:
                takers = [task for task in self.tasks if name in task.takes]
                raise UserError(
                    f"{name} is for {' and '.join(task.name for task in takers)}; pass"
                    f" {' or '.join(' and '.join(task.needs) for task in takers)} with it, or leave"
                    " it out"
                )
        for name in ("image", "mask_image", "ip_adapter_image"):
            given = getattr(self, name)
            if isinstance(given, str | os.PathLike):
                raise UserError(
                    f"{name}={given!r} is a name; open the picture first, as in"
                    " PIL.Image.open(name)"
                )
            if isinstance(given, list | tuple) and not given:
                raise UserError(f"{name} is an empty list; pass at least one picture")
        if self.strength is not None and as_number("strength", self.strength, 0.0, 1.0) == 0:
            raise UserError(f"strength={self.strength!r} would draw nothing; pass more than 0")
        if self.padding_mask_crop is not None:
            as_whole("padding_mask_crop", self.padding_mask_crop, 0)
            if self.output_type != "pil":
                raise UserError(
                    f"padding_mask_crop gives pictures, not output_type={self.output_type!r}; pass"
                    " output_type='pil'"
                )
        if self.keep_unmasked and self.output_type == "latent":
            raise UserError("keep_unmasked keeps pixels, and output_type='latent' has none")
        if self.ip_adapter_image is not None and self.ip_adapter_image_embeds is not None:
            raise UserError(
                "ip_adapter_image and ip_adapter_image_embeds were both passed; pass only one"
            )


def _is_there(value: Any) -> bool:
    """Whether a choice was made: anything but None and False."""
    return value is not None and value is not False
