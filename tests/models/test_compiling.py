"""Compiled blocks draw the same pictures; what was compiled is kept where it is said to be.

Most of it is tested with torch's compiler in front and none behind (`eager`), which takes no time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from ldm_pipeline import LatentDiffusionPipeline, LatentDiffusionXLPipeline, Memory
from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.few_steps import few_step_unet
from ldm_pipeline.lora.files import save
from ldm_pipeline.lora.fusing import Fused
from ldm_pipeline.lora.inject import inject, without_input_casts
from ldm_pipeline.lora.targets import LoraSettings
from ldm_pipeline.models import compiling
from tests.conftest import tiny_unet

Build = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache of the user, and a compiler that has compiled nothing yet."""
    monkeypatch.setenv(compiling.SETTING, "")  # as if unset; whatever a test makes of it is undone
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch._dynamo.reset()
    counters.clear()
    return tmp_path / "ldm-pipeline" / "compiled"


@pytest.fixture
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is made of what is compiled, and no C++ compiler is needed for it."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    monkeypatch.setattr(compiling, "check", lambda device: None)


def draw(pipe: Any, seed: int = 3, **told: Any) -> Tensor:
    """One picture [1, 3, H, W] in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    told = {"num_inference_steps": 2, "output_type": "pt", **told}
    drawn: Tensor = pipe("a red star", seed=seed, **told).images
    return drawn


@pytest.mark.usefixtures("_eager")
@pytest.mark.parametrize("shape", ["sd", "sdxl"])
def test_pictures_stay_and_the_switch_goes_both_ways(
    shape: str, tiny: Build, tiny_xl: Build, place: Path
) -> None:
    pipe: Any = LatentDiffusionPipeline(**tiny())
    if shape == "sdxl":
        pipe = LatentDiffusionXLPipeline(**tiny_xl(), add_watermarker=False)
    plain = draw(pipe)
    pipe.arrange(Memory(compile=True))
    assert compiling.compiled(pipe.unet)
    assert torch.equal(draw(pipe), plain)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    assert torch.equal(draw(pipe), plain)
    assert counters["stats"]["unique_graphs"] == graphs, "the second picture compiles nothing"
    assert compiling.folder() == place
    assert place.stat().st_mode & 0o077 == 0, "what lies there is run"
    pipe.arrange(Memory())
    assert not compiling.compiled(pipe.unet)
    assert torch.equal(draw(pipe), plain)


@pytest.mark.usefixtures("_eager")
def test_threads_draw_the_serial_pictures(tiny: Build) -> None:
    pipe = LatentDiffusionPipeline(**tiny())
    serial = [draw(pipe, seed) for seed in range(4)]
    pipe.arrange(Memory(compile=True))
    with ThreadPoolExecutor(4) as pool:
        parallel = list(pool.map(lambda seed: draw(pipe, seed), range(4)))
    assert all(map(torch.equal, serial, parallel))


@pytest.mark.usefixtures("_eager")
def test_adapters_are_swapped_without_compiling_again(tiny: Build, tmp_path: Path) -> None:
    """Of different ranks and modules, in the UNet's compiled blocks and beside them."""
    files = []
    for rank, targets in ((2, ["attn1", "v_proj"]), (3, ["attn2", "conv1", "q_proj"])):
        made = LatentDiffusionPipeline(**tiny())
        models = {"unet": made.unet, "text_encoder": made.text_encoder}
        adapter = inject(models, LoraSettings(targets, rank=rank), seed=rank)
        for name, value in adapter.parameters.items():
            if name.endswith("lora_B.weight"):
                torch.nn.init.normal_(value, std=0.3)
        files.append(save(tmp_path / f"{rank}", adapter.weights()))
    swaps = [[], [(files[0], 1.0)], [(files[1], 0.5)], [(files[0], 0.3), (files[1], -1.0)], []]
    plain, quick = (LatentDiffusionPipeline(**tiny()) for _ in range(2))
    quick.arrange(Memory(compile=True))
    graphs, pictures = set(), []
    for pipe in (plain, quick):
        fused = Fused(pipe)
        for swap in swaps:
            fused.swap(swap)
            pictures.append(draw(pipe))
            graphs.add(counters["stats"]["unique_graphs"])
    assert len(graphs) == 2, "none without the switch, and all in the first picture with it"
    wanted, found = pictures[: len(swaps)], pictures[len(swaps) :]
    assert all(map(torch.equal, wanted, found))
    assert torch.equal(found[0], found[-1])
    assert all(not torch.equal(found[0], other) for other in found[1:-1])


@pytest.mark.usefixtures("_eager")
def test_the_unet_of_a_few_steps_is_compiled_too(tiny: Build, tmp_path: Path) -> None:
    """Also where it was made before the switch; and not any more, after."""
    adapter = inject({"unet": tiny()["unet"]}, LoraSettings(["mid_block.*.attn2"]), seed=0)
    file = save(tmp_path / "few.safetensors", adapter.weights())
    pipe = LatentDiffusionPipeline(**tiny())
    for wanted in (False, True, False):
        pipe.arrange(Memory(compile=wanted))
        assert compiling.compiled(few_step_unet(pipe, file)[0]) is wanted


def test_the_folder_is_the_one_that_torch_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiling.SETTING, "elsewhere")
    assert compiling.folder() == Path("elsewhere")


def test_without_a_compiler_one_line_says_so(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = LatentDiffusionPipeline(**tiny())
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"C\+\+ compiler, and no-such-compiler is not there"):
        pipe.arrange(Memory(compile=True))
    assert not compiling.compiled(pipe.unet)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_second_process_finds_what_the_first_one_compiled(place: Path) -> None:
    """A block of its own, by torch's own compiler: the same numbers to float32's rounding."""
    unet = tiny_unet()
    x, embeds = torch.randn(1, 4, 16, 16), torch.randn(1, 7, 32)

    def said() -> Tensor:
        with torch.no_grad():
            answer: Tensor = unet(x, 5, encoder_hidden_states=embeds, return_dict=False)[0]
        return answer

    plain = said()
    for found in (False, True):
        torch._dynamo.reset()  # what a new process remembers
        counters.clear()
        compiling.compile_blocks(unet, False)
        compiling.compile_blocks(unet, True)
        assert (said() - plain).abs().max() <= 1e-4
        hits = (
            counters["inductor"]["fxgraph_cache_hit"]
            + counters["aot_autograd"]["autograd_cache_hit"]
        )
        assert (hits > 0) is found
    assert any(place.rglob("*"))


@pytest.mark.usefixtures("_eager")
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bf16"])
def test_a_step_of_training_is_captured_block_by_block(half: bool) -> None:
    """Adapted blocks are one graph each, without a break, and have the gradients of plain ones."""
    unet = tiny_unet()
    adapter = inject({"unet": unet}, LoraSettings("attention+feedforward"), seed=0)
    for name, value in adapter.parameters.items():
        if name.endswith("lora_B.weight"):
            torch.nn.init.normal_(value, std=0.3)
    x, embeds = torch.randn(2, 4, 16, 16), torch.randn(2, 7, 32)

    def gradients() -> list[Tensor]:
        unet.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half), without_input_casts(adapter):
            answer = unet(x, torch.tensor([3, 700]), encoder_hidden_states=embeds).sample
        answer.float().square().mean().backward()
        return [p.grad.clone() for p in adapter.parameters.values() if p.grad is not None]

    plain = gradients()
    compiling.compile_blocks(unet, True)
    captured = gradients()
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    assert len(plain) == len(captured) == len(adapter.parameters)
    assert all(map(torch.equal, plain, captured))
