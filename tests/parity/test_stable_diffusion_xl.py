"""SDXL: the same pictures as stock diffusers, bit for bit.

As in `test_stable_diffusion.py` every comparison is exact: the same random fp32 components on the
CPU, called on the same tensors in the same order. What all tasks share stands in features.py; here
is more of text-to-image.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)

import ldm_pipeline
from ldm_pipeline.errors import UserError
from ldm_pipeline.pipeline_xl import LatentDiffusionXLPipeline
from tests.parity.pairs import PROMPTS, SCHEDULERS, assert_same, both, scheduler_of, seeded

SHORT: dict[str, Any] = {"prompt": "a red star", "num_inference_steps": 3}
ALONE = sorted(set(SCHEDULERS) & {"DDIMScheduler", "EulerDiscreteScheduler", "TCDScheduler"})
"""Schedulers whose step asks the network once and remembers nothing."""


@pytest.fixture(scope="module")
def xl(tiny_xl: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """One shared set of SDXL's components; tests must not change it."""
    return tiny_xl()


@pytest.mark.parametrize(
    "arguments",
    [
        {"negative_prompt": "a blue moon"},
        {"negative_prompt": ""},
        {"prompt": PROMPTS, "negative_prompt": ["fog", "rain"], "guidance_rescale": 0.5},
        {"prompt_2": "in oil"},
        {"prompt_2": "in oil", "negative_prompt": "fog", "negative_prompt_2": "ink"},
        {"negative_prompt_2": "ink"},
        {"prompt": PROMPTS, "prompt_2": ["in oil", "in ink"], "num_images_per_prompt": 2},
        {"clip_skip": 1, "negative_prompt": "fog"},
        {"height": 48, "width": 16},
        {"original_size": (512, 256), "crops_coords_top_left": (3, 5), "target_size": (40, 20)},
        {
            "negative_original_size": (512, 256),
            "negative_crops_coords_top_left": (9, 1),
            "negative_target_size": (30, 10),
        },
        {"eta": 1.0},
        {"prompt": "red " * 100},
        {"denoising_end": 0.4},
        {"denoising_end": 1.0},
    ],
    ids=str,
)
def test_arguments(xl: dict[str, Any], arguments: dict[str, Any]) -> None:
    assert_same(both(xl), **{**SHORT, **arguments})


def test_the_sizes_are_heard(xl: dict[str, Any]) -> None:
    pair = both(xl)
    plain = assert_same(pair, **SHORT)
    for told in ({"original_size": (512, 256)}, {"crops_coords_top_left": (3, 5)}):
        assert not torch.equal(plain, assert_same(pair, **SHORT, **told))


def test_a_negative_size_reaches_the_negative_half_of_every_image(xl: dict[str, Any]) -> None:
    """Image by image as stock draws one alone; stock mixes the halves up where there are two."""
    ours, stock = both(xl)
    told: dict[str, Any] = {"negative_original_size": (512, 256), "negative_target_size": (30, 10)}
    told |= {"num_inference_steps": 3, "output_type": "latent"}
    together = ours(PROMPTS, generator=seeded(1, 2), **told).images
    for i, prompt in enumerate(PROMPTS):
        alone = stock(prompt, generator=seeded(1 + i), **told).images
        assert torch.allclose(together[i : i + 1], alone, atol=1e-5)  # batches round differently


def test_models_that_hear_the_empty_text(xl: dict[str, Any]) -> None:
    pair = both(xl)
    silent = assert_same(pair, **SHORT)
    for pipe in pair:
        pipe.register_to_config(force_zeros_for_empty_prompt=False)
    assert not torch.equal(silent, assert_same(pair, **SHORT))
    assert_same(pair, **SHORT, negative_prompt_2="ink")


def test_embeds(xl: dict[str, Any]) -> None:
    pair = both(xl)
    words: dict[str, Any] = {"prompt_2": ["in oil", "in ink"], "negative_prompt": ["fog", "rain"]}
    mine = pair[0].encode_prompt(PROMPTS, device="cpu", **words)
    theirs = pair[1].encode_prompt(PROMPTS, device="cpu", **words)
    assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))
    names = ("", "negative_", "pooled_", "negative_pooled_")
    embeds = {f"{name}prompt_embeds": each for name, each in zip(names, mine, strict=True)}
    latents = torch.randn(4, 4, 16, 16, generator=seeded(3)[0])
    told = {"num_inference_steps": 3, "num_images_per_prompt": 2, "latents": latents}
    given = assert_same(pair, **embeds, **told)
    said = pair[0](PROMPTS, output_type="latent", **words, **told).images
    assert torch.equal(given, said)
    alone = {name: embeds[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
    assert_same(pair, **alone, **told)


def test_weighted_prompts(xl: dict[str, Any]) -> None:
    """Plain words are as without weights; weights, BREAK and length change the picture; what was
    encoded before draws the same."""
    ours, _ = both(xl)
    told: dict[str, Any] = {"num_inference_steps": 2, "seed": 1, "output_type": "latent"}

    def drawn(prompt: Any = "a red star", **changed: Any) -> torch.Tensor:
        images: torch.Tensor = ours(prompt, **told, **changed).images
        return images

    for words in ({}, {"negative_prompt": "fog", "prompt_2": "in oil"}):
        assert torch.equal(drawn(**words), drawn(**words, weighted=True))
    heavy, broken = ("a (red:1.5) star", "a red star BREAK in oil")
    for prompt in (heavy, broken, "red " * 100):
        assert not torch.equal(drawn(prompt), drawn(prompt, weighted=True))
    words = {"prompt_2": heavy, "negative_prompt": "red " * 100, "negative_prompt_2": "(ink:0.5)"}
    four = ours.encode_prompt(broken, device="cpu", **words, weighted=True)
    assert four[0].shape == four[1].shape == (1, 154, 64)
    names = ("", "negative_", "pooled_", "negative_pooled_")
    embeds = {f"{name}prompt_embeds": each for name, each in zip(names, four, strict=True)}
    assert torch.equal(drawn(broken, **words, weighted=True), drawn(None, **embeds))
    del embeds["negative_prompt_embeds"], embeds["negative_pooled_prompt_embeds"]
    with pytest.raises(UserError, match="texts for both the prompt and the negative prompt"):
        drawn(None, **embeds, negative_prompt="fog", weighted=True)


@pytest.mark.parametrize("name", ["DDIMScheduler", "HeunDiscreteScheduler"])
def test_callbacks(xl: dict[str, Any], name: str) -> None:
    names = ["latents", "prompt_embeds", "add_text_embeds", "add_time_ids"]

    def change() -> Callable[..., dict[str, Any]]:
        def callback(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            assert list(tensors) == names
            pipe._guidance_scale = pipe.guidance_scale + i
            return {key: value * 0.9 for key, value in tensors.items()}

        return callback

    pair = both(xl, scheduler=scheduler_of(name))
    changed = assert_same(
        pair,
        **SHORT,
        callback_on_step_end=change,
        callback_on_step_end_tensor_inputs=names,
    )
    assert not torch.equal(changed, assert_same(pair, **SHORT))


def test_an_autoencoder_that_overflows_is_computed_with_in_float32(
    tiny_xl: Callable[[], dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    """From the first picture on, said once, and it stays as it was, for whoever shares it; one that
    says that it does not overflow is let be."""
    parts = tiny_xl()
    parts["vae"].half()
    ours, _ = both(parts)
    for _ in range(2):
        assert ours(**SHORT, output_type="pt", seed=1).images.dtype == torch.float32
    assert parts["vae"].dtype == torch.float16
    assert caplog.text.count("overflows in float16") == 1
    parts["vae"].register_to_config(force_upcast=False)
    assert ours(**SHORT, output_type="pt", seed=1).images.isfinite().all()
    assert parts["vae"].dtype == torch.float16


# -- a part of the run ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler"]
)
def test_a_run_goes_on_as_stock_goes_on(xl: dict[str, Any], name: str) -> None:
    """From latents of a run that ended half-way; stock does it by its image-to-image pipeline."""
    scheduler = scheduler_of(name)
    base = both(xl, scheduler=scheduler)
    left = assert_same(base, prompt="a red star", num_inference_steps=6, denoising_end=0.5)
    ours, stock = both(xl, StableDiffusionXLImg2ImgPipeline, scheduler=scheduler)
    told: dict[str, Any] = {"prompt": "a red star", "num_inference_steps": 6}
    told |= {"denoising_start": 0.5, "guidance_scale": 5.0, "output_type": "latent"}
    told |= {"original_size": (32, 32), "target_size": (32, 32)}
    torch.manual_seed(7)
    mine = ours(latents=left, **told).images
    torch.manual_seed(7)
    assert torch.equal(mine, stock(image=left, **told).images)


def refiner_unet() -> Any:
    """A UNet that is told five numbers beside the pooled answer."""
    from tests.conftest import tiny_unet

    return tiny_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 5 * 8,
    )


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_refiner_without_words_goes_on(xl: dict[str, Any], guidance: float) -> None:
    """It has no encoder at all, and draws from what another pipeline made of the words."""
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    parts = {**xl, "unet": refiner_unet(), **dict.fromkeys(names)}
    said = {"requires_aesthetics_score": True, "add_watermarker": False}
    ours = LatentDiffusionXLPipeline(**parts, **said)
    stock = StableDiffusionXLImg2ImgPipeline(**parts, **said)
    dice = seeded(3)[0]
    left = torch.randn(1, 4, 16, 16, generator=dice)
    told: dict[str, Any] = {"num_inference_steps": 4, "denoising_start": 0.5}
    for half in ("", "negative_"):
        told[f"{half}prompt_embeds"] = torch.randn(1, 77, 32, generator=dice)
        told[f"{half}pooled_prompt_embeds"] = torch.randn(1, 24, generator=dice)
    told |= {"guidance_scale": guidance, "output_type": "latent", "aesthetic_score": 7.0}
    told |= {"original_size": (32, 32), "target_size": (32, 32)}
    mine = ours(latents=left, **told).images
    assert torch.equal(mine, stock(image=left, **told).images)


def test_a_refiner_goes_on(xl: dict[str, Any], tmp_path: Path) -> None:
    """It has the second encoder alone, and is told a score instead of the target size."""
    parts = {**xl, "unet": refiner_unet(), "text_encoder": None, "tokenizer": None}
    ours = LatentDiffusionXLPipeline(**parts, add_watermarker=False)
    stock = StableDiffusionXLImg2ImgPipeline(
        **parts, requires_aesthetics_score=True, add_watermarker=False
    )
    left = torch.randn(1, 4, 16, 16, generator=seeded(3)[0])
    told: dict[str, Any] = {**SHORT, "negative_prompt": "fog", "denoising_start": 0.5}
    told |= {"guidance_scale": 5.0, "output_type": "latent", "aesthetic_score": 7.0}
    told |= {"original_size": (32, 32), "target_size": (32, 32)}
    mine = ours(latents=left, **told).images
    assert torch.equal(mine, stock(image=left, **told).images)
    ours.save_pretrained(tmp_path)
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is StableDiffusionXLImg2ImgPipeline
    assert ldm_pipeline.load(tmp_path).unet.config.addition_time_embed_dim == 8


@pytest.mark.parametrize("name", [*ALONE, "euler", "ddim", "ddpm"])
def test_two_parts_are_the_whole(xl: dict[str, Any], name: str) -> None:
    native = {} if name.endswith("Scheduler") else {"sampler": name}
    ours, _ = both(xl, **({} if native else {"scheduler": scheduler_of(name)}))
    told: dict[str, Any] = {"prompt": "a red star", "num_inference_steps": 5, **native}
    told |= {"output_type": "latent"}

    def run(**part: Any) -> torch.Tensor:
        images: torch.Tensor = ours(generator=generator, **told, **part).images
        return images

    generator = seeded(3)[0]
    whole = run()
    generator = seeded(3)[0]
    left = run(denoising_end=0.6)
    assert ours.num_timesteps < 5
    assert torch.equal(whole, run(denoising_start=0.6, latents=left))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"denoising_end": 0.0}, "must lie between 0 and 1"),
        ({"denoising_start": 1.0}, "must lie between 0 and 1"),
        ({"denoising_start": 0.5}, "goes on from latents"),
        ({"denoising_start": 0.6, "denoising_end": 0.5}, "must lie below denoising_end"),
        ({"denoising_end": 0.001}, "none of the 3 steps begins there"),
        ({"prompt_2": ["one", "two"]}, "prompt_2 has 2 texts for 1 prompts"),
        ({"original_size": 512}, "must be two whole numbers"),
        ({"target_size": (512, -1)}, "at least 0"),
        ({"clip_skip": 3}, "clip_skip=3 is more than the 2 layers"),
        ({"callback_on_step_end_tensor_inputs": ["negative_prompt_embeds"]}, "is not known"),
        ({"negative_prompt_2": "fog", "negative_prompt_embeds": "…"}, "were both passed"),
        ({"negative_prompt_embeds": "…"}, "belong together"),
        (
            {"negative_prompt_embeds": "…", "negative_pooled_prompt_embeds": "short"},
            "negative_pooled_prompt_embeds has 20 channels, and this model's UNet reads 24 or 32",
        ),
    ],
    ids=str,
)
def test_refusals(xl: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    ours, _ = both(xl)
    given = {
        name: {"…": torch.zeros(1, 77, 64), "short": torch.zeros(1, 20)}.get(str(value), value)
        for name, value in arguments.items()
    }
    if message.startswith("none of"):
        given["latents"], given["denoising_start"] = torch.zeros(1, 4, 16, 16), 0.999
        del given["denoising_end"]
    with pytest.raises(UserError, match=message):
        ours(**SHORT, **given)


# -- folders -------------------------------------------------------------------------------------


def test_folders_go_both_ways(xl: dict[str, Any], tmp_path: Path) -> None:
    ours, _ = both(xl)
    expected = ours("a red star", num_inference_steps=2, seed=1, output_type="latent").images
    ours.save_pretrained(tmp_path)
    contents = json.loads((tmp_path / "model_index.json").read_text())
    assert contents["_class_name"] == "StableDiffusionXLPipeline"
    stock = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock) is StableDiffusionXLPipeline
    again = []
    for pipe in (
        LatentDiffusionXLPipeline.from_pretrained(tmp_path),
        LatentDiffusionXLPipeline.from_pipe(stock),
    ):
        pipe.set_progress_bar_config(disable=True)
        again += [pipe("a red star", num_inference_steps=2, seed=1, output_type="latent").images]
    assert torch.equal(*again)
    # Weights mapped from a file start at any byte, and some processors sum those in another order.
    torch.testing.assert_close(again[0], expected, atol=2e-5, rtol=0.0)
    assert set(ours.components) == set(stock.components)
    assert StableDiffusionXLPipeline.from_pipe(ours).unet is ours.unet
