"""What stock takes besides: heard where it means something here, and never in the way.

Code that is written for stock pipelines goes on working. In loading, an argument that does nothing
here is let pass, one that would be missed is told once, and what would run code of others is
refused. A misspelt one stays a mistake. In a call, arguments without names may stand in the order
of stock's pipelines for pictures.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache, wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar

import diffusers
import numpy as np
from PIL.Image import Image
from torch import Tensor

from ldm_pipeline.errors import UserError
from ldm_pipeline.values import as_whole, shown

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

PICTURES = (Image, np.ndarray, Tensor, list, tuple)
"""What stock takes for a picture, and nobody for a height, a width or a strength."""

FROM_FOLDER: Any = object()
"""Stands for "take this from the folder", since None means "leave it out"."""

SETTINGS = (
    "requires_safety_checker",
    "add_watermarker",
    "force_zeros_for_empty_prompt",
    "requires_aesthetics_score",
)
"""Settings of one kind of pipeline or the other, which stock pipelines of the other ignore."""

OF_A_DOWNLOAD = ("cache_dir", "force_download", "local_files_only", "revision", "token")
"""How files are fetched: nothing to a file that is here."""

OF_READING = ("disable_mmap", "low_cpu_mem_usage")
"""How stock reads them."""

OF_OTHER_LOADERS = {
    "custom_revision": "no code of others is run",
    "dduf_file": "files in this format are not read; name a folder or a .safetensors file",
    "load_connected_pipeline": "there is one pipeline for every task",
    "mirror": "set HF_ENDPOINT to it",
    "output_loading_info": "what does not fit is an error",
    "provider": "ONNX models are not read",
    "provider_options": "ONNX models are not read",
    "proxies": "set HTTPS_PROXY",
    "quantization_config": "use pipe.arrange(Memory(quantise=…))",
    "resume_download": "downloads are always gone on with",
    "sess_options": "ONNX models are not read",
    "use_flashpack": "files in this format are not read",
    "use_onnx": "ONNX models are not read",
}
"""What stock loads with, or did once, and ours does not: what to do instead."""

NO_MISS = ("load_connected_pipeline", "resume_download")
"""Those of them whose wish is granted anyway."""

READ_FROM_THE_FILE = ("config", "original_config", "load_safety_checker")
"""What stock lets one say of a single file, and ours reads from it."""


def heard(kind: str, own: Collection[str], told: Mapping[str, Any]) -> dict[str, Any]:
    """What of `told` the constructor of the pipeline `kind` takes, whose names are `own`.

    Left out is what stands for the folder's own, a part that it has not and is not to have, and
    settings of another kind. Raises `UserError` for a part that it has not.
    """
    found = {}
    for name, value in told.items():
        if value is FROM_FOLDER:
            continue
        if name in own:
            found[name] = value
        elif name in SETTINGS:
            _say_unheard(kind, name, value)
        elif value is not None:
            raise UserError(f"{kind} has no {name}; leave it out")
    return found


def check_other_loaders(kind: str, told: Mapping[str, Any]) -> None:
    """Raise `UserError` for what `told` asks of a loader that ours cannot be, and `TypeError` for
    names that stock does not know, either; what says that it is not wanted is let pass."""
    for name, value in told.items():
        if name not in OF_OTHER_LOADERS:
            raise TypeError(f"{kind}.from_pretrained() got an unexpected keyword argument {name!r}")
        if value and name not in NO_MISS:
            why = OF_OTHER_LOADERS[name]
            raise UserError(f"{name}={value!r:.80} is not for {kind}: {why}; leave it out")


def of_a_file(kind: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """What of `told`, passed for a single file, is more than stock's ways to fetch and read one."""
    for name in READ_FROM_THE_FILE:
        _say_unheard(kind, name, told.get(name))
    check_safe(told.get("use_safetensors"))
    check_other_loaders(kind, {name: told[name] for name in OF_OTHER_LOADERS if name in told})
    passed = (
        *OF_A_DOWNLOAD,
        *OF_READING,
        *READ_FROM_THE_FILE,
        "use_safetensors",
        *OF_OTHER_LOADERS,
    )
    return {name: value for name, value in told.items() if name not in passed}


def check_safe(use_safetensors: bool | None) -> None:
    """Raise `UserError` where pickles are asked for."""
    if use_safetensors is False:
        raise UserError("use_safetensors=False is refused: a pickle can run any program")


def check_no_code(custom_pipeline: object, trust_remote_code: bool) -> None:
    """Raise `UserError` where code of others is to be run."""
    if custom_pipeline is not None:
        raise UserError(
            f"custom_pipeline={custom_pipeline!r} is refused: it runs code from elsewhere; leave it"
            " out, and ask the call for what it is wanted for (weighted=True reads long and"
            " weighted prompts), or give from_pipe the pipeline that stock opened with it"
        )
    if trust_remote_code:
        raise UserError(
            "trust_remote_code=True is refused: no code that comes with a model is run; leave it"
            " out, and take a model whose parts are of diffusers' and transformers' own classes"
        )


def in_stock_order(
    texts: int, redrawing: str, painting: str
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a pipeline's `__call__` also be told a picture behind its `texts` without a name, and the
    older `callback` with its `callback_steps`.

    There text-to-image has its height. All that stand without names then are those of the stock
    pipeline `redrawing`, or of `painting` where a second picture, the mask, follows at once; these
    are imported then, and not before.
    """

    def taught(call: Callable[P, R]) -> Callable[P, R]:
        anyhow: Any = call

        @wraps(call)
        def hearing(*told: P.args, **named: P.kwargs) -> R:
            picture, mask = (
                isinstance(each, PICTURES) for each in (*told, *[None] * 4)[1 + texts : 3 + texts]
            )
            asked = _with_older_callback(named)
            if not picture:
                plainly: R = anyhow(*told, **asked)
                return plainly
            order = signature(getattr(diffusers, painting if mask else redrawing).__call__)
            answer: R = anyhow(**order.bind_partial(*told).arguments, **asked)
            return answer

        return hearing

    return taught


def _with_older_callback(named: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call with `callback(step, timestep, latents)`, which stock still takes and
    calls in every `callback_steps`-th step, as one `callback_on_step_end`; that is every one here,
    where stock fails, if nobody says how many."""
    asked = dict(named)
    callback, every = asked.pop("callback", None), asked.pop("callback_steps", None)
    every = 1 if every is None else as_whole("callback_steps", every, 1)
    if callback is None:
        return asked
    if not callable(callback) or asked.get("callback_on_step_end") is not None:
        raise UserError(
            f"callback={shown(callback)} must be a function of (step, timestep, latents), and goes"
            " without callback_on_step_end, which has taken its place"
        )

    def on_step_end(_: Any, step: int, timestep: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
        if step % every == 0:
            callback(step, timestep, tensors["latents"])
        return {}

    latents = {"callback_on_step_end_tensor_inputs": ["latents"]}
    return {**asked, "callback_on_step_end": on_step_end, **latents}


def _say_unheard(kind: str, name: str, value: object) -> None:
    """Say of a setting that is on that it does nothing; that it is off is true here."""
    if value:
        _say(f"{name}={value!r} does nothing to {kind}")


@lru_cache(maxsize=64)
def _say(line: str) -> None:
    """Warn of it the first time."""
    logger.warning("%s", line)
