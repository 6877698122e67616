"""What stock pipelines load and check besides a model: adapters, learnt words, a safety checker."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from transformers import BatchFeature

from ldm_pipeline import LatentDiffusionPipeline, LatentDiffusionXLPipeline
from ldm_pipeline.errors import UserError

Build = Callable[..., dict[str, Any]]


def draw(pipe: Any, prompt: str = "a red star", **arguments: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    chosen = {"num_inference_steps": 2, "output_type": "latent", **arguments}
    latents: torch.Tensor = pipe(prompt, generator=generator, **chosen).images
    return latents


@pytest.fixture
def pair(tiny: Build) -> tuple[LatentDiffusionPipeline, StableDiffusionPipeline]:
    """Both pipelines, each over components of its own, equal ones."""
    return (
        LatentDiffusionPipeline(**tiny()),
        StableDiffusionPipeline(**tiny(), requires_safety_checker=False),
    )


def test_adapter_files_go_both_ways(pair: Any, tmp_path: Path) -> None:
    """A LoRA file that one pipeline wrote draws the same pictures with the other."""
    from peft import LoraConfig, get_peft_model_state_dict

    for k, (writer, reader) in enumerate([pair, pair[::-1]]):
        plain = draw(reader)
        torch.manual_seed(k)
        for part, targets in ((writer.unet, ["to_q", "to_v"]), (writer.text_encoder, ["q_proj"])):
            # alpha = r, which is what a file without alphas means.
            config = LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False)
            part.add_adapter(config)
        writer.save_lora_weights(
            tmp_path / str(k),
            unet_lora_layers=get_peft_model_state_dict(writer.unet),
            text_encoder_lora_layers=get_peft_model_state_dict(writer.text_encoder),
        )
        reader.load_lora_weights(tmp_path / str(k), adapter_name="style")
        assert reader.get_active_adapters() == ["style"]
        adapted = draw(reader)
        assert torch.equal(adapted, draw(writer))
        assert not torch.equal(adapted, plain)
        reader.set_adapters(["style"], [0.0])
        assert torch.equal(draw(reader), plain)
        reader.unload_lora_weights()
        assert torch.equal(draw(reader), plain)
        writer.unet.delete_adapters("default")
        writer.text_encoder.delete_adapter("default")


@pytest.mark.parametrize("build", ["tiny", "tiny_xl"])
def test_what_does_not_fit_is_one_line(build: str, request: Any, tmp_path: Path) -> None:
    """Of another model, or with shapes of none; the pipeline draws what it drew."""
    kind = LatentDiffusionPipeline if build == "tiny" else LatentDiffusionXLPipeline
    pipe = kind(**request.getfixturevalue(build)())
    before = draw(pipe)
    block = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    for k, (down, up) in enumerate([((2, 5), (7, 2)), ((2,), (3,)), ((0, 5), (7, 0))]):
        weights = {
            f"{block}.lora_A.weight": torch.ones(down),
            f"{block}.lora_B.weight": torch.ones(up),
        }
        save_file(weights, tmp_path / f"{k}.safetensors")
        with pytest.raises(UserError, match="this LoRA cannot be loaded: ") as caught:
            pipe.load_lora_weights(str(tmp_path / f"{k}.safetensors"))
        assert "\n" not in str(caught.value)
    assert torch.equal(draw(pipe), before)


def test_learnt_words(pair: Any) -> None:
    """A word of two vectors (textual inversion) is read as two tokens."""
    learnt = {"<mine>": torch.randn(2, 32, generator=torch.Generator().manual_seed(1))}
    drawn = []
    for pipe in pair:
        plain = draw(pipe, "a <mine> star")
        pipe.load_textual_inversion(dict(learnt), token="<mine>")
        drawn.append(draw(pipe, "a <mine> star", negative_prompt="<mine>"))
        assert not torch.equal(drawn[-1], plain)
    assert torch.equal(*drawn)


def test_a_learnt_word_of_both_text_encoders(tiny_xl: Any, tiny: Any, tmp_path: Path) -> None:
    """As stock's users load it, encoder by encoder; it goes to both or to none."""
    torch.manual_seed(1)
    learnt = {"clip_l": torch.randn(2, 32), "clip_g": torch.randn(2, 32)}
    file = tmp_path / "mine.safetensors"
    save_file(learnt, file)
    ours, theirs = (LatentDiffusionXLPipeline(**tiny_xl(), add_watermarker=False) for _ in "ab")
    ours.load_textual_inversion(str(file))
    for key, end in (("clip_l", ""), ("clip_g", "_2")):
        theirs.load_textual_inversion(
            learnt[key],
            token="mine",
            tokenizer=getattr(theirs, f"tokenizer{end}"),
            text_encoder=getattr(theirs, f"text_encoder{end}"),
        )
    assert torch.equal(draw(ours, "a mine star"), draw(theirs, "a mine star"))
    with pytest.raises(UserError, match="mine is a word already"):
        ours.load_textual_inversion(file)
    save_file({**learnt, "clip_g": torch.randn(2, 24)}, file)
    fresh = LatentDiffusionXLPipeline(**tiny_xl(), add_watermarker=False)
    with pytest.raises(UserError, match="vectors of 24 numbers"):
        fresh.load_textual_inversion(file, token="<mine>")
    assert len(fresh.tokenizer) == fresh.text_encoder.get_input_embeddings().num_embeddings
    with pytest.raises(UserError, match="this model has one"):
        LatentDiffusionPipeline(**tiny()).load_textual_inversion(file)


@pytest.mark.parametrize("place", ["none.safetensors", "nobody/none", 5, ""])
def test_what_is_no_learnt_word_is_refused_in_one_line(tiny: Any, place: Any) -> None:
    with pytest.raises(UserError) as refusal:
        LatentDiffusionPipeline(**tiny()).load_textual_inversion(place)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("build", ["tiny", "tiny_xl"])
def test_a_pickle_is_no_adapter(build: str, request: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Neither by its name, nor under another, nor because nothing else is there."""
    pipe: Any = {"tiny": LatentDiffusionPipeline, "tiny_xl": LatentDiffusionXLPipeline}[build](
        **request.getfixturevalue(build)()
    )
    monkeypatch.chdir(tmp_path)
    for name in ("a.bin", "only/a.bin", "both/a.bin", "b.safetensors"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(b"cos\nmkdir\n(S'ran'\ntR.")
    save_file({"a": torch.ones(1)}, "both/a.safetensors")
    (entry,) = os.scandir("only")
    asked: list[tuple[str | os.PathLike[str], dict[str, Any]]] = [
        ("a.bin", {}),
        (entry, {}),
        ("only", {}),
        (".", {"subfolder": "only"}),
        ("both", {"weight_name": "a.bin"}),
        ("both", {"use_safetensors": False}),
    ]
    for load in (pipe.load_lora_weights, pipe.load_textual_inversion, pipe.lora_state_dict):
        for place, told in asked:
            with pytest.raises(UserError, match="a pickle can run any program") as refusal:
                load(place, **told)
            assert "\n" not in str(refusal.value)
        with pytest.raises(UserError) as refusal:
            load("b.safetensors")
        assert "\n" not in str(refusal.value)
    assert not Path("ran").exists(), "a pickle was opened"


class Checker(torch.nn.Module):
    """Blacks out the second picture, as a safety checker would."""

    device = torch.device("cpu")
    dtype = torch.float32

    def forward(self, images: Any, clip_input: torch.Tensor) -> tuple[Any, list[bool]]:
        assert len(images) == len(clip_input)
        unsafe = [i == 1 for i in range(len(images))]
        images[1] = 0.0
        return images, unsafe


class Extractor:
    """Turns pictures into what the checker reads."""

    def __call__(self, pictures: Any, return_tensors: str) -> BatchFeature:
        return BatchFeature({"pixel_values": torch.zeros(len(pictures), 3, 4, 4)})


@pytest.mark.parametrize("output_type", ["pt", "np"])
def test_a_safety_checker_is_obeyed(components: dict[str, Any], output_type: str) -> None:
    parts = {**components, "safety_checker": Checker(), "feature_extractor": Extractor()}
    results = []
    for made_by in (LatentDiffusionPipeline, StableDiffusionPipeline):
        pipe = made_by(**{**parts, "scheduler": copy.deepcopy(parts["scheduler"])})
        pipe.set_progress_bar_config(disable=True)
        results.append(
            pipe("a red star", num_inference_steps=2, num_images_per_prompt=3,
                 generator=torch.Generator().manual_seed(1), output_type=output_type)
        )  # fmt: skip
    ours, stock = results
    assert ours.nsfw_content_detected == stock.nsfw_content_detected == [False, True, False]
    assert (ours.images == stock.images).all()
    assert ours.images[1].max() == 0
    assert ours.images[0].max() > 0


@pytest.mark.parametrize("loads", ["load_lora_weights", "load_textual_inversion"])
def test_a_file_that_is_not_there_is_said_to_be_none(
    tiny: Build, tmp_path: Path, loads: str
) -> None:
    """Stock takes its name for one of the hub, and speaks of what fetching would need."""
    file = tmp_path / "style.safetensors"
    with pytest.raises(UserError, match=f"^there is no file {file}$"):
        getattr(LatentDiffusionPipeline(**tiny()), loads)(file)


TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"timestep_spacing": "trailing"}),
    "ddpm": ("DDPMScheduler", {"timestep_spacing": "trailing"}),
    "lcm": ("LCMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
}


@pytest.mark.parametrize("sampler", TWINS)
def test_native_samplers_draw_their_twin_s_picture(tiny: Build, sampler: str) -> None:
    """On the same grid, from the same noise, ours and the stock scheduler's go one way."""
    import diffusers

    name, settings = TWINS[sampler]
    shared = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = getattr(diffusers, name)(**shared, steps_offset=1, **settings)
    ours = LatentDiffusionPipeline(**tiny())
    stock = StableDiffusionPipeline(**tiny(scheduler=scheduler), requires_safety_checker=False)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    scale = 1.0
    if hasattr(scheduler, "sigmas"):
        # These start from sigma * noise, so that x lacks the 1 in sqrt(sigma² + 1).
        sigma = float(((1 - scheduler.alphas_cumprod[-1]) / scheduler.alphas_cumprod[-1]) ** 0.5)
        scale = sigma / (sigma**2 + 1) ** 0.5
    steps: dict[str, Any] = {"num_inference_steps": 8, "guidance_scale": 3.0}
    mine = draw(ours, latents=noise * scale, sampler=sampler, **steps)
    theirs = draw(stock, latents=noise, **steps)
    # Eight steps of float32 in another order of operations, on latents of up to 80.
    assert torch.allclose(mine, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
