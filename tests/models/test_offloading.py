"""Networks that come and go by hooks: the same pictures, in turns, and nothing left behind.

There is no GPU here: the CPU stands for it, so that all hooks run and nothing moves.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipeline import LatentDiffusionPipeline, LatentDiffusionXLPipeline, Memory
from ldm_pipeline.errors import UserError
from ldm_pipeline.models import offloading
from tests.parity.pairs import picture

Build = Callable[..., dict[str, Any]]


@pytest.fixture
def _pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is a GPU."""
    monkeypatch.setattr(offloading, "check", lambda how, device: None)


@pytest.fixture(params=["sd", "sdxl"])
def pipe(request: pytest.FixtureRequest, tiny: Build, tiny_xl: Build) -> LatentDiffusionPipeline:
    """A tiny pipeline of each shape, of its own."""
    if request.param == "sdxl":
        return LatentDiffusionXLPipeline(**tiny_xl(), add_watermarker=False)
    return LatentDiffusionPipeline(**tiny())


def draw(pipe: Any, seed: int = 3, **told: Any) -> Tensor:
    """One picture [1, 3, H, W] of two steps."""
    pipe.set_progress_bar_config(disable=True)
    told = {"num_inference_steps": 2, "output_type": "pt", **told}
    drawn: Tensor = pipe("a red star", seed=seed, **told).images
    return drawn


@pytest.mark.usefixtures("_pretend")
def test_pictures_stay_and_nothing_is_left(pipe: Any) -> None:
    """From words and out of a picture, which is encoded; in either order, and back."""
    again: dict[str, Any] = {"image": picture(32, 32), "strength": 0.9}
    plain, redrawn = draw(pipe), draw(pipe, **again)
    for how in ("parts", "layers", "none", "layers", "parts", "none"):
        pipe.arrange(Memory(offload=how))
        moving = {name: offloading.moves(getattr(pipe, name)) for name in ("unet", "vae")}
        assert set(moving.values()) == {how != "none"}, (how, moving)
        for _ in range(2):
            assert torch.equal(draw(pipe), plain)
        assert torch.equal(draw(pipe, **again), redrawn)


@pytest.mark.parametrize("how", ["parts", "layers"])
def test_without_a_gpu_it_is_refused_and_nothing_changes(pipe: Any, how: str) -> None:
    if offloading.accelerator() is not None:
        pytest.skip("there is a GPU here")
    with pytest.raises(UserError, match=f"offload='{how}' keeps networks in the computer's memory"):
        pipe.arrange(Memory(offload=how, tiling=True))
    assert not offloading.moves(pipe.unet)
    assert not pipe.vae.use_tiling


@pytest.mark.usefixtures("_pretend")
@pytest.mark.parametrize("how", ["none", "parts", "layers"])
def test_threads_take_turns_where_networks_move(tiny: Build, how: str) -> None:
    """And draw the pictures that they draw one after the other."""
    pipe = LatentDiffusionPipeline(**tiny()).arrange(Memory(offload=how))
    serial = [draw(pipe, seed) for seed in range(3)]
    inside, most, counting = 0, 0, threading.Lock()

    def entered(*_: Any) -> None:
        nonlocal inside, most
        with counting:
            inside += 1
            most = max(most, inside)
        time.sleep(0.05)  # long enough for another thread to come in

    def left(*_: Any) -> None:
        nonlocal inside
        with counting:
            inside -= 1

    pipe.unet.conv_in.register_forward_pre_hook(entered)
    pipe.unet.conv_in.register_forward_hook(left)
    with ThreadPoolExecutor(3) as pool:
        parallel = list(pool.map(lambda seed: draw(pipe, seed), range(3)))
    assert all(map(torch.equal, serial, parallel))
    assert (most == 1) == (how != "none")


@pytest.mark.usefixtures("_pretend")
def test_a_run_may_start_another_within_itself(tiny: Build) -> None:
    pipe = LatentDiffusionPipeline(**tiny())
    plain = draw(pipe, 5)
    pipe.arrange(Memory(offload="parts"))
    inner: list[Tensor] = []

    def callback(own: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if i == 0:
            inner.append(draw(pipe, 5))
        return tensors

    draw(pipe, callback_on_step_end=callback)
    assert torch.equal(inner[0], plain)


def test_layers_that_come_and_go_are_not_compiled() -> None:
    with pytest.raises(UserError, match="offload='layers' does not go with compile"):
        Memory(offload="layers", compile=True)
