"""What a pipeline remembers while it draws, kept off the pipeline.

Stable Diffusion pipelines keep the values of a run on themselves, so two runs at once spoil each
other. Here each run has its own `Run`, and the attributes that callbacks read and write
(`guidance_scale`, `_interrupt`, …) are views of the run of the calling thread.

Legend: B = images of the run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from ldm_pipeline.diffusion import loop
from ldm_pipeline.diffusion.denoiser import Guidance
from ldm_pipeline.errors import UserError
from ldm_pipeline.request import MASK_TENSORS
from ldm_pipeline.values import shown

Callback = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any] | None]
"""callback(pipeline, i, timestep, tensors) -> those of the tensors that it changed."""


@dataclass(eq=False)
class Run:
    """The values of one run that may change while it runs; equal to itself alone.

    `prompt_embeds` is [B, L, C], or [2B, L, C] with the negative half first where the run began
    with guidance, and so are `mask` [., 1, h, w], `masked_image_latents` [., C, h, w] and
    `image_embeds`, one tensor for each IP-Adapter; so are `add_text_embeds` [., D] and
    `add_time_ids` [., 6], which SDXL is told besides. `steerable` is False for UNets that take
    guidance as an input (guided LCM). `scheduler` is the stock one that takes the steps, while a
    callback is called.
    """

    guidance_scale: float = 7.5
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    clip_skip: int | None = None
    cross_attention_kwargs: Mapping[str, Any] | None = None
    steerable: bool = True
    interrupt: bool = False
    num_timesteps: int = 0
    steps_done: int = 0
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    mask: Tensor | None = None
    masked_image_latents: Tensor | None = None
    image_embeds: Sequence[Tensor] | None = None
    add_text_embeds: Tensor | None = None
    add_time_ids: Tensor | None = None
    denoising_start: float | None = None
    denoising_end: float | None = None
    scheduler: Any = None

    @property
    def guides(self) -> bool:
        """Whether classifier-free guidance is on."""
        return self.guidance_scale > 1 and self.steerable

    def guidance(self) -> Guidance:
        """The guidance of the step at hand; scale 1, which is none, outside the interval."""
        low, high = self.guidance_interval
        inside = low <= self.steps_done / max(self.num_timesteps, 1) < high
        scale = self.guidance_scale if self.guides and inside else 1.0
        return Guidance(scale, self.guidance_rescale)

    def embeds_for(self, rows: int) -> Tensor:
        """The embeddings for a batch of `rows`: both halves, or the prompted one."""
        assert self.prompt_embeds is not None
        if self.prompt_embeds.shape[0] < rows:
            raise UserError(
                f"the UNet needs {rows} rows of prompt_embeds and has"
                f" {self.prompt_embeds.shape[0]}: guidance was turned on during a run that began"
                " without it, or a callback returned fewer rows"
            )
        return self.prompt_embeds[-rows:]

    def beside(self, rows: int) -> Tensor | None:
        """What an inpainting UNet reads beside a batch of `rows`: [rows, 1 + C, h, w]."""
        if self.mask is None or self.masked_image_latents is None:
            return None
        return torch.cat([self.mask, self.masked_image_latents], dim=1)[:rows]

    def added(self, rows: int) -> dict[str, Any] | None:
        """What the UNet is told besides for a batch of `rows`, under its names: what IP-Adapters
        read of pictures, and SDXL's pooled answer and sizes."""
        told: dict[str, Any] = {}
        if self.image_embeds is not None:
            told["image_embeds"] = [embeds[-rows:] for embeds in self.image_embeds]
        if self.add_text_embeds is not None and self.add_time_ids is not None:
            told["text_embeds"] = self.add_text_embeds[-rows:]
            told["time_ids"] = self.add_time_ids[-rows:]
        return told or None

    @property
    def adapter_scale(self) -> float | None:
        """The factor on adapter layers that the caller asked for, or None."""
        return (self.cross_attention_kwargs or {}).get("scale")


def tensors_for(
    callback: Any, names: Sequence[str] | None, every: Sequence[str], paints: bool
) -> Sequence[str]:
    """The tensors that a callback is handed: `names`, or those that one of diffusers' own wants.

    None are no names, as stock pipelines take it where there is no callback. Who asks for `every`
    one that a pipeline has gets those that there are: without painting (`paints`) none of a mask.
    Raises `UserError` for a callback that cannot be called.
    """
    if callback is not None and not callable(callback):
        raise UserError(
            f"callback_on_step_end={shown(callback)} must be a function of (pipeline, step,"
            " timestep, tensors)"
        )
    own = isinstance(callback, PipelineCallback | MultiPipelineCallbacks)
    listed = list(names) if isinstance(names, list | tuple) else None  # else it is refused later
    if not own and not paints and listed == list(every):
        return [name for name in every if name not in MASK_TENSORS]
    return callback.tensor_inputs if own else names if names is not None else ()


def halves(negative: Tensor | None, prompted: Tensor) -> Tensor:
    """Both halves of a guided batch in one tensor [2B, …], the negative one first."""
    assert negative is not None
    return torch.cat([negative, prompted])


def watcher(
    pipeline: Any,
    run: Run,
    callback: Callback | None,
    names: Sequence[str],
    bar: Any,
    scheduler: Any = None,
) -> loop.Watch:
    """What happens after every step: the caller's callback, the progress bar, an interrupt.

    The callback is handed the tensors in `names`; those that it gives back take their place. It
    sees as the pipeline's `scheduler` the stock one that takes the steps, if there is one.
    """

    def watch(i: int, t: float, s: float, x: Tensor) -> Tensor | loop.Stop:
        if callback is not None:
            timestep = torch.tensor(int(t) if t.is_integer() else t)
            passed = {name: x if name == "latents" else getattr(run, name) for name in names}
            run.scheduler = scheduler
            try:
                changed = _returned(callback(pipeline, i, timestep, passed))
            finally:
                run.scheduler = None
            x = _like(x, changed.get("latents", x))
            for name in pipeline._callback_tensor_inputs[1:]:
                setattr(run, name, changed.get(name, getattr(run, name)))
        run.steps_done = i + 1
        bar.update()
        return loop.Stop(x) if run.interrupt else x

    return watch


def _returned(changed: Any) -> Mapping[str, Any]:
    """What a callback gave back; `UserError` unless that is a dictionary or nothing."""
    if changed is None:
        return {}
    if not isinstance(changed, Mapping):
        raise UserError(
            f"callback_on_step_end returned a {type(changed).__name__}; it must return a dictionary"
            " of tensors, such as {'latents': latents}, or nothing"
        )
    return changed


def _like(x: Tensor, changed: Any) -> Tensor:
    """The latents of a callback in place of `x`; `UserError` for those of another shape."""
    if not isinstance(changed, Tensor) or changed.shape != x.shape:
        shape = tuple(getattr(changed, "shape", ()))
        raise UserError(
            f"callback_on_step_end returned latents of shape {shape}; they must stay"
            f" {tuple(x.shape)}"
        )
    return changed


_this_thread = threading.local()
_lock = threading.Lock()
_under_way: WeakKeyDictionary[object, list[Run]] = WeakKeyDictionary()


def _runs_of_this_thread() -> WeakKeyDictionary[object, Run]:
    if not hasattr(_this_thread, "runs"):
        _this_thread.runs = WeakKeyDictionary()
    return _this_thread.runs


def run_of(pipeline: object) -> Run:
    """The run of `pipeline` in this thread: the one under way, else the last, else defaults."""
    return _runs_of_this_thread().setdefault(pipeline, Run())


@contextmanager
def under_way(pipeline: object, run: Run) -> Iterator[Run]:
    """Within the block, `run` is this thread's run of `pipeline`; a run may start another."""
    runs = _runs_of_this_thread()
    outer = runs.get(pipeline)
    runs[pipeline] = run
    with _lock:
        around = outer is not None and outer in _under_way.get(pipeline, [])
        _under_way.setdefault(pipeline, []).append(run)
    try:
        yield run
    finally:
        with _lock:
            _under_way[pipeline] = [each for each in _under_way[pipeline] if each is not run]
        if around and outer is not None:
            runs[pipeline] = outer


def stop(pipeline: object, value: bool) -> None:
    """Stop this thread's run; from a thread that has none under way, all runs of `pipeline`."""
    own = run_of(pipeline)
    with _lock:
        every = _under_way.get(pipeline, [])
        for run in [own] if any(each is own for each in every) else [own, *every]:
            run.interrupt = value


class LiveValues:
    """The names under which stock pipelines show, and let callbacks change, a run's values."""

    @property
    def scheduler(self) -> Any:
        """The pipeline's scheduler; in a callback the copy of it that takes the run's steps."""
        taking = run_of(self).scheduler
        if taking is not None:
            return taking
        if "scheduler" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no scheduler yet")
        return self.__dict__["scheduler"]

    @scheduler.setter
    def scheduler(self, value: Any) -> None:
        self.__dict__["scheduler"] = value

    @property
    def guidance_scale(self) -> float:
        """How strongly the prompt pulls."""
        return run_of(self).guidance_scale

    @property
    def _guidance_scale(self) -> float:
        return run_of(self).guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, value: float) -> None:
        run_of(self).guidance_scale = value

    @property
    def guidance_rescale(self) -> float:
        """How much of the guided answer's contrast is set back."""
        return run_of(self).guidance_rescale

    @property
    def _guidance_rescale(self) -> float:
        return run_of(self).guidance_rescale

    @_guidance_rescale.setter
    def _guidance_rescale(self, value: float) -> None:
        run_of(self).guidance_rescale = value

    @property
    def clip_skip(self) -> int | None:
        """How many of the text encoder's last layers were left out."""
        return run_of(self).clip_skip

    @property
    def denoising_start(self) -> float | None:
        """The fraction of the noise levels that was run before, by another model (SDXL)."""
        return run_of(self).denoising_start

    @property
    def denoising_end(self) -> float | None:
        """The fraction of the noise levels after which the run ends (SDXL)."""
        return run_of(self).denoising_end

    @property
    def cross_attention_kwargs(self) -> Mapping[str, Any] | None:
        """What the attention layers were given."""
        return run_of(self).cross_attention_kwargs

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether guidance is on."""
        return run_of(self).guides

    @property
    def num_timesteps(self) -> int:
        """How many steps the run has."""
        return run_of(self).num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the run was told to stop."""
        return run_of(self).interrupt

    @property
    def _interrupt(self) -> bool:
        return run_of(self).interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        stop(self, value)
