"""Every attention draws the same pictures, and what cannot run is replaced and said.

arranged   a tiny pipeline of its own, drawn with in a given attention
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models import attention_processor
from diffusers.models.attention_processor import Attention, XFormersAttnProcessor
from torch import Tensor

from ldm_pipeline import LatentDiffusionPipeline, LatentDiffusionXLPipeline, Memory
from ldm_pipeline.errors import UserError
from ldm_pipeline.models.attention import resolve
from tests.parity.pairs import seeded

Build = Callable[..., dict[str, Any]]


@pytest.fixture(params=["sd", "sdxl"])
def pipe(request: pytest.FixtureRequest, tiny: Build, tiny_xl: Build) -> LatentDiffusionPipeline:
    """A tiny pipeline of each shape, of its own."""
    if request.param == "sdxl":
        return LatentDiffusionXLPipeline(**tiny_xl(), add_watermarker=False)
    return LatentDiffusionPipeline(**tiny())


def latents(pipe: Any) -> Tensor:
    """Clean latents of two pictures."""
    pipe.set_progress_bar_config(disable=True)
    told = {"num_inference_steps": 2, "output_type": "latent"}
    drawn: Tensor = pipe(["a red star", "two boats"], generator=seeded(1, 2), **told).images
    return drawn.float()


def used(pipe: Any) -> set[str]:
    """The names of the processors of the UNet's attention layers."""
    layers = [layer for layer in pipe.unet.modules() if isinstance(layer, Attention)]
    assert layers
    return {type(layer.processor).__name__ for layer in layers}


def fake(answer: Callable[..., Tensor]) -> Any:
    """A module in place of xformers, and the calls of its attention."""
    calls: list[torch.Size] = []

    def attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        calls.append(q.shape)
        return answer(q, k, v)

    ops = SimpleNamespace(memory_efficient_attention=attention)
    return SimpleNamespace(ops=ops, calls=calls)


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as it is defined, [B, N, d]."""
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v


def unable(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise NotImplementedError("No operator found for `memory_efficient_attention_forward`:\n     q")


def test_pictures_stay(pipe: Any) -> None:
    """1e-4 is float32's other order of summing, over 2 steps of guidance."""
    plain = latents(pipe)
    assert torch.equal(latents(pipe.arrange(Memory())), plain)
    assert torch.equal(latents(pipe.arrange(Memory(attention="sdpa"))), plain)
    assert (latents(pipe.arrange(Memory(attention="sliced"))) - plain).abs().max() <= 1e-4
    assert used(pipe) == {"SlicedAttnProcessor"}
    assert torch.equal(latents(pipe.arrange(Memory(attention="sdpa"))), plain)
    assert used(pipe) == {"AttnProcessor2_0"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_attention_is_less_exact_in_half_precision(pipe: Any, dtype: torch.dtype) -> None:
    """Measured against float32: the root of the mean square of what the rounding does."""
    whole = latents(pipe)
    pipe.to(dtype)

    def error(attention: str) -> float:
        drawn = latents(pipe.arrange(Memory(attention=attention)))
        return float((drawn - whole).square().mean().sqrt())

    assert 0 < error("sliced") <= 1.5 * error("sdpa")


def test_slices_are_those_of_stock(pipe: Any) -> None:
    sliced = latents(pipe.arrange(Memory(attention="sliced")))
    pipe.arrange(Memory(attention="sdpa")).enable_attention_slicing("max")
    assert torch.equal(latents(pipe), sliced)


def test_a_name_that_is_not_known_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"attention='slicd' is not known; .*mean 'sliced'"):
        Memory(attention="slicd")


# xformers -----------------------------------------------------------------------------------------


def test_where_xformers_runs_it_is_used(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """1e-4 is float32's other order of summing, over 2 steps."""
    plain = latents(pipe)
    module = fake(softmax)
    monkeypatch.setattr(attention_processor, "xformers", module)
    pipe.arrange(Memory(attention="xformers"))
    assert used(pipe) == {"XFormersAttnProcessor"}
    module.calls.clear()
    assert (latents(pipe) - plain).abs().max() <= 1e-4
    assert module.calls


@pytest.mark.parametrize(
    "module, reason",
    [(None, "it is not installed"), (fake(unable), "it cannot run on cpu in torch.float32 (No op")],
)
def test_where_xformers_cannot_run_one_line_says_why(
    tiny: Build,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    module: Any,
    reason: str,
) -> None:
    pipe = LatentDiffusionPipeline(**tiny())
    plain = latents(pipe)
    monkeypatch.setattr(attention_processor, "xformers", module)
    caplog.clear()
    pipe.arrange(Memory(attention="xformers"))
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 1
    assert said[0].startswith("attention: torch's own (sdpa) in place of xformers: ")
    assert reason in said[0]
    assert "\n" not in said[0]
    assert torch.equal(latents(pipe), plain)


def test_auto_asks_xformers_on_gpus_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The device "meta" stands for a GPU. Where xformers was never installed nobody misses it."""
    gpu, cpu = torch.device("meta"), torch.device("cpu")
    for module, chosen, said in ((fake(softmax), "xformers", 0), (fake(unable), "sdpa", 1)):
        monkeypatch.setattr(attention_processor, "xformers", module)
        caplog.clear()
        assert resolve("auto", cpu, torch.float32) == "sdpa"
        assert module.calls == []
        assert resolve("auto", gpu, torch.float16) == chosen
        assert module.calls
        assert len(caplog.records) == said
    monkeypatch.setattr(attention_processor, "xformers", None)
    caplog.clear()
    assert resolve("auto", gpu, torch.float16) == "sdpa"
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_processors_that_do_more_stay(tiny: Build, caplog: pytest.LogCaptureFixture) -> None:
    class Reads(XFormersAttnProcessor):
        """Such as an IP-Adapter's."""

    pipe = LatentDiffusionPipeline(**tiny())
    first = next(layer for layer in pipe.unet.modules() if isinstance(layer, Attention))
    first.set_processor(Reads())
    pipe.arrange(Memory(attention="sliced"))
    assert used(pipe) == {"Reads", "SlicedAttnProcessor"}
    assert "layers with Reads keep that" in caplog.text
