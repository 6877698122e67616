"""The LoRA objective: encoded once, drawn anew; the adapter alone learns; stock reads the file."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm_pipeline import LatentDiffusionPipeline
from ldm_pipeline.commands.lora_info import describe
from ldm_pipeline.data import captioned as dataset
from ldm_pipeline.diffusion.losses import Loss, denoising_errors, loss_weights
from ldm_pipeline.diffusion.prediction import target
from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.attach import attach
from ldm_pipeline.lora.files import inspect, load_whole
from ldm_pipeline.lora.layouts.families import FAMILIES
from ldm_pipeline.models import autoencoder, text
from ldm_pipeline.models.unet import bind
from ldm_pipeline.training import checkpoint
from ldm_pipeline.training.captioned import Captioned, Sample
from ldm_pipeline.training.engine import Interrupted, fit
from ldm_pipeline.training.lora import LoraConfig, LoraObjective
from ldm_pipeline.training.lora_export import origin, shared_words
from ldm_pipeline.training.objective import Batch
from tests.training import laws
from tests.training.conftest import captioned

SIZES = [(64, 64), (64, 64), (96, 32), (32, 128), (64, 64), (96, 32), (64, 64)]


class Counted:
    """Opens the tiny pipeline, and counts what its autoencoder and text encoder are asked."""

    def __init__(self, tiny: Any) -> None:
        self.tiny = tiny
        self.calls = {"vae": 0, "text_encoder": 0}
        self.opened = 0

    def __call__(self, source: str, dtype: torch.dtype) -> LatentDiffusionPipeline:
        pipe = LatentDiffusionPipeline(**copy.deepcopy(self.tiny())).to(dtype)
        self.opened += 1
        pipe.vae.encoder.register_forward_hook(lambda *_: self._count("vae"))
        pipe.text_encoder.register_forward_hook(lambda *_: self._count("text_encoder"))
        return pipe

    def _count(self, name: str) -> None:
        self.calls[name] += 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven captioned pictures of three shapes; one has a mask."""
    place = captioned(tmp_path / "pictures", SIZES)
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[:, :32] = 255
    Image.fromarray(mask).save(place / "0.mask.png")
    return place


@pytest.fixture
def opened(tiny: Any) -> Counted:
    return Counted(tiny)


def config_of(folder: Path, **told: Any) -> LoraConfig:
    """A configuration of a short run; `told` replaces whole sections' fields."""
    values: dict[str, Any] = {
        "run": {
            "out": folder.parent / "run", "batch_size": 4, "steps": 6, "workers": 0,
            "mixed_precision": "no", "log_every": 1, "validate_every": 3, "save_every": 100,
        },
        "optimiser": {"lr": 1e-2, "warmup_steps": 0, "ema_decay": 0.0},
        "data": {
            "source": str(folder), "resolution": 64, "bucket_step": 32,
            "cache": folder.parent / "cache", "held_out": 0.2,
        },
        "lora": {"rank": 4},
    }  # fmt: skip
    for section, fields in told.items():
        values[section] = {**values.get(section, {}), **fields}
    return LoraConfig.model_validate(values)


# -- data ------------------------------------------------------------------------------------


def test_the_laws_of_objectives(folder: Path, opened: Counted) -> None:
    objective = LoraObjective(config_of(folder, data={"fixed": True}), opened)
    whole = laws.batch_of(objective, range(4, 8))
    torch.rand(3)
    again = laws.batch_of(objective, range(4, 8))
    other = laws.batch_of(objective, range(8, 12))
    for name, value in whole["groups"][0].items():
        assert torch.equal(value, again["groups"][0][name]), name
        if name not in ("weight", "mask"):
            assert not torch.equal(value, other["groups"][0][name]), name
    laws.everything_trained_has_a_gradient(objective)


def test_after_caching_no_encoder_is_called(folder: Path, opened: Counted) -> None:
    """Not in the first run after the cache is whole, and not at all in the second."""
    config = config_of(folder, data={"captions": {"dropout": 0.5, "shuffle_tags": True}})
    objective = LoraObjective(config, opened)
    asked = dict(opened.calls)
    assert asked["vae"] == len(objective.data.sizes), "all pictures of a size in one call"
    fit(objective, config)
    assert opened.calls == asked
    LoraObjective(config, opened)
    assert opened.calls == asked


def test_editing_one_picture_encodes_that_one_anew(folder: Path, opened: Counted) -> None:
    LoraObjective(config_of(folder), opened)
    before = opened.calls["vae"]
    Image.new("RGB", (64, 64), "red").save(folder / "4.png")
    LoraObjective(config_of(folder), opened)
    assert opened.calls["vae"] == before + 1
    mask = np.zeros((64, 64), dtype=np.uint8)
    Image.fromarray(mask + 9).save(folder / "0.mask.png")
    LoraObjective(config_of(folder), opened)
    assert opened.calls["vae"] == before + 2


def test_the_cached_latents_are_those_of_the_pictures(folder: Path, opened: Counted) -> None:
    objective = LoraObjective(config_of(folder), opened)
    pipe = opened("", torch.float32)
    for sample in objective.data.every():
        pixels = sample.transform.picture(dataset.load(sample.item).pixels)
        x = torch.tensor(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            mean, std = autoencoder.encode(pipe.vae, x)
        entry = objective.latents[sample.key]
        # float16 has 11 bits.
        assert torch.allclose(entry["mean"].float(), mean[0], rtol=2**-11, atol=1e-6)
        assert torch.allclose(entry["std"].float(), std[0], rtol=2**-11, atol=1e-6)
        assert ("mask" in entry) == (sample.item.key == "0.png")


def test_an_epoch_has_every_picture_once_and_no_held_out_one(folder: Path, opened: Counted) -> None:
    data = LoraObjective(config_of(folder), opened).data
    assert len(data.held_out) == 1
    assert data.epoch == 6
    for epoch in range(4):
        seen = [data.sample(epoch * 6 + i).key for i in range(6)]
        assert sorted(seen) == sorted(sample.key for sample in data.samples)
        assert data.held_out[0].key not in seen


def test_a_bad_picture_is_named_and_left_out_or_stops(
    folder: Path, opened: Counted, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "2.png").write_bytes(b"no picture")
    whole = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(whole[: len(whole) // 2])
    objective = LoraObjective(config_of(folder), opened)
    assert len(objective.data.every()) == len(SIZES) - 2
    for name in ("2.png", "3.png"):
        assert str(folder / name) in caplog.text
    with pytest.raises(UserError, match=r"2\.png"):
        LoraObjective(config_of(folder, data={"strict": True}), opened)


def test_bad_data_is_refused_before_a_model_is_opened(tmp_path: Path, opened: Counted) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no pictures"):
        LoraObjective(config_of(tmp_path / "empty"), opened)
    assert opened.opened == 0


def test_pictures_without_words_are_refused_or_counted(
    folder: Path, opened: Counted, caplog: pytest.LogCaptureFixture
) -> None:
    """Some may have none; all of them only where a default says what they get."""
    texts = sorted(folder.glob("*.txt"))
    for file in texts[:2]:
        file.unlink()
    data = config_of(folder).data
    Captioned(data, 0, 4)
    assert f"2 of {len(SIZES)} pictures of {folder} have no caption" in caplog.messages
    for file in texts[2:]:
        file.unlink()
    texts[-1].write_text("")  # which says nothing, either
    caplog.clear()
    with pytest.raises(UserError, match=r"no picture of data\.source=.* data\.captions\.default"):
        LoraObjective(config_of(folder), opened)
    assert opened.opened == 0
    said = config_of(folder, data={"captions": {"default": ""}})
    assert Captioned(said.data, 0, 4).texts()[0] == ""
    assert "caption" not in caplog.text


def test_what_to_begin_from_is_looked_at_before_a_model_is_opened(
    folder: Path, opened: Counted, tmp_path: Path
) -> None:
    other = tmp_path / "model.safetensors"
    save_file({"unet.weight": torch.zeros(1)}, other)
    for place, said in ((tmp_path, "there is no LoRA file"), (other, "is no LoRA in a layout")):
        config = config_of(folder).model_copy(update={"begin_from": place})
        with pytest.raises(UserError, match=f"begin_from: .*{said}"):
            LoraObjective(config, opened)
    assert opened.opened == 0


# -- the loss --------------------------------------------------------------------------------


def test_the_loss_is_the_weighted_mean_over_all_samples(folder: Path, opened: Counted) -> None:
    """By hand, one sample at a time: groups, masks, weights and levels change nothing else."""
    told = {"weighting": "min_snr", "huber": 0.5}
    config = config_of(folder, loss=told, data={"held_out": 0.0})
    objective = LoraObjective(config, opened)
    batch = objective.batch(range(7))
    assert len(batch["groups"]) == 3
    with torch.no_grad():
        losses = objective(batch)
    pipe = opened("", torch.float32)
    total = 0.0
    for position in range(7):
        (group,) = objective.batch(range(position, position + 1))["groups"]
        with torch.no_grad():
            error = denoising_errors(
                bind(pipe.unet, group["embeds"]), objective.schedule, objective.kind,
                group["z"], group["eps"], group["t"], huber=0.5, mask=group["mask"],
            )  # fmt: skip
        weight = loss_weights(objective.kind, objective.schedule, group["t"], Loss("min_snr"))
        total += float(error * weight)
    # Sums of seven float32 numbers, from batches of other sizes.
    assert float(losses["loss"]) == pytest.approx(total / 7, rel=1e-4)


def test_regularisation_pictures_come_as_often_and_count_as_told(
    folder: Path, opened: Counted, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    for i in range(4):
        Image.new("RGB", (64, 64), (i, 0, 0)).save(kept / f"{i}.png")
    told = {"regularisation": str(kept), "regularisation_weight": 0.25}
    data = LoraObjective(config_of(folder, data=told), opened).data
    for epoch in range(3):
        epochs = [data.sample(epoch * data.epoch + i).item for i in range(data.epoch)]
        weights = [item.weight for item in epochs if item.regularisation]
        assert weights == [0.25] * 6
        assert sum(not item.regularisation for item in epochs) == 6
    seen = {data.sample(i).item.key for i in range(2 * data.epoch)}
    assert {f"regularisation:{i}.png" for i in range(4)} <= seen


def calls_of(unet: Any) -> list[int]:
    """A list that gets the batch size of each call of the UNet from now on."""
    sizes: list[int] = []
    unet.conv_in.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    return sizes


@pytest.mark.parametrize("text_encoder", [False, True])
@torch.no_grad()
def test_what_regularises_may_be_the_model_s_own_answers(
    folder: Path, opened: Counted, tmp_path: Path, text_encoder: bool
) -> None:
    """Those of the model without the adapter, about regularisation pictures alone; what is to be
    learnt is still what its pictures show."""
    kept = captioned(tmp_path / "kept", [(64, 64)] * 3)

    def objective(how: str) -> LoraObjective:
        told: dict[str, Any] = {
            "loss": {"regularise_to": how},
            "lora": {"text_encoder": text_encoder},
        }
        data = {"regularisation": str(kept), "resolution": 64, "fixed": True}
        made = LoraObjective(config_of(folder, data=data, **told), opened)
        generator = torch.Generator().manual_seed(0)
        for value in made.adapter.parameters.values():
            value.add_(0.2 * torch.randn(value.shape, generator=generator))
        return made

    pictures, answers, base = objective("pictures"), objective("answers"), opened("", torch.float32)
    (group,) = answers.batch(range(8))["groups"]
    assert set(group["regularises"].tolist()) == {True, False}
    sizes = calls_of(answers.unet)
    from_pictures, from_answers = (o._errors(o._ready(group)) for o in (pictures, answers))
    assert sizes == [int(group["regularises"].sum()), 8], "asked about no other picture"
    encoded = answers._encoded(group)
    a, sig = answers.schedule.coefficients(group["t"], like=group["z"])
    x = a * group["z"] + sig * group["eps"]
    said = answers.conditioning.network(answers.unet, encoded)(x, group["t"])
    embeds = base.text_encoder(group["tokens"])[0] if text_encoder else group["embeds"]
    own = base.unet(x, group["t"], encoder_hidden_states=embeds).sample
    apart = (said - own).square().flatten(1).mean(dim=1)
    assert apart.min() > 1e-4
    expected = torch.where(group["regularises"], apart, from_pictures)
    assert torch.allclose(from_answers, expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_batch_without_regularisation_learns_what_its_pictures_show(
    folder: Path, opened: Counted, tmp_path: Path
) -> None:
    """Whose pictures they are is chance, in a small batch: the model's answer counts for none."""
    kept = captioned(tmp_path / "kept", [(64, 64)])
    data = {"regularisation": str(kept), "resolution": 64, "fixed": True}
    made = config_of(folder, data=data, loss={"regularise_to": "answers"})
    objective = LoraObjective(made, opened)
    batches = (objective.batch(range(i, i + 1))["groups"][0] for i in range(20))
    group = next(group for group in batches if not group["regularises"].any())
    ready = objective._ready(group)
    told = target(
        objective.kind,
        group["z"],
        group["eps"],
        *objective.schedule.coefficients(group["t"], like=group["z"]),
    )
    assert torch.equal(ready["wanted"], told)


@torch.no_grad()
def test_a_validation_asks_the_model_itself_nothing(folder: Path, opened: Counted) -> None:
    """What is held out regularises nothing."""
    calls = []
    for how in ("pictures", "answers"):
        data = {"regularisation": str(folder), "fixed": True}
        objective = LoraObjective(config_of(folder, data=data, loss={"regularise_to": how}), opened)
        sizes = calls_of(objective.unet)
        objective.validate()
        calls.append(len(sizes))
    assert calls[0] == calls[1] > 0


@pytest.mark.parametrize(
    ("loss", "data", "why"),
    [
        ({}, {}, r"needs data\.regularisation"),
        (
            {"zero_terminal_snr": True},
            {"regularisation": "others"},
            r"goes without loss\.zero_terminal_snr",
        ),
    ],
)
def test_own_answers_need_a_question_and_their_own_levels(
    folder: Path, loss: dict[str, Any], data: dict[str, Any], why: str
) -> None:
    with pytest.raises(ValueError, match=f"loss\\.regularise_to=answers {why}"):
        config_of(folder, loss={"regularise_to": "answers", **loss}, data=data)


def test_dropped_captions_are_the_empty_text(folder: Path, opened: Counted) -> None:
    objective = LoraObjective(config_of(folder, data={"captions": {"dropout": 0.25}}), opened)
    pipe = opened("", torch.float32)
    with torch.no_grad():
        empty = text.encode(pipe.tokenizer, pipe.text_encoder, [""])[0]
    groups = [g for i in range(100) for g in objective.batch(range(4 * i, 4 * i + 4))["groups"]]
    # Batches of other sizes round otherwise.
    dropped = sum(
        int(torch.isclose(row, empty, atol=1e-5).all()) for g in groups for row in g["embeds"]
    )
    # 400 draws at 0.25: 3.5 standard deviations either way.
    assert 70 <= dropped <= 130


@pytest.mark.parametrize("text_encoder", [False, True])
def test_the_adapter_alone_is_trained(folder: Path, opened: Counted, text_encoder: bool) -> None:
    config = config_of(folder, lora={"text_encoder": text_encoder})
    objective = LoraObjective(config, opened)
    trained = {id(p) for p in objective.parameters() if p.requires_grad}
    assert trained == {id(p) for p in objective.adapter.parameters.values()}
    components = {name.partition(".")[0] for name in objective.adapter.parameters}
    assert components == ({"unet", "text_encoder"} if text_encoder else {"unet"})
    frozen = {n: p.clone() for n, p in objective.named_parameters() if not p.requires_grad}
    before = objective.validate()
    fit(objective, config)
    for name, value in frozen.items():
        assert torch.equal(value, objective.get_parameter(name)), name
    assert objective.validate() != before


class Half(LoraObjective):
    """Whose base is in bfloat16, as on a GPU."""

    def _dtype(self) -> torch.dtype:
        return torch.bfloat16


def test_a_base_in_half_precision_trains_and_is_validated(folder: Path, opened: Counted) -> None:
    config = config_of(folder, run={"mixed_precision": "bf16"})
    objective = Half(config, opened)
    assert objective.unet.dtype == torch.bfloat16
    fit(objective, config)
    assert all(p.dtype == torch.float32 for p in objective.adapter.parameters.values())
    scores = objective.validate()
    assert 0 < scores["loss"] < 10


def test_zero_terminal_snr_is_for_v_prediction(folder: Path, opened: Counted) -> None:
    config = config_of(folder, loss={"zero_terminal_snr": True})
    with pytest.raises(UserError, match="needs a v-prediction model"):
        LoraObjective(config, opened)


# -- the run ---------------------------------------------------------------------------------


def drawn(pipe: Any) -> Tensor:
    """A picture of a trained model."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    told = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "pt"}
    return pipe("red, blue", generator=generator, **told).images


def test_every_format_draws_what_was_trained(folder: Path, opened: Counted, tiny: Any) -> None:
    """Stock diffusers reads kohya's through its own converter; ours reads PEFT's."""
    config = config_of(folder, lora={"formats": ["kohya", "peft"], "text_encoder": True})
    objective = LoraObjective(config, opened)
    with torch.no_grad():
        for parameter in objective.adapter.parameters.values():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    objective.export(folder.parent / "out", 5)
    parts = {**copy.deepcopy(tiny()), **objective.adapter.models}
    trained = drawn(StableDiffusionPipeline(**parts, requires_safety_checker=False))
    for name in ("pytorch_lora_weights.safetensors", "kohya.safetensors", "peft"):
        stock = StableDiffusionPipeline(**copy.deepcopy(tiny()), requires_safety_checker=False)
        place = folder.parent / "out" / name
        if name == "peft":
            attach(stock, [(place, 1.0)])
        else:
            stock.load_lora_weights(place)
        assert (drawn(stock) - trained).abs().max() <= 1e-6, name
        told = "\n".join(describe(inspect(place), load_whole(place)))
        assert "base model: bundled, Stable Diffusion 1.x" in told, name
        assert "trained words: red blue" in told, name
    texts = inspect(folder.parent / "out" / "kohya.safetensors").texts
    assert (texts["ss_steps"], texts["ss_max_train_steps"]) == ("5", "6")
    assert texts["ss_base_model_version"] == "sd_v1"
    assert float(texts["ss_learning_rate"]) == 1e-2
    counts = json.loads(texts["ss_tag_frequency"])["captions"]
    assert (counts["red"], counts["blue"], len(counts)) == (6, 6, 8), "the held-out one is not seen"


def test_a_word_that_all_captions_share_is_told_once() -> None:
    assert shared_words(["a red cactus left of a star", "a cactus"]) == "a cactus"


def test_a_header_says_which_model_but_not_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "mine.safetensors").touch()
    for model, named in [
        ("models/mine", "mine"),
        (str(tmp_path / "models" / "mine"), "mine"),
        ("./mine.safetensors", "mine.safetensors"),
        ("owner/name", "owner/name"),
        ("bundled", "bundled"),
    ]:
        assert origin(model, FAMILIES["sd1"], [])["ss_sd_model_name"] == named


def test_stock_diffusers_draws_what_was_trained(folder: Path, opened: Counted, tiny: Any) -> None:
    """The picture of the network with the adapter still in it, of the file loaded in stock, and of
    the file as the start of another run, which moves no weight before its first step."""
    config = config_of(folder)
    objective = LoraObjective(config, opened)
    final = fit(objective, config)
    base = drawn(StableDiffusionPipeline(**copy.deepcopy(tiny()), requires_safety_checker=False))
    parts = {**copy.deepcopy(tiny()), "unet": objective.unet}
    trained = drawn(StableDiffusionPipeline(**parts, requires_safety_checker=False))
    stock = StableDiffusionPipeline(**copy.deepcopy(tiny()), requires_safety_checker=False)
    stock.load_lora_weights(final)
    # The same float32 numbers, multiplied in the same order.
    assert torch.allclose(drawn(stock), trained, atol=1e-6)
    assert not torch.allclose(base, trained, atol=1e-3)
    again = LoraObjective(config.model_copy(update={"begin_from": final}), opened)
    for name, value in objective.adapter.parameters.items():
        assert torch.equal(value, again.adapter.parameters[name]), name


def test_a_run_goes_on_from_a_lower_rank(folder: Path, opened: Counted, tiny: Any) -> None:
    """It draws what the file draws, whatever its alpha, and what is new can learn; a higher rank,
    other modules and another kind are refused."""
    config = config_of(folder, lora={"rank": 3, "alpha": 6.0})
    final = fit(LoraObjective(config, opened), config)

    def begun(place: Path, **lora: Any) -> LoraObjective:
        told = config_of(folder, lora=lora).model_copy(update={"begin_from": place})
        return LoraObjective(told, opened)

    stock = StableDiffusionPipeline(**copy.deepcopy(tiny()), requires_safety_checker=False)
    stock.load_lora_weights(final)
    same: list[dict[str, Any]] = [
        {"rank": 3, "alpha": 1.0},
        {"rank": 8},
        {"rank": 8, "rslora": True},
    ]
    for lora in same:
        objective = begun(final, **lora)
        parts = {**copy.deepcopy(tiny()), "unet": objective.unet}
        picture = drawn(StableDiffusionPipeline(**parts, requires_safety_checker=False))
        assert torch.allclose(picture, drawn(stock), atol=1e-5), lora
        for name, value in objective.adapter.parameters.items():
            if name.endswith("lora_A.weight"):
                assert value.flatten(1).norm(dim=1).min() > 0, name
    other: list[tuple[dict[str, Any], str]] = [
        ({"rank": 2}, r"has the shape \[3, .*, not \[2, .*higher rank"),
        ({"rank": 3, "targets": "all"}, "does not adapt what"),
        ({"rank": 3, "text_encoder": True}, "does not adapt what"),
        ({"rank": 3, "dora": True}, "does not adapt what"),
    ]
    for lora, told in other:
        with pytest.raises(UserError, match=told):
            begun(final, **lora)


class Stopping(LoraObjective):
    """Gets a Ctrl-C while the first piece of a step is made."""

    stop_at: int

    def batch(self, positions: range) -> Batch:
        """The objective's batch."""
        if positions.start == self.stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return super().batch(positions)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_stop_leaves_no_trace(folder: Path, opened: Counted, accumulation: int) -> None:
    """Wherever it is stopped, within an epoch or at its end: adapter, average, optimiser and the
    order of samples, their words and noise are those of the run that never stopped."""
    told = {"batch_size": 3, "accumulation": accumulation, "validate_every": 100}
    captions = {"captions": {"dropout": 0.3, "shuffle_tags": True}}

    def config(out: str) -> LoraConfig:
        where = {"out": folder.parent / out}
        average = {"ema_decay": 0.9}
        return config_of(folder, run={**told, **where}, data=captions, optimiser=average)

    whole = config("whole")
    fit(LoraObjective(whole, opened), whole)
    for last in (0, 1, 4):
        broken = config(f"stopped in {last}")
        objective = Stopping(broken, opened)
        objective.stop_at = last * 3
        with pytest.raises(Interrupted, match=f"step {last + 1};"):
            fit(objective, broken)
        fit(LoraObjective(broken, opened), broken)
        one, other = (checkpoint.newest(c.run.out / "checkpoints") for c in (whole, broken))
        assert one is not None
        assert other is not None
        for part, tensors in checkpoint.load(one)[0].items():
            again = checkpoint.load(other)[0][part]
            assert tensors.keys() == again.keys()
            assert [n for n in tensors if not torch.equal(tensors[n], again[n])] == []
        files = [c.run.out / "final" / "pytorch_lora_weights.safetensors" for c in (whole, broken)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_latent_that_is_not_finite_is_named_and_not_kept(
    folder: Path, opened: Counted, tmp_path: Path
) -> None:
    def spoilt(source: str, dtype: torch.dtype) -> LatentDiffusionPipeline:
        pipe = opened(source, dtype)
        with torch.no_grad():
            pipe.vae.quant_conv.bias.fill_(torch.nan)
        return pipe

    with pytest.raises(UserError, match=r"\.png: its latents are not finite"):
        LoraObjective(config_of(folder), spoilt)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


class Spoilt(LoraObjective):
    """Whose sample 5 is not finite."""

    def _drawn(
        self, sample: Sample, position: int, share: float | None = None
    ) -> dict[str, Tensor]:
        drawn = super()._drawn(sample, position, share)
        return {**drawn, "z": drawn["z"] * torch.inf} if position == 5 else drawn


def test_a_gradient_that_is_not_finite_stops_with_the_pictures_name(
    folder: Path, opened: Counted
) -> None:
    config = config_of(folder, data={"held_out": 0.0})
    objective = Spoilt(config, opened)
    sample = objective.data.sample(5)
    with pytest.raises(FloatingPointError, match=re.escape(sample.item.picture.name)):
        fit(objective, config)


def test_pictures_show_the_prompts_without_and_with_the_adapter(
    folder: Path, opened: Counted
) -> None:
    """The left half stays, the right one changes; what is kept is the best and the last."""
    told = {"prompts": ["red, blue", "red"], "steps": 2}
    config = config_of(folder, pictures=told)
    objective = LoraObjective(config, opened)
    first = objective.picture()
    assert first is not None
    fit(objective, config)
    asked = opened.calls["text_encoder"]
    out = config.run.out
    names = sorted(path.name for path in (out / "pictures").iterdir())
    assert names == ["step-00000003.png", "step-00000006.png"]
    last = np.asarray(Image.open(out / "pictures" / names[1]))
    before = np.asarray(first)
    half = before.shape[1] // 2
    cell = slice(10, 200)
    assert np.array_equal(before[cell, :half][:, 10:-10], last[cell, :half][:, 10:-10])
    assert not np.array_equal(before[cell, half:], last[cell, half:])
    for kept in ("best", "final"):
        assert (out / kept / "pytorch_lora_weights.safetensors").is_file()
        assert (out / kept / "pictures.png").is_file()
        card = (out / kept / "README.md").read_text("utf-8")
        assert card.startswith("---\nbase_model: bundled\n")
        assert "![drawn without and with the adapter](pictures.png)" in card
        resolved = card.partition("```yaml\n")[2].partition("```")[0]
        assert LoraConfig.model_validate(yaml.safe_load(resolved)) == config
    assert opened.calls["text_encoder"] == asked
    assert objective._pipe is not None
    base = objective._pipe(
        "red, blue", height=64, width=64, num_inference_steps=2, guidance_scale=5.0,
        generator=torch.Generator().manual_seed(0), output_type="np",
    )  # fmt: skip
    assert base.images.shape == (1, 64, 64, 3)


def test_checkpointing_gradients_changes_no_gradient(folder: Path, opened: Counted) -> None:
    """Neither the UNet's nor the text encoder's, whose layers are both gone through twice."""
    gradients, passes = [], list[str]()
    for on in (False, True):
        told = {"lora": {"text_encoder": True}, "data": {"fixed": True}}
        config = config_of(folder, **told).model_copy(update={"gradient_checkpointing": on})
        objective = LoraObjective(config, opened)
        nn.Module.train(objective)
        passes[:] = []
        encoder: Any = objective.text_encoder
        for name, part in (
            ("unet", objective.unet.up_blocks[0].resnets[0]),
            ("text", next(m for n, m in encoder.named_modules() if n.endswith("layers.0.mlp"))),
        ):
            part.register_forward_pre_hook(lambda *_, name=name: passes.append(name))
        objective(objective.batch(range(4)))["loss"].backward()
        assert sorted(passes) == (["text"] * 2 + ["unet"] * 2 if on else ["text", "unet"])
        gradients.append({n: p.grad for n, p in objective.adapter.parameters.items()})
    assert any(name.startswith("text_encoder") for name in gradients[0])
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert gradient is not None
        assert other is not None
        # What is computed twice is computed in the same order.
        assert torch.allclose(gradient, other, rtol=1e-5, atol=1e-8), name


@pytest.mark.parametrize(
    "lora,said",
    [
        ({"targets": ["nowhere"]}, "nowhere"),
        ({"formats": ["kohya"], "overrides": {"nowhere": {"rank": 2}}}, "nowhere"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_before_anything_is_encoded(
    folder: Path, opened: Counted, tmp_path: Path, lora: dict[str, Any], said: str
) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match=said):
        LoraObjective(config_of(folder, lora=lora, data={"cache": str(cache)}), opened)
    assert not cache.exists()
