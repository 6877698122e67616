"""The laws of drawing out of a picture and into one, whatever the model draws.

pixel   uint8 values, of which the known ones must not change
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    LCMScheduler,
    StableDiffusionInpaintPipeline,
)
from PIL import Image

from ldm_pipeline import LatentDiffusionPipeline, load
from ldm_pipeline.errors import UserError
from ldm_pipeline.request import SAMPLER_NAMES, TASKS, Request
from tests.conftest import tiny_unet
from tests.parity.pairs import mask, picture
from tests.test_pipeline import SAME_PICTURE, draw, largest

HOLE = mask(soft=True)
EVERY_BYTE = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3))
"""A picture in which every value from 0 to 255 occurs."""


@pytest.fixture(scope="module")
def bounded(components: dict[str, Any]) -> Any:
    """A pipeline whose latents stay about 1 in size (see test_pipeline.py)."""
    config = {**components["scheduler"].config, "prediction_type": "v_prediction"}
    pipe = LatentDiffusionPipeline(**{**components, "scheduler": DDIMScheduler.from_config(config)})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def painting(parts: dict[str, Any], channels: int = 4) -> LatentDiffusionPipeline:
    """A pipeline with a UNet of 4 or 9 channels."""
    pipe = LatentDiffusionPipeline(**{**parts, "unet": tiny_unet(in_channels=channels)})
    pipe.set_progress_bar_config(disable=True)
    return pipe


# The known pixels stay --------------------------------------------------------------------------


def known(hole: Image.Image) -> np.ndarray:
    """Where a mask says that the picture stays."""
    return np.asarray(hole.convert("L")) < 128


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_pixels_outside_the_mask_stay(
    components: dict[str, Any], channels: int, output_type: str
) -> None:
    """Every byte of every picture of a batch, in every format; and only there, and only then."""
    pipe = painting(components, channels)
    pictures = [EVERY_BYTE, picture(seed=3)]
    chosen: dict[str, Any] = {
        "image": pictures,
        "mask_image": HOLE,
        "num_inference_steps": 2,
        "seed": 1,
    }
    stay = known(HOLE)
    for keep in (True, False):
        drawn = pipe(["a", "b"], **chosen, keep_unmasked=keep, output_type=output_type).images
        if output_type == "pt":
            drawn = drawn.permute(0, 2, 3, 1).numpy()
        for image, given in zip(drawn, pictures, strict=True):
            bytes_ = np.asarray(image)
            if output_type != "pil":
                bytes_ = (bytes_ * 255).round().astype(np.uint8)
            assert (bytes_[stay] == np.asarray(given)[stay]).all() == keep
            assert not (bytes_[~stay] == np.asarray(given)[~stay]).all()


def test_pixels_stay_in_half_precision(tiny: Callable[..., dict[str, Any]]) -> None:
    pipe = LatentDiffusionPipeline(**tiny()).to(torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    chosen: dict[str, Any] = {"image": EVERY_BYTE, "mask_image": HOLE, "num_inference_steps": 1}
    (drawn,) = pipe("a", **chosen, keep_unmasked=True).images
    assert (np.asarray(drawn)[known(HOLE)] == np.asarray(EVERY_BYTE)[known(HOLE)]).all()


@pytest.mark.parametrize("pad", [0, 5])
def test_pixels_outside_the_mask_stay_where_a_part_is_drawn(ours: Any, pad: int) -> None:
    """At the picture's own size, also under the grey of a soft mask."""
    whole, hole = picture(90, 50), np.zeros((50, 90), dtype=np.uint8)
    hole[8:18, 10:30] = np.linspace(30, 255, 20).astype(np.uint8)
    chosen = {"image": whole, "mask_image": Image.fromarray(hole), "num_inference_steps": 2}
    stay = hole < 128
    for keep in (True, False):
        (drawn,) = ours("a", **chosen, padding_mask_crop=pad, keep_unmasked=keep, seed=1).images
        assert drawn.size == (90, 50)
        assert (np.asarray(drawn)[stay] == np.asarray(whole)[stay]).all() == keep
        assert not (np.asarray(drawn)[~stay] == np.asarray(whole)[~stay]).all()


@pytest.mark.parametrize("sampler", [None, "ddpm", "dpmpp_2m", "lcm", "unipc", "kdpm2_a"])
def test_known_latents_stay(ours: Any, sampler: str | None) -> None:
    """Where the mask is 0 the run ends at the picture's own latents, to the last bit."""
    z = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    hole = torch.zeros(1, 1, 32, 32)
    hole[..., 16:] = 1
    for strength in (0.5, 1.0):
        chosen = {"image": z, "mask_image": hole, "strength": strength, "sampler": sampler}
        x = draw(ours, ["a", "b"], **chosen)
        assert torch.equal(x[..., :8], z[..., :8])
        assert not torch.equal(x[..., 8:], z[..., 8:])


# One seed, one picture --------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [None, "ddpm", "lcm", "dpmpp_2m_sde"])
@pytest.mark.parametrize("hole", [None, HOLE], ids=["out of a picture", "into a picture"])
def test_an_image_does_not_depend_on_its_batch(
    bounded: Any, sampler: str | None, hole: Image.Image | None
) -> None:
    """One picture for all, drawn with seeds: the encoder's noise, too, is each image's own."""
    prompts = ["a red star", "a blue boat", "two hearts", "a moon"]
    chosen: dict[str, Any] = {"image": picture(), "mask_image": hole, "sampler": sampler}
    chosen |= {"strength": 0.6, "guidance_scale": 2.0}
    alone = [draw(bounded, text, seed=10 + i, **chosen) for i, text in enumerate(prompts)]
    for size in (2, 4):
        batch = draw(bounded, prompts[:size], seed=10, **chosen)
        for i in range(size):
            assert largest(batch[i : i + 1], alone[i]) < SAME_PICTURE
    assert largest(alone[0], draw(bounded, prompts[0], seed=99, **chosen)) > 0.01


def test_out_of_a_picture_a_seed_is_a_generator(ours: Any) -> None:
    seeds = (5, 6)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    chosen = {"image": picture(), "sampler": "ddpm"}
    same = draw(ours, ["a", "b"], **chosen, seed=seeds)
    assert torch.equal(same, draw(ours, ["a", "b"], **chosen, generator=generators))


# Any strength, any number of steps --------------------------------------------------------------


def schedulers() -> list[Any]:
    return [None, *SAMPLER_NAMES, "LCMScheduler"]


@pytest.mark.parametrize("sampler", schedulers())
def test_any_strength_with_any_number_of_steps(
    components: dict[str, Any], sampler: str | None
) -> None:
    """At least one step is run, where stock runs none and fails; all, where all are asked for."""
    parts = dict(components)
    if sampler == "LCMScheduler":
        parts["scheduler"], sampler = LCMScheduler.from_config(parts["scheduler"].config), None
    pipe = painting(parts)
    calls: list[int] = []

    def count(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        calls.append(i)
        return {}

    for strength, n in ((0.01, 1), (0.1, 4), (0.5, 3), (1.0, 1)):
        for hole, exact in ((None, False), (HOLE, False), (None, True)):
            if exact and strength < 0.1:
                continue  # a grid of hundreds of steps, which some take a second to make
            chosen: dict[str, Any] = {"image": picture(), "mask_image": hole}
            chosen |= {"strength": strength}
            chosen |= {"num_inference_steps": n, "guidance_scale": 1.0, "sampler": sampler}
            calls.clear()
            x = draw(pipe, "a", **chosen, exact_steps=exact, callback_on_step_end=count)
            assert x.isfinite().all()
            # Second-order ones visit up to twice as many levels as they make steps.
            least = n if exact else max(1, int(n * strength))
            assert least <= len(calls) <= max(2 * least, n if sampler == "lcm" else 0)


def test_exact_steps_begin_where_the_strength_says(ours: Any) -> None:
    """Eight steps at strength a half are the last eight of sixteen."""
    chosen = {"image": picture(), "strength": 0.5, "seed": 1}
    for sampler in (None, "euler", "unipc"):
        exact = draw(ours, "a", **chosen, sampler=sampler, num_inference_steps=8, exact_steps=True)
        twice = draw(ours, "a", **chosen, sampler=sampler, num_inference_steps=16)
        assert torch.equal(exact, twice)
    levels = {"timesteps": [801, 401, 1], "num_inference_steps": None, "sampler": "ddim"}
    seen: list[int] = []

    def note(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(int(t))
        return {}

    draw(ours, "a", **chosen, **levels, exact_steps=True, callback_on_step_end=note)
    assert seen == [801, 401, 1], "levels that were chosen are all run"


# What is asked for ------------------------------------------------------------------------------


def test_the_inputs_choose_the_task() -> None:
    inputs: dict[str, Any] = {"image": picture(), "mask_image": HOLE}
    for task in TASKS:
        request = Request(prompt="a", **{name: inputs[name] for name in task.needs})
        assert request.task is task
        assert request.share == task.strength
    assert Request(prompt="a", image=picture(), strength=0.3).share == 0.3
    assert [task.strength for task in TASKS] == [1.0, 0.8, 1.0], "stock's defaults"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"mask_image": HOLE}, "mask_image alone cannot be drawn from; pass image or image and mask"),
    ({"strength": 0.5}, "strength is for image-to-image and inpainting; pass image"),
    ({"exact_steps": True}, "exact_steps is for image-to-image and inpainting"),
    (
        {"image": picture(), "keep_unmasked": True},
        "keep_unmasked is for inpainting; pass image",
    ),
    ({"image": picture(), "padding_mask_crop": 4}, "padding_mask_crop is for inpainting"),
    ({"image": picture(), "strength": 0.0}, "strength=0.0 would draw nothing"),
    ({"image": picture(), "strength": 1.2}, "strength=1.2 must be a finite number, from 0 to 1"),
    ({"image": picture(), "strength": float("nan")}, "strength=nan"),
    ({"image": "cat.png"}, "image='cat.png' is a name; open the picture first"),
    ({"image": 3}, "image cannot be read"),
    ({"image": picture(1, 1)}, "image cannot be read: height and width must be > 0"),
    ({"image": torch.zeros(1, 1, 32, 32)}, "image has 1 channels"),
    ({"image": np.zeros((32, 32, 4))}, "image has 4 channels"),
    ({"image": torch.zeros(128, 128)}, "torch.float32 (128, 128); pass a PIL.Image, an array"),
    ({"image": [torch.zeros(128, 128)]}, "image cannot be read: torch.float32 (128, 128); pass"),
    ({"image": np.zeros((1, 128, 128))}, "image cannot be read: float64 (1, 128, 128); pass"),
    ({"image": np.zeros((3, 128, 128))}, "image has 128 channels; pass pictures of 3, as arrays"),
    ({"image": np.zeros((32, 32, 3), int)}, "image cannot be read: int64 (32, 32, 3)"),
    ({"image": [picture(), np.zeros((32, 32, 3))]}, "a list of Image and ndarray"),
    ({"image": picture().convert("F")}, "image has pixels of the kind F"),
    ({"image": picture(), "mask_image": HOLE.convert("I")}, "mask_image has pixels of the kind I"),
    ({"image": picture(), "mask_image": np.zeros((32, 32, 3))}, "mask_image has 3 channels"),
    (
        {"image": picture(), "mask_image": torch.zeros(1, 1, 0, 4)},
        "a tensor [1, H, W] of floats in [0, 1]",
    ),
    ({"image": torch.full((1, 3, 32, 32), 300.0)}, "image holds values outside of [0, 1]"),
    ({"image": torch.full((1, 3, 32, 32), -1.1)}, "image holds values outside of [0, 1]"),
    ({"image": np.full((32, 32, 3), 255, np.uint8)}, "divide those of 0 to 255 by 255"),
    ({"image": torch.full((1, 3, 32, 32), torch.nan)}, "image holds values that are not finite"),
    ({"image": torch.full((1, 4, 16, 16), torch.inf)}, "image holds values that are not finite"),
    (
        {"image": picture(), "mask_image": np.full((32, 32), np.nan)},
        "mask_image holds values that are not finite",
    ),
    ({"image": [picture()] * 3}, "image has 3 entries for 1 images"),
    ({"image": picture(), "latents": torch.zeros(1, 4, 8, 8)}, "it must be (1, 4, 16, 16)"),
    ({"image": picture(), "callback_on_step_end_tensor_inputs": ["mask"]}, "'mask' is not known"),
    ({"image": picture(), "mask_image": HOLE, "padding_mask_crop": -1}, "padding_mask_crop=-1"),
    ({"image": picture(), "mask_image": [HOLE] * 2}, "mask_image has 2 entries for 1 images"),
    ({"image": picture(), "mask_image": mask(16, 8), "padding_mask_crop": 1}, "image is 32x32"),
    (
        {"image": picture(), "mask_image": Image.new("L", (32, 32)), "padding_mask_crop": 1},
        "there is nothing to paint",
    ),
    (
        {"image": np.zeros((32, 32, 3)), "mask_image": HOLE, "padding_mask_crop": 1},
        "image must be a PIL.Image, not ndarray",
    ),
    (
        {"image": picture(), "mask_image": HOLE, "padding_mask_crop": 1, "output_type": "np"},
        "pass output_type='pil'",
    ),
    (
        {"image": picture(), "mask_image": HOLE, "keep_unmasked": True, "output_type": "latent"},
        "keep_unmasked keeps pixels",
    ),
    (
        {"image": torch.zeros(1, 4, 16, 16), "mask_image": HOLE, "keep_unmasked": True},
        "image holds latents",
    ),
    (
        {"image": picture(), "mask_image": HOLE, "masked_image_latents": torch.zeros(1, 4, 8, 8)},
        "masked_image_latents has shape (1, 4, 8, 8); it must be [images, 4, 16, 16]",
    ),
    (
        {"image": picture(), "mask_image": HOLE, "masked_image_latents": torch.zeros(3, 4, 16, 16)},
        "masked_image_latents has 3 rows for 1 images",
    ),
    (
        {"ip_adapter_image": picture(), "ip_adapter_image_embeds": []},
        "pass only one",
    ),
]


@pytest.mark.parametrize("wrong,message", WRONG, ids=[str(k) for k in range(len(WRONG))])
def test_mistakes_are_refused_before_any_network_runs(
    ours: Any, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any], message: str
) -> None:
    def called(*_: object, **__: object) -> None:
        raise AssertionError("a network was called")

    for part in ("unet", "vae", "text_encoder"):
        monkeypatch.setattr(getattr(ours, part), "forward", called)
    monkeypatch.setattr(ours.vae, "encode", called)
    with pytest.raises(UserError) as caught:
        ours("a red star", **wrong)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_unet_for_inpainting_says_what_it_needs(components: dict[str, Any]) -> None:
    pipe = painting(components, channels=9)
    nothing: dict[str, Any] = {}
    for inputs in (nothing, {"image": picture()}):
        with pytest.raises(UserError, match="9 channels: it paints into pictures; pass image and"):
            pipe("a", **inputs)
    with pytest.raises(UserError, match="pass masked_image_latents too"):
        pipe("a", image=torch.zeros(1, 4, 16, 16), mask_image=HOLE)
    with pytest.raises(UserError, match="reads 5 channels: it is neither"):
        painting(components, channels=5)("a")


def test_a_unet_for_inpainting_is_saved_for_stock_inpainting(
    components: dict[str, Any], tmp_path: Path
) -> None:
    pipe = painting(components, channels=9)
    pipe.save_pretrained(tmp_path)
    stock = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock) is StableDiffusionInpaintPipeline
    chosen = {"image": picture(), "mask_image": HOLE, "seed": 1}
    assert torch.equal(draw(load(tmp_path), "a", **chosen), draw(pipe, "a", **chosen))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_pictures_of_every_kind(ours: Any, mode: str) -> None:
    """As RGB, which they are turned into; stock takes four channels for latents."""
    given = picture().convert(mode)
    drawn = draw(ours, "a", image=given, seed=1)
    assert torch.equal(drawn, draw(ours, "a", image=given.convert("RGB"), seed=1))


def test_pixels_may_lie_a_little_beyond_their_range(ours: Any) -> None:
    """What rounding adds is no mistake; nor are pixels from -1 on, which stock takes too."""
    white = torch.ones(1, 3, 32, 32)
    for pixels in (white + 5e-4, -white - 5e-4):
        assert draw(ours, "a", image=pixels, seed=1).isfinite().all()


def test_image_to_image_takes_a_size_and_a_noise(ours: Any) -> None:
    """Neither is in stock: the picture is resized, and `latents` is the noise that is added."""
    assert draw(ours, "a", image=picture(), height=48, width=24, seed=1).shape == (1, 4, 24, 12)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    z = torch.zeros(1, 4, 16, 16)
    one = draw(ours, "a", image=z, latents=noise)
    again = draw(ours, "a", image=z, generator=torch.Generator().manual_seed(2))
    assert torch.equal(one, again)


def test_a_16_bit_picture_is_the_same_in_8_bits(ours: Any) -> None:
    levels = np.asarray(picture().convert("L"))
    wide = Image.fromarray(levels.astype(np.uint16) * 257)
    assert wide.mode == "I;16"
    drawn = [draw(ours, "a star", seed=1, image=each) for each in (wide, Image.fromarray(levels))]
    assert torch.equal(*drawn)
    dark = Image.fromarray(np.full((32, 32), 300, np.uint16))  # nearly black: nothing is painted
    kept = {"image": picture(), "keep_unmasked": True, "output_type": "pil"}
    (stays,) = ours("a red star", mask_image=dark, num_inference_steps=2, **kept).images
    assert stays.tobytes() == picture().tobytes()


def test_a_mask_of_true_and_false_is_one_of_1_and_0(ours: Any) -> None:
    hole = ~known(HOLE)
    masks = [hole, hole.astype(np.float32), torch.from_numpy(hole), torch.from_numpy(hole).float()]
    drawn = [draw(ours, "a star", seed=1, image=picture(), mask_image=each) for each in masks]
    assert all(torch.equal(drawn[0], other) for other in drawn[1:])


def test_a_mask_that_paints_nothing_is_told(ours: Any, caplog: pytest.LogCaptureFixture) -> None:
    barely = Image.fromarray(np.full((32, 32), 1, np.uint8))  # white would be 255
    draw(ours, "a red star", image=picture(), mask_image=barely)
    assert [record.getMessage() for record in caplog.records] == [
        "mask_image paints nothing: no pixel is lighter than half of white"
    ]
    caplog.clear()
    draw(ours, "a red star", image=picture(), mask_image=HOLE)
    assert not caplog.records
    with pytest.raises(UserError, match="there is nothing to paint"):
        ours("a red star", image=picture(), mask_image=barely, padding_mask_crop=1)


def test_a_damaged_picture_is_one_line(ours: Any, tmp_path: Path) -> None:
    picture(64, 64).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    with pytest.raises(UserError, match=r"image cannot be read: .*truncated"):
        ours("a red star", image=Image.open(tmp_path / "cut.png"))
