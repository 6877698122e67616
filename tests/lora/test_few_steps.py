"""Laws of the LCM flag: it draws as stock does with the same adapter, and leaves no trace."""

from __future__ import annotations

import gc
import json
import struct
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, TCDScheduler
from diffusers.models.attention_processor import AttnProcessor2_0
from huggingface_hub import constants
from safetensors.torch import save_file

from ldm_pipeline import LatentDiffusionPipeline
from ldm_pipeline.diffusion import Schedule
from ldm_pipeline.diffusion.grids import DISTILLED, consistency_grid
from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.attach import attach
from ldm_pipeline.lora.few_steps import few_step_unet
from ldm_pipeline.lora.files import save
from ldm_pipeline.lora.inject import inject
from ldm_pipeline.lora.notes import SPACINGS, LcmNote, read_note
from ldm_pipeline.lora.targets import LoraSettings
from ldm_pipeline.models import bundled
from tests.conftest import tiny_unet
from tests.lora.conftest import BLOCKS
from tests.lora.test_attach import same, snapshot
from tests.parity.features import adapter_weights

Build = Callable[..., dict[str, Any]]


@pytest.fixture
def make(tiny: Build, tmp_path: Path) -> Callable[..., Path]:
    """make(name, seed=…, note=…): the file of a LoRA of the tiny UNet."""

    def make(name: str, seed: int = 0, note: LcmNote | None = None, targets: Any = BLOCKS) -> Path:
        adapter = inject({"unet": tiny()["unet"]}, LoraSettings(targets, 4, 6), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter.parameters.values():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        file = tmp_path / f"{name}.safetensors"
        return save(file, adapter.weights(), None if note is None else note.texts())

    return make


def draw(pipe: Any, **arguments: Any) -> torch.Tensor:
    """One picture [1, H, W, 3], in two steps unless told otherwise."""
    pipe.set_progress_bar_config(disable=True)
    chosen = {"num_inference_steps": 2, "output_type": "np", **arguments}
    generator = torch.Generator().manual_seed(5)
    return torch.from_numpy(pipe("a red star", generator=generator, **chosen).images)


def stock(tiny: Build, *files: Path, note: LcmNote | None = None) -> Any:
    """A stock pipeline with these adapters, all of weight 1, and LCM's scheduler."""
    told = note or LcmNote()
    pipe = StableDiffusionPipeline(**tiny(), requires_safety_checker=False)
    names = [f"a{i}" for i in range(len(files))]
    for name, file in zip(names, files, strict=True):
        pipe.load_lora_weights(file, adapter_name=name)
    pipe.set_adapters(names)
    pipe.scheduler = LCMScheduler.from_config(
        pipe.scheduler.config,
        set_alpha_to_one=True,  # the last step's own level, which LCM does not reach
        original_inference_steps=told.original_steps,
        timestep_scaling=told.timestep_scaling,
    )
    return pipe


@pytest.mark.parametrize("note", [None, LcmNote("some", 40, 0.01)])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_it_draws_what_stock_draws(
    pipe: Any, tiny: Build, make: Any, steps: int, note: LcmNote | None
) -> None:
    """With its scheduler, the adapter, no guidance, and what the file says of its training."""
    file = make("few", note=note)
    theirs = draw(stock(tiny, file, note=note), num_inference_steps=steps, guidance_scale=1.0)
    ours = draw(pipe, num_inference_steps=steps, lcm=file)
    # Each of up to 8 steps divides float32 rounding by alpha, 0.07 at the first level.
    assert (ours - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_levels_of_even_angles_are_told_to_stock_as_timesteps(
    pipe: Any, tiny: Build, make: Any, steps: int
) -> None:
    """An adapter that was distilled on them is drawn with on them; the even ones are others."""
    schedule = Schedule.from_config(pipe.scheduler.config)
    levels = consistency_grid(schedule, steps, spacing="angle")[:-1]
    file = make("few", note=LcmNote("some", spacing="angle"))
    theirs = stock(tiny, file)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following custom timesteps")
        wanted = draw(theirs, timesteps=[int(t) for t in levels], guidance_scale=1.0)
    ours = draw(pipe, num_inference_steps=steps, lcm=file)
    # As above.
    assert (ours - wanted).abs().max() <= 1e-4
    even = draw(pipe, num_inference_steps=steps, lcm=make("few"))
    assert torch.equal(ours, even) == (steps == 1)


def test_unless_told_otherwise_it_takes_four_steps_without_guidance(pipe: Any, make: Any) -> None:
    rows: list[int] = []
    file = make("few")
    told = draw(pipe, lcm=file, num_inference_steps=4, guidance_scale=1.0)
    assert torch.equal(draw(pipe, lcm=file, num_inference_steps=None), told)
    assert not torch.equal(draw(pipe, lcm=file, num_inference_steps=4, guidance_scale=2.0), told)
    pipe.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    draw(pipe, num_inference_steps=None)
    assert rows == [2] * 50


@pytest.mark.parametrize("factor", [0, 0.3, 0.5])
@pytest.mark.parametrize("beside", [False, True])
def test_it_leaves_no_trace(pipe: Any, make: Any, beside: bool, factor: float) -> None:
    """No module, weight, active adapter or flag of the pipeline changes, nor its pictures."""
    if beside:
        attach(pipe, [(make("style", seed=1), 0.7)])
    scale = {"cross_attention_kwargs": {"scale": factor}}
    before, plain, scaled = snapshot(pipe), draw(pipe), draw(pipe, **scale)
    flags = [p.requires_grad for p in pipe.unet.parameters()]
    scheduler = pipe.scheduler
    few = draw(pipe, lcm=make("few"))
    assert not torch.equal(draw(pipe, lcm=make("few"), **scale), few)
    assert same(before, snapshot(pipe))
    assert flags == [p.requires_grad for p in pipe.unet.parameters()]
    assert pipe.scheduler is scheduler
    assert torch.equal(draw(pipe), plain)
    assert torch.equal(draw(pipe, **scale), scaled)
    assert torch.equal(draw(pipe, lcm=make("few")), few)
    assert not torch.equal(draw(pipe, sampler="lcm", guidance_scale=1.0), few), "it was there"


@pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute")
@pytest.mark.parametrize("targets", [BLOCKS, ("up_blocks.*.attn1",)], ids=["same", "others"])
def test_it_adds_to_a_style(pipe: Any, tiny: Build, make: Any, targets: Any) -> None:
    """On the same layers and on others; a style that is turned off stays out."""
    style, few = make("style", seed=1, targets=targets), make("few")
    alone = draw(pipe, lcm=few)
    names = attach(pipe, [(style, 1.0)])
    both = draw(pipe, lcm=few)
    theirs = draw(stock(tiny, style, few), guidance_scale=1.0)
    # The same float32 numbers; the order of a sum may differ, and the first level divides by 0.07.
    assert (both - theirs).abs().max() <= 1e-4
    assert (both - alone).abs().max() > 1e-3
    pipe.disable_lora()
    assert torch.equal(draw(pipe, lcm=few), alone)
    pipe.enable_lora()
    assert torch.equal(draw(pipe, lcm=few), both)
    pipe.set_adapters(list(names), [0.5])
    softer = draw(pipe, lcm=few)
    assert not torch.equal(softer, both)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe, lcm=few), alone)


def test_it_draws_with_the_weights_as_they_are_now(pipe: Any, make: Any) -> None:
    """Also where the UNet or the file changed since the last call."""
    few = make("few")
    before = draw(pipe, lcm=few)
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(1.1)
    changed = draw(pipe, lcm=few)
    assert not torch.equal(changed, before)
    pipe.to(torch.bfloat16)
    assert draw(pipe, lcm=few).isfinite().all()
    pipe.to(torch.float32)
    make("few", seed=4)
    assert (draw(pipe, lcm=few) - changed).abs().max() > 1e-3


def test_it_draws_with_the_image_prompt_s_scale_as_it_is_now(
    pipe: Any, make: Any, tmp_path: Path
) -> None:
    """Whether stock's method sets it, for one block or for all, or a list takes its place."""
    save_file(adapter_weights(pipe.unet), tmp_path / "ip.safetensors")
    pipe.load_ip_adapter(str(tmp_path), "", "ip.safetensors", image_encoder_folder=None)
    shown = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(1))
    told = {"lcm": make("few"), "ip_adapter_image_embeds": [shown]}
    first = draw(pipe, **told)
    drawn = [first]
    for scale in (0.0, {"mid": 1.0}):
        pipe.set_ip_adapter_scale(scale)
        drawn.append(draw(pipe, **told))
        assert not any(torch.equal(drawn[-1], other) for other in drawn[:-1])
    for processor in pipe.unet.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [1.0]
    assert torch.equal(draw(pipe, **told), first)


def test_it_draws_with_the_attention_processors_as_they_are_now(pipe: Any, make: Any) -> None:
    """What a processor of another's making keeps on itself is not copied."""

    class Counting(AttnProcessor2_0):
        calls = 0

        def __call__(self, *told: Any, **named: Any) -> Any:
            self.calls += 1
            return super().__call__(*told, **named)

    counting = Counting()
    pipe.unet.set_attn_processor(counting)
    draw(pipe, lcm=make("few"))
    assert counting.calls > 0


def test_what_is_kept_goes_with_the_pipeline(tiny: Build, make: Any) -> None:
    """And is made once."""
    pipe = LatentDiffusionPipeline(**tiny())
    few = make("few")
    first, again = (few_step_unet(pipe, few)[0] for _ in range(2))
    assert first is again
    gone = weakref.ref(pipe.unet), weakref.ref(first)
    del pipe, first, again
    gc.collect()
    assert [each() for each in gone] == [None, None]


def test_threads_draw_with_it_and_without(pipe: Any, make: Any) -> None:
    few, other = make("few"), make("other", seed=3)
    wanted = [{}, {"lcm": few}, {"lcm": other}] * 4
    alone = [draw(pipe, **told) for told in wanted[:3]]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda told: draw(pipe, **told), wanted))
    for i, picture in enumerate(together):
        assert torch.equal(picture, alone[i % 3]), i


def test_a_full_lcm_needs_no_adapter(tiny: Build) -> None:
    """Its UNet hears the guidance, 7.5 unless told otherwise, in one answer a step."""
    pipe = LatentDiffusionPipeline(**tiny(time_cond_proj_dim=32))
    few = draw(pipe, lcm=True)
    assert torch.equal(few, draw(pipe, sampler="lcm", guidance_scale=7.5))
    assert not torch.equal(few, draw(pipe, lcm=True, guidance_scale=3.0))


def test_the_bundled_adapter_is_found(
    pipe: Any, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Build
) -> None:
    """Where there is one, and it fits; else one line says what to do."""
    monkeypatch.setattr(bundled, "ASSETS", tmp_path)
    before = snapshot(pipe)
    with pytest.raises(UserError, match="no few-step adapter for this model"):
        draw(pipe, lcm=True)
    file = make("few")
    (tmp_path / "lcm").mkdir()
    file.rename(tmp_path / "lcm" / "pytorch_lora_weights.safetensors")
    few = draw(pipe, lcm=True)
    assert torch.equal(few, draw(pipe, lcm=tmp_path / "lcm"))
    wider = LatentDiffusionPipeline(**{**tiny(), "unet": tiny()["unet"]})
    wider.unet.mid_block.attentions[0].proj_in = torch.nn.Linear(3, 3)
    with pytest.raises(UserError, match="no few-step adapter for this model"):
        draw(wider, lcm=True)
    file = make("few")
    with pytest.raises(UserError, match=r"few\.safetensors does not fit this model"):
        draw(wider, lcm=str(file))
    assert same(before, snapshot(pipe))


@pytest.mark.parametrize("gamma", [0.3, 0.8])
def test_tcd_draws_with_the_same_adapter(pipe: Any, tiny: Build, make: Any, gamma: float) -> None:
    """As stock's TCDScheduler does on the adapter's own grid; its gamma changes the picture."""
    note = LcmNote("some", 40)
    file = make("few", note=note)
    theirs = stock(tiny, file)
    theirs.scheduler = TCDScheduler.from_config(
        theirs.scheduler.config, original_inference_steps=note.original_steps
    )
    told: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 1.0}
    wanted = draw(theirs, eta=gamma, **told)
    ours = draw(pipe, lcm=file, sampler="tcd", eta=gamma, **told)
    # Float32 rounding divided by alpha, 0.07 at the first level, as for LCM.
    assert (ours - wanted).abs().max() <= 1e-4
    by_default = draw(pipe, lcm=file, sampler="tcd", **told)
    assert torch.equal(ours, by_default) == (gamma == 0.3)
    assert not torch.equal(ours, draw(pipe, lcm=file, **told))


def test_the_published_adapter_is_taken_from_the_hubs_cache(
    tiny: Build, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a UNet that is told texts of 768 channels; where it is not, one line says which file."""
    unet = tiny_unet(cross_attention_dim=768)
    monkeypatch.setattr(unet.config, "cross_attention_dim", 768)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    pipe = LatentDiffusionPipeline(**{**tiny(), "unet": unet})
    words: dict[str, Any] = {"prompt_embeds": torch.randn(1, 8, 768), "guidance_scale": 1.0}

    def picture(lcm: Any) -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        return torch.from_numpy(pipe(lcm=lcm, seed=3, output_type="np", **words).images)

    with pytest.raises(UserError, match="latent-consistency/lcm-lora-sdv1-5, which is not on this"):
        picture(True)
    adapter = inject(
        {"unet": tiny_unet(cross_attention_dim=768)}, LoraSettings(BLOCKS, 4, 4), seed=0
    )
    with torch.no_grad():
        for parameter in adapter.parameters.values():
            parameter.add_(0.1)
    repository = tmp_path / "hub" / "models--latent-consistency--lcm-lora-sdv1-5"
    snapshot_folder = repository / "snapshots" / "abc"
    snapshot_folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    file = save(snapshot_folder / "pytorch_lora_weights.safetensors", adapter.weights())
    assert torch.equal(picture(True), picture(file))


def test_mistakes_are_refused_before_anything_is_drawn(pipe: Any, make: Any) -> None:
    called: list[int] = []
    pipe.text_encoder.register_forward_pre_hook(lambda *_: called.append(1))
    few = make("few", note=LcmNote("some", 20, 10.0))
    for told, words in (
        ({"lcm": "nowhere"}, "there is no LoRA file nowhere"),
        ({"lcm": 1}, "lcm=1 must be True, False or the path"),
        ({"lcm": few, "sampler": "ddim"}, "sampler='ddim' does not go with lcm"),
        ({"lcm": few, "num_inference_steps": 21}, "num_inference_steps=21 must lie between 1 and"),
    ):
        with pytest.raises(UserError, match=words):
            draw(pipe, **told)
    pipe.unet._hf_hook = object()
    with pytest.raises(UserError, match="not go together with CPU offload"):
        draw(pipe, lcm=few)
    assert called == []


@pytest.mark.parametrize(
    "text",
    ["[", "3", '{"steps": 3}', '{"original_steps": 0}', '{"original_steps": 4.5}',
     '{"timestep_scaling": -1}', '{"timestep_scaling": "a"}', '{"base": 3}', "[" * 20_000,
     '{"spacing": "odd"}', '{"spacing": ["even"]}'],
    ids=range(11),
)  # fmt: skip
def test_a_note_that_makes_no_sense_is_refused(make: Any, text: str) -> None:
    file: Path = make("few", note=LcmNote("some"))
    assert read_note(file) == LcmNote("some")
    assert read_note(make("published")) == LcmNote()
    assert SPACINGS == DISTILLED
    contents = file.read_bytes()
    (length,) = struct.unpack("<Q", contents[:8])
    header = json.loads(contents[8 : 8 + length])
    header["__metadata__"]["lcm"] = text
    packed = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(packed)) + packed + contents[8 + length :])
    with pytest.raises(UserError, match=r"few.safetensors: 'lcm' in its header"):
        read_note(file)
