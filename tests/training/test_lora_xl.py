"""The LoRA objective on models of SDXL's shape: two text encoders, and how a picture was cut."""

from __future__ import annotations

import copy
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from ldm_pipeline import LatentDiffusionPipeline, LatentDiffusionXLPipeline
from ldm_pipeline.diffusion.losses import denoising_errors
from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.files import FILE_NAME
from ldm_pipeline.models.conditioning import conditioning_of
from ldm_pipeline.models.original.convert import to_file
from ldm_pipeline.training import adapting
from ldm_pipeline.training.encoding import text_key
from ldm_pipeline.training.engine import fit
from ldm_pipeline.training.lora import LoraObjective
from ldm_pipeline.training.opening import open_model
from tests.training import laws
from tests.training.test_lora_objective import config_of

# (width, height) -> time ids by hand: height and width before, top and left, height and width.
FIXED = {
    (64, 64): [64, 64, 0, 0, 64, 64],
    (150, 64): [64, 150, 0, 43, 64, 64],
    (128, 256): [256, 128, 32, 0, 64, 64],  # becomes 64 x 128
}
BUCKETED = {
    (64, 64): [64, 64, 0, 0, 64, 64],
    (150, 64): [64, 150, 5, 0, 32, 96],  # becomes 96 x 41
    (128, 256): [256, 128, 0, 8, 96, 32],  # becomes 48 x 96
}
ROOT = Path(__file__).parents[2]
CAPTIONS = ("red, blue", "a cat!", "42")


class Opened:
    """Opens the tiny SDXL pipeline, changed by `change`."""

    def __init__(self, tiny_xl: Any, change: Callable[[Any], None] = lambda pipe: None) -> None:
        self.tiny_xl, self.change = tiny_xl, change

    def __call__(self, source: str, dtype: torch.dtype) -> Any:
        pipe = StableDiffusionXLPipeline(**self.tiny_xl(), add_watermarker=False).to(dtype)
        pipe.set_progress_bar_config(disable=True)
        self.change(pipe)
        return pipe


@pytest.fixture
def opened(tiny_xl: Any) -> Opened:
    return Opened(tiny_xl)


@pytest.fixture
def stock(opened: Opened) -> Any:
    """A stock pipeline of the same weights."""
    return opened("", torch.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three captioned pictures of three shapes."""
    place = tmp_path / "pictures"
    place.mkdir()
    rng = np.random.default_rng(0)
    for i, ((width, height), caption) in enumerate(zip(FIXED, CAPTIONS, strict=True)):
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text(caption)
    return place


def short(folder: Path, **told: Any) -> Any:
    """A configuration of a run over three pictures, of which none is held out."""
    told["data"] = {"held_out": 0.0, "captions": {"dropout": 0.0}, **told.get("data", {})}
    return config_of(folder, **told)


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


# -- what the UNet is told ---------------------------------------------------------------------


@pytest.mark.parametrize(("fixed", "expected"), [(True, FIXED), (False, BUCKETED)])
def test_each_picture_tells_how_it_was_cut(
    folder: Path, opened: Opened, fixed: bool, expected: dict[tuple[int, int], list[int]]
) -> None:
    objective = LoraObjective(short(folder, data={"fixed": fixed}), opened)
    told = {
        objective.data.sample(i).transform.original: group["time_ids"][0].tolist()
        for i in range(3)
        for group in objective.batch(range(i, i + 1))["groups"]
    }
    assert told == expected


def test_what_is_cached_is_what_stock_encodes(folder: Path, opened: Opened, stock: Any) -> None:
    objective = LoraObjective(short(folder), opened)
    assert objective.texts is not None
    for caption in CAPTIONS:
        entry = objective.texts[text_key(caption)]
        with torch.no_grad():
            embeds, silent, pooled, silent_pooled = stock.encode_prompt(caption)
        # Batches of other sizes round otherwise.
        assert difference(entry["embeds"], embeds[0]) < 1e-5
        assert difference(entry["pooled"], pooled[0]) < 1e-5
        empty = objective.texts[text_key("")]
        assert torch.equal(empty["embeds"], silent[0])
        assert torch.equal(empty["pooled"], silent_pooled[0])


def test_models_that_hear_the_empty_text_are_told_it(
    folder: Path, tiny_xl: Any, stock: Any
) -> None:
    """`force_zeros_for_empty_prompt` is asked, and is part of the cache's key."""
    hearing = Opened(tiny_xl, lambda p: p.register_to_config(force_zeros_for_empty_prompt=False))
    zeros = LoraObjective(short(folder), Opened(tiny_xl))
    heard = LoraObjective(short(folder), hearing)
    assert zeros.texts is not None
    assert heard.texts is not None
    assert zeros.texts.folder != heard.texts.folder
    with torch.no_grad():
        embeds, _, pooled, _ = stock.encode_prompt("")
    assert difference(heard.texts[text_key("")]["embeds"], embeds[0]) < 1e-5
    assert difference(heard.texts[text_key("")]["pooled"], pooled[0]) < 1e-5
    assert zeros.texts[text_key("")]["embeds"].abs().max() == 0


def test_trained_encoders_say_what_is_cached(folder: Path, opened: Opened) -> None:
    """Before the first step, a dropped caption included: the same samples, the same loss."""
    told = {"captions": {"dropout": 0.5}}
    cached = LoraObjective(short(folder, data=told), opened)
    trained = LoraObjective(short(folder, data=told, lora={"text_encoder": True}), opened)
    said = torch.cat([g["said"] for g in trained.batch(range(8))["groups"]])
    assert 0 < said.sum() < 8, "some are dropped, some are not"
    with torch.no_grad():
        losses = [float(each(each.batch(range(8)))["loss"]) for each in (cached, trained)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_loss_is_that_of_the_stock_network(folder: Path, opened: Opened, stock: Any) -> None:
    """The UNet of the stock pipeline, called as that calls it, on the same samples."""
    objective = LoraObjective(short(folder), opened)
    total = 0.0
    for i in range(3):
        sample = objective.data.sample(i)
        (group,) = objective.batch(range(i, i + 1))["groups"]
        with torch.no_grad():
            embeds, _, pooled, _ = stock.encode_prompt(sample.item.captions[0])
            cut = sample.transform
            ids = stock._get_add_time_ids(
                cut.original[::-1], (cut.top, cut.left), cut.bucket[::-1], torch.float32, 24
            )
            added = {"text_embeds": pooled, "time_ids": ids}
            kind, schedule = objective.kind, objective.schedule

            def network(x: Tensor, t: Tensor, e: Tensor = embeds, a: Any = added) -> Tensor:
                return stock.unet(x, t, encoder_hidden_states=e, added_cond_kwargs=a).sample

            noisy = (group["z"], group["eps"], group["t"])
            total += float(denoising_errors(network, schedule, kind, *noisy))
    with torch.no_grad():
        loss = float(objective(objective.batch(range(3)))["loss"])
    assert loss == pytest.approx(total / 3, rel=1e-4)


# -- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text_encoder", [False, True])
def test_the_laws_of_objectives(folder: Path, opened: Opened, text_encoder: bool) -> None:
    told: dict[str, Any] = {"data": {"fixed": True}, "lora": {"text_encoder": text_encoder}}
    objective = LoraObjective(short(folder, **told), opened)
    whole = laws.batch_of(objective, range(4, 8))["groups"][0]
    torch.rand(3)
    again = laws.batch_of(objective, range(4, 8))["groups"][0]
    halves = [laws.batch_of(objective, range(i, i + 2))["groups"][0] for i in (4, 6)]
    for name, value in whole.items():
        assert torch.equal(value, again[name]), name
        assert torch.equal(value, torch.cat([half[name] for half in halves])), name
    laws.everything_trained_has_a_gradient(objective)
    components = {name.partition(".")[0] for name in objective.adapter.parameters}
    both = {"text_encoder", "text_encoder_2"} if text_encoder else set()
    assert components == {"unet"} | both
    trained = {id(p) for p in objective.parameters() if p.requires_grad}
    assert trained == {id(p) for p in objective.adapter.parameters.values()}


def drawn(pipe: Any) -> Tensor:
    """A picture with guidance, from words."""
    generator = torch.Generator().manual_seed(0)
    told = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "pt"}
    return pipe("red, blue", generator=generator, **told).images


def test_stock_diffusers_draws_what_was_trained(folder: Path, opened: Opened, stock: Any) -> None:
    config = short(folder, lora={"text_encoder": True})
    objective = LoraObjective(config, opened)
    final = fit(objective, config)
    with safe_open(final / FILE_NAME, framework="pt") as file:
        prefixes = {key.partition(".")[0] for key in file.keys()}  # noqa: SIM118  # no mapping
    assert prefixes == {"unet", "text_encoder", "text_encoder_2"}
    parts = {**opened.tiny_xl(), **objective.adapter.models}
    trained = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    trained.set_progress_bar_config(disable=True)
    base = drawn(stock)
    stock.load_lora_weights(final)
    # The same float32 numbers, multiplied in the same order.
    assert difference(drawn(stock), drawn(trained)) <= 1e-6
    assert difference(drawn(stock), base) > 1e-3
    for component in ("text_encoder", "text_encoder_2"):
        moved = [
            parameter
            for name, parameter in objective.adapter.parameters.items()
            if name.startswith(f"{component}.") and name.endswith("lora_B.weight")
        ]
        assert all(parameter.abs().max() > 0 for parameter in moved), component
    card = (final / "README.md").read_text("utf-8")
    assert "stable-diffusion-xl" in card
    assert "ldm generate" in card


class Half(LoraObjective):
    """Whose base is in bfloat16, as on a GPU."""

    def _dtype(self) -> torch.dtype:
        return torch.bfloat16


@pytest.mark.parametrize("text_encoder", [False, True])
def test_a_base_in_half_precision_trains_and_draws(
    folder: Path, tiny_xl: Any, text_encoder: bool
) -> None:
    """The autoencoder comes in float32, as from `open_model`; the pictures are drawn by stock."""
    config = short(
        folder,
        run={"mixed_precision": "bf16", "steps": 2, "validate_every": 1},
        data={"held_out": 0.4},
        lora={"text_encoder": text_encoder},
        pictures={"prompts": ["red, blue", "a cat"], "steps": 1},
    )
    objective = Half(config, Opened(tiny_xl, lambda pipe: pipe.vae.to(torch.float32)))
    first = objective.picture()
    assert first is not None
    fit(objective, config)
    last = np.asarray(Image.open(config.run.out / "pictures" / "step-00000002.png"))
    before = np.asarray(first)
    half, cell = before.shape[1] // 2, slice(10, 200)
    assert np.array_equal(before[cell, :half][:, 10:-10], last[cell, :half][:, 10:-10])
    assert not np.array_equal(before[cell, half:], last[cell, half:])
    assert 0 < objective.validate()["loss"] < 10


def test_buckets_are_refused_where_the_base_is_shared_out(
    folder: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes would call the network for another number of sizes, and wait for each other."""
    monkeypatch.setattr(adapting, "sharding", lambda state: True)
    with pytest.raises(UserError, match=r"set data\.fixed=true"):
        LoraObjective(short(folder), opened)
    LoraObjective(short(folder, data={"fixed": True}), opened)


# -- opening ---------------------------------------------------------------------------------------


def test_models_of_every_kind_are_opened(tmp_path: Path, tiny: Any, stock: Any) -> None:
    """By the pipeline that can draw with them, folders and single files; the autoencoder comes in
    float32."""
    stock.save_pretrained(tmp_path / "xl")
    LatentDiffusionPipeline(**tiny()).save_pretrained(tmp_path / "sd")
    to_file(tmp_path / "xl", tmp_path / "xl.safetensors")
    half = torch.bfloat16
    script = runpy.run_path(str(ROOT / "train" / "train_lora.py"))["open_model"]
    for name, kind in (
        ("xl", LatentDiffusionXLPipeline),
        ("xl.safetensors", LatentDiffusionXLPipeline),
        ("sd", LatentDiffusionPipeline),
    ):
        pipe = script(str(tmp_path / name), half)
        assert type(pipe) is kind
        found = {part: value.dtype for part, value in pipe.components.items() if is_net(value)}
        texts = dict.fromkeys((part for part in found if part.startswith("text_encoder")), half)
        assert found == {"vae": torch.float32, "unet": half, **texts}
    for weights in (tmp_path / "xl" / "unet").glob("*.safetensors"):
        weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UserError, match="pickled weights"):
        script(str(tmp_path / "xl"), torch.float32)


def is_net(part: Any) -> bool:
    return isinstance(part, nn.Module)


def test_sdxl_is_trained_from_a_folder_and_draws(folder: Path, tmp_path: Path, stock: Any) -> None:
    """As the script opens it: with pictures of every validation, and what stock then draws."""
    stock.save_pretrained(tmp_path / "xl")
    config = short(
        folder,
        run={"steps": 2, "validate_every": 1},
        data={"held_out": 0.4},
        pictures={"prompts": ["red, blue"], "steps": 1},
    ).model_copy(update={"model": str(tmp_path / "xl")})
    final = fit(LoraObjective(config, open_model), config)
    assert (config.run.out / "pictures" / "step-00000002.png").is_file()
    stock.load_lora_weights(final)


def test_other_kinds_of_models_are_refused(stock: Any, tiny: Any) -> None:
    refiner = copy.copy(stock)
    refiner.text_encoder = None
    with pytest.raises(UserError, match="none of Stable Diffusion"):
        conditioning_of(refiner)
    inpainting = LatentDiffusionPipeline(**tiny())
    inpainting.unet.register_to_config(in_channels=9)
    with pytest.raises(UserError, match="reads 9 channels, not 4"):
        conditioning_of(inpainting)


def test_a_scheduler_of_another_theory_is_refused(folder: Path, tiny_xl: Any) -> None:
    edm = Opened(tiny_xl, lambda pipe: pipe.scheduler.register_to_config(sigma_data=0.5))
    with pytest.raises(UserError, match="sigma_data"):
        LoraObjective(short(folder), edm)


def test_names_that_only_sdxl_has_are_refused_before_anything_is_encoded(
    folder: Path, opened: Opened, tmp_path: Path
) -> None:
    """The tiny UNet has one layer in each block; a reader would count them wrongly."""
    cache = tmp_path / "cache"
    told: dict[str, Any] = {"lora": {"formats": ["kohya"]}, "data": {"cache": str(cache)}}
    with pytest.raises(UserError, match="of 2 layers in each block; this one has 1"):
        LoraObjective(config_of(folder, **told), opened)
    assert not cache.exists()
