"""The LCM objective: one base that is student and teacher; stock parts agree on every number."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from ldm_pipeline import LatentDiffusionPipeline
from ldm_pipeline.data.captioned import load
from ldm_pipeline.data.world import World, held_out_caption
from ldm_pipeline.diffusion.grids import consistency_grid
from ldm_pipeline.errors import UserError
from ldm_pipeline.images import to_tensor
from ldm_pipeline.lora import files
from ldm_pipeline.lora.notes import LcmNote, read_note
from ldm_pipeline.models import autoencoder
from ldm_pipeline.training import checkpoint, world_pictures
from ldm_pipeline.training.config import validated
from ldm_pipeline.training.engine import Interrupted, fit
from ldm_pipeline.training.lcm import LcmConfig, LcmObjective
from ldm_pipeline.training.lcm_full import FullLcmObjective
from ldm_pipeline.training.objective import Batch
from ldm_pipeline.training.updates import MovingAverage
from tests.conftest import build, tiny_scheduler, tiny_small_vae
from tests.training import laws
from tests.training.conftest import captioned
from tests.training.tiny_lora import open_model

SIZES = [(64, 64)] * 4 + [(96, 32)] * 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six captioned pictures of two shapes; one has a mask."""
    place = captioned(tmp_path / "pictures", SIZES, "red")
    Image.fromarray(np.tri(64, dtype=np.uint8) * 255).save(place / "0.mask.png")
    return place


def config_of(folder: Path, **told: Any) -> LcmConfig:
    """A configuration of a short run; `told` replaces whole sections' fields."""
    values: dict[str, Any] = {
        "run": {
            "out": folder.parent / "run", "batch_size": 4, "steps": 4, "workers": 0,
            "mixed_precision": "no", "log_every": 1, "validate_every": 2, "save_every": 100,
            "log_with": "none",
        },
        "optimiser": {"lr": 1e-2, "warmup_steps": 0, "ema_decay": 0.0},
        "data": {
            "source": str(folder), "resolution": 64, "bucket_step": 32,
            "cache": folder.parent / "cache", "held_out": 0.2,
        },
        "lora": {"rank": 4},
    }  # fmt: skip
    for section, fields in told.items():
        values[section] = None if fields is None else {**values.get(section, {}), **fields}
    return LcmConfig.model_validate(values)


def built(config: LcmConfig) -> LcmObjective:
    """The objective over tiny components."""
    return LcmObjective(config, open_model)


def stirred(objective: LcmObjective, seed: int = 0) -> LcmObjective:
    """The same with random values in all that is trained: student and teacher differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in objective.adapter.parameters.values():
            value.add_(0.2 * torch.randn(value.shape, generator=generator))
    return objective


def loss(objective: LcmObjective, positions: range = range(4)) -> float:
    """The loss of some samples."""
    with torch.no_grad():
        return float(objective(objective.batch(positions))["loss"])


# -- the loss --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("huber", "units", "steps"),
    [(None, "latents", 1), (0.01, "latents", 1), (0.01, "noise", 1), (None, "latents", 2)],
)
def test_the_loss_is_what_stock_parts_compute(
    folder: Path, tmp_path: Path, huber: float | None, units: str, steps: int
) -> None:
    """One sample at a time: stock's UNet, DDIM steps, LoRA loader and boundary scalings, guidance
    from two calls."""
    told = {"huber": huber, "units": units, "timestep_scaling": 0.02, "w": (2.0, 9.0),
            "teacher_steps": steps}  # fmt: skip
    objective = stirred(built(config_of(folder, lcm=told)))
    teacher = StableDiffusionPipeline(**build(), requires_safety_checker=False)
    student = StableDiffusionPipeline(**build(), requires_safety_checker=False)
    student.load_lora_weights(files.save(tmp_path / "adapter", objective.adapter.weights()))
    ddim = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=True,
    )  # fmt: skip
    ddim.set_timesteps(50)
    lcm = LCMScheduler.from_config(ddim.config, timestep_scaling=0.02)
    silence = teacher.encode_prompt("", "cpu", 1, False)[0]

    def f(x: Tensor, t: int, embeds: Tensor) -> Tensor:
        at = max(t, 0)  # nothing is said at level -1, where c_out is 0
        c_skip, c_out = lcm.get_scalings_for_boundary_condition_discrete(at)
        a = ddim.alphas_cumprod[at]
        x0 = (x - (1 - a).sqrt() * student.unet(x, at, embeds).sample) / a.sqrt()
        return c_skip * x + c_out * x0

    total, levels = 0.0, set()
    for position in range(8):
        (group,) = objective.batch(range(position, position + 1))["groups"]
        t, w, embeds = int(group["t"]), float(group["w"]), group["embeds"]
        levels.add(t)
        assert 2 <= w <= 9
        with torch.no_grad():
            x = ddim.add_noise(group["z"], group["eps"], torch.tensor([t]))
            x_s, left = x, min(steps, (t + 1) // 20)
            for at in range(t, t - 20 * left, -20):
                cond, uncond = (teacher.unet(x_s, at, told).sample for told in (embeds, silence))
                x_s = ddim.step(cond + w * (cond - uncond), at, x_s).prev_sample
            d = f(x, t, embeds) - f(x_s, t - 20 * left, embeds)
        if units == "noise":
            d = d / (1 - ddim.alphas_cumprod[t]).sqrt()
        error = d.square() if huber is None else (d.square() + huber**2).sqrt() - huber
        mask = group["mask"].expand_as(error)
        total += float((error * mask).sum() / mask.sum())
    assert len(levels) > 4
    # Sums of float32 numbers in batches of other sizes; 1 / a is 15 at the last level.
    assert loss(objective, range(8)) == pytest.approx(total / 8, rel=1e-3)


@pytest.mark.parametrize("huber", [None, 0.01])
def test_pixels_are_compared_beside_latents(
    folder: Path, tmp_path: Path, huber: float | None
) -> None:
    """In the same units, by the same penalty, and of what the mask covers in the quarter alone;
    not where nothing is learnt."""
    small = tiny_small_vae()
    small.save_pretrained(tmp_path / "small")
    pixels = {"weight": 0.5, "decoder": str(tmp_path / "small")}
    plain = stirred(built(config_of(folder, lcm={"huber": huber})))
    objective = stirred(built(config_of(folder, lcm={"huber": huber, "pixels": pixels})))
    masked = 0
    for group in objective.batch(range(6))["groups"]:
        ready = objective._ready(group)
        more = (objective._errors(ready) - plain._errors(ready)).tolist()
        with torch.no_grad():
            answers = objective._student(ready)(ready["x"], ready["t"])
            assert torch.equal(objective._errors(ready), plain._errors(ready))
        for i, corner in enumerate(ready["corner"]):
            half = [side // 2 for side in ready["z"].shape[2:]]  # these are even
            down, across = (int(c) * n for c, n in zip(corner, half, strict=True))
            cut = slice(down, down + half[0]), slice(across, across + half[1])
            told = (small.decoder(v[i : i + 1, :, *cut] / 0.7) for v in (answers, ready["target"]))
            apart = torch.sub(*told) / objective.schedule.sigma(ready["t"][i])
            penalty = apart**2 if huber is None else (apart**2 + huber**2).sqrt() - huber
            covered = ready["mask"][i, :, *cut].repeat_interleave(2, 1).repeat_interleave(2, 2)
            masked += int(0 < covered.mean() < 1)
            mean = (penalty * covered).sum() / (3 * covered.sum()).clamp(min=1e-6)
            assert more[i] == pytest.approx(0.5 * float(mean.detach()), rel=1e-3, abs=1e-5)
    assert masked


def test_the_laws_of_objectives(folder: Path) -> None:
    objective = built(config_of(folder, data={"fixed": True}))
    whole, again = (laws.batch_of(objective, range(4, 8))["groups"][0] for _ in range(2))
    other = laws.batch_of(objective, range(8, 12))["groups"][0]
    for name, value in whole.items():
        assert torch.equal(value, again[name]), name
        if name not in ("weight", "mask"):
            assert not torch.equal(value, other[name]), name
    laws.everything_trained_has_a_gradient(objective)


def test_levels_are_the_grid_s_and_strengths_are_drawn_for_each_sample(folder: Path) -> None:
    objective = built(config_of(folder, lcm={"original_steps": 10, "w": (1.0, 3.0)}))
    groups = [g for i in range(40) for g in objective.batch(range(4 * i, 4 * i + 4))["groups"]]
    t, s, w = (torch.cat([group[name] for group in groups]) for name in ("t", "down", "w"))
    assert set(t.tolist()) == set(range(99, 1000, 100))
    assert torch.equal(s, torch.where(t == 99, -1.0, t - 100)[:, None])
    assert len(w.unique()) == len(w)
    # 160 uniform draws: 4 standard errors.
    assert float(w.mean()) == pytest.approx(2.0, abs=4 / (3 * 160) ** 0.5)
    assert 1 <= float(w.min()) < 1.1
    assert 2.9 < float(w.max()) <= 3


def test_noisy_levels_may_come_more_often(folder: Path) -> None:
    lcm = {"original_steps": 10, "towards_noise": 2.0}
    objective = built(config_of(folder, lcm=lcm))
    groups = [g for i in range(40) for g in objective.batch(range(4 * i, 4 * i + 4))["groups"]]
    t = torch.cat([group["t"] for group in groups])
    # 160 draws, of which 7 in 8 are of the noisier half: 4 standard errors.
    assert float((t > 500).float().mean()) == pytest.approx(7 / 8, abs=0.105)
    assert t.min() < 500


def test_some_pictures_are_the_student_s_own_in_two_leaps_from_noise(folder: Path) -> None:
    """The noise, levels and strengths of all, and the pictures of the others, stay what they were;
    a validation is of the data's pictures alone."""
    lcm = {"original_steps": 10}
    plain = stirred(built(config_of(folder, data={"fixed": True}, lcm=lcm)))
    own = {**lcm, "own_pictures": 0.5}
    objective = stirred(built(config_of(folder, data={"fixed": True}, lcm=own)))
    chosen = []
    for i in range(8):
        positions = range(4 * i, 4 * i + 4)
        (before,), (group,) = (o.batch(positions)["groups"] for o in (plain, objective))
        for name, value in before.items():
            assert torch.equal(value, group[name]), name
        assert (group["between"] >= group["t"]).all()
        told, ready = plain._ready(before)["x"], objective._ready(group)["x"]
        a, sig = objective.schedule.coefficients(group["t"], like=ready)
        clean = (ready - sig * group["eps"]) / a
        with torch.no_grad():
            f = objective._student(group)
            first = f(group["leaps"][:, 0], torch.full_like(group["t"], 999))
            a, sig = objective.schedule.coefficients(group["between"], like=ready)
            drawn = f(a * first + sig * group["leaps"][:, 1], group["between"])
        for n, chosen_here in enumerate(group["own"].tolist()):
            chosen.append(chosen_here)
            if chosen_here:
                torch.testing.assert_close(clean[n], drawn[n], rtol=1e-3, atol=1e-3)
            else:
                assert torch.equal(ready[n], told[n])
    assert 6 <= sum(chosen) <= 26  # of 32, by halves: 3.5 standard deviations
    assert len({*chosen}) == 2
    _, validated = next(objective._validation(objective.data.measured))
    assert "own" not in validated


@pytest.mark.parametrize("own", [0.0, 0.5])
def test_under_autocast_the_gradient_is_the_student_s(folder: Path, own: float) -> None:
    """Autocast keeps copies of weights: it must not take those that the target makes for it."""
    told = {"lcm": {"own_pictures": own}, "data": {"fixed": True}}
    objective = stirred(built(config_of(folder, **told)))
    batch = objective.batch(range(2))
    gradients = []
    for half in (False, True):
        objective.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses = objective(batch)
        losses["loss"].backward()
        found = [p.grad for p in objective.adapter.parameters.values()]
        assert all(g is not None and g.any() for g in found)
        gradients.append(torch.cat([g.flatten() for g in found if g is not None]))
    assert torch.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.9  # bf16 has 8 bits


def test_under_autocast_the_average_says_the_target_alone(folder: Path) -> None:
    """Autocast's copies of the averaged weights must not answer for the student."""
    average = {"lcm": {"target": "average", "huber": None}, "optimiser": {"ema_decay": 0.9}}
    fixed = {"data": {"fixed": True}, "lora": {"targets": "all"}}
    objective = stirred(built(config_of(folder, **fixed, **average)))
    moving = MovingAverage(dict(objective.adapter.parameters), 0.9)
    for value in moving.average.values():
        value.zero_()
    objective.take_average(moving)
    losses = []
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses.append(float(objective(objective.batch(range(4)))["loss"].detach()))
    assert losses[1] == pytest.approx(losses[0], rel=0.1)  # bf16 has 8 bits


def test_it_learns_to_be_consistent(folder: Path) -> None:
    objective = built(config_of(folder, data={"fixed": True}, lcm={"huber": None}))
    losses = laws.losses_of_one_batch(objective, 4, lr=1e-2)
    assert np.mean(losses[-5:]) < 0.7 * losses[0]


def test_a_better_solver_is_asked_once_more_and_each_step_anew(folder: Path) -> None:
    calls = {}
    for solver, steps in (("ddim", 1), ("heun", 1), ("ddim", 3)):
        lcm = {"solver": solver, "teacher_steps": steps}
        objective = built(config_of(folder, data={"fixed": True}, lcm=lcm))
        rows: list[int] = []
        objective.unet.register_forward_pre_hook(
            lambda _, args, rows=rows: rows.append(len(args[0]))
        )
        loss(objective)
        calls[solver, steps] = rows
    assert calls == {
        ("ddim", 1): [8, 4, 4],
        ("heun", 1): [8, 8, 4, 4],
        ("ddim", 3): [8, 8, 8, 4, 4],
    }


def test_sdxl_is_distilled_too(folder: Path) -> None:
    """Its teacher hears nothing as zeros, and the picture's place in both halves."""
    config = config_of(folder, data={"fixed": True}).model_copy(update={"model": "xl"})
    objective = built(config)
    heard: list[dict[str, Any]] = []

    def note(_: Any, args: Any, told: dict[str, Any]) -> None:
        heard.append(told)

    objective.unet.register_forward_pre_hook(note, with_kwargs=True)
    (group,) = objective.batch(range(2))["groups"]
    loss(objective, range(2))
    teacher = heard[0]
    silent, prompted = teacher["encoder_hidden_states"].chunk(2)
    assert not silent.any()
    assert torch.equal(prompted, group["embeds"])
    silent, prompted = teacher["added_cond_kwargs"]["text_embeds"].chunk(2)
    assert not silent.any()
    assert torch.equal(prompted, group["pooled"])
    for half in teacher["added_cond_kwargs"]["time_ids"].chunk(2):
        assert torch.equal(half, group["time_ids"])
    assert all(torch.equal(told["encoder_hidden_states"], group["embeds"]) for told in heard[1:])
    laws.everything_trained_has_a_gradient(objective)


# -- student and teacher ---------------------------------------------------------------------


def test_the_teacher_never_changes(folder: Path) -> None:
    """No weight of the base, and nothing that it says with the adapter off."""
    config = config_of(folder, data={"fixed": True})
    objective = built(config)
    frozen = {n: p.clone() for n, p in objective.named_parameters() if not p.requires_grad}
    trained = {n: p.clone() for n, p in objective.named_parameters() if p.requires_grad}
    assert {id(p) for p in objective.adapter.parameters.values()} == {
        id(objective.get_parameter(name)) for name in trained
    }
    (group,) = objective.batch(range(4))["groups"]

    @torch.no_grad()
    def said() -> Tensor:
        network = objective.conditioning.network(objective.unet, group)
        return network(group["z"], group["t"])

    def teacher() -> Tensor:
        with objective.adapter.disabled():
            return said()

    before = teacher()
    assert torch.equal(said(), before)
    fit(objective, config)
    assert all(torch.equal(value, objective.get_parameter(n)) for n, value in frozen.items())
    assert any(not torch.equal(value, objective.get_parameter(n)) for n, value in trained.items())
    assert torch.equal(teacher(), before)
    assert not torch.equal(said(), before)


def test_the_average_may_say_the_target(folder: Path) -> None:
    """The weights are the student's again afterwards, and the gradient is theirs."""
    average = {"lcm": {"target": "average"}, "optimiser": {"ema_decay": 0.9}}
    plain, objective = built(config_of(folder)), built(config_of(folder, **average))
    stirred(plain)
    stirred(objective)
    trained = dict(objective.adapter.parameters)
    moving = MovingAverage(trained, 0.9)
    objective.take_average(moving)
    plain.take_average(MovingAverage(dict(plain.adapter.parameters), 0.9))
    assert loss(objective) == loss(plain)
    for value in moving.average.values():
        value.mul_(0.5)
    before = {name: value.detach().clone() for name, value in trained.items()}
    assert loss(objective) != pytest.approx(loss(plain), rel=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in trained.items())
    laws.everything_trained_has_a_gradient(objective)


# -- the run ---------------------------------------------------------------------------------


class Stopping(LcmObjective):
    """Gets a Ctrl-C while the samples from a position on are made."""

    stop_at: int = 4

    def batch(self, positions: range) -> Batch:
        """The objective's batch."""
        if positions.start == self.stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return super().batch(positions)


def test_a_stop_leaves_no_trace(folder: Path) -> None:
    """Also of the average that says the target."""

    def config(out: str) -> LcmConfig:
        average = {"lcm": {"target": "average"}, "optimiser": {"ema_decay": 0.9}}
        return config_of(folder, run={"out": folder.parent / out}, **average)

    whole, broken = config("whole"), config("broken")
    fit(built(whole), whole)
    with pytest.raises(Interrupted, match="step 2;"):
        fit(Stopping(broken, open_model), broken)
    fit(built(broken), broken)
    parts = []
    for each in (whole, broken):
        newest = checkpoint.newest(each.run.out / "checkpoints")
        assert newest is not None
        parts.append(checkpoint.load(newest)[0])
    for part, tensors in parts[0].items():
        assert [n for n in tensors if not torch.equal(tensors[n], parts[1][part][n])] == []


def drawn(pipe: Any) -> Tensor:
    """A picture in two steps."""
    pipe.set_progress_bar_config(disable=True)
    told = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 64, "width": 64}
    generator = torch.Generator().manual_seed(0)
    return pipe("red", generator=generator, output_type="pt", **told).images


def test_stock_diffusers_draws_what_was_distilled(folder: Path) -> None:
    """By what the file says of itself; the card says how."""
    config = config_of(folder, lcm={"original_steps": 40, "timestep_scaling": 5.0})
    objective = built(config)
    final = fit(objective, config)
    assert read_note(final) == LcmNote("bundled", 40, 5.0)
    with safe_open(final / files.FILE_NAME, "pt") as opened:
        assert json.loads(opened.metadata()["lcm"])["original_steps"] == 40

    def scheduled(pipe: Any, note: LcmNote) -> Any:
        pipe.scheduler = LCMScheduler.from_config(
            pipe.scheduler.config, original_inference_steps=note.original_steps,
            timestep_scaling=note.timestep_scaling,
        )  # fmt: skip
        return pipe

    stock = StableDiffusionPipeline(**build(), requires_safety_checker=False)
    base = drawn(scheduled(stock, read_note(final)))
    stock.load_lora_weights(final)
    parts = {**build(), "unet": objective.unet}
    trained = scheduled(
        StableDiffusionPipeline(**parts, requires_safety_checker=False), LcmNote(None, 40, 5.0)
    )
    # The same float32 numbers, multiplied in the same order.
    assert torch.allclose(drawn(stock), drawn(trained), atol=1e-6)
    assert not torch.allclose(drawn(stock), base, atol=1e-3)
    card = (final / "README.md").read_text("utf-8")
    assert "--lcm pytorch_lora_weights.safetensors --steps 4" in card
    assert "original_inference_steps=40, timestep_scaling=5.0" in card
    assert "num_inference_steps=4, guidance_scale=1.0" in card
    resolved = card.partition("```yaml\n")[2].partition("```")[0]
    assert LcmConfig.model_validate(yaml.safe_load(resolved)) == config


def test_an_adapter_tells_which_levels_it_knows(folder: Path) -> None:
    """The card tells stock pipelines the four of them, and the trainer's pictures are drawn so."""
    shown = {"prompts": ["red"], "steps": 1, "few": 3}
    config = config_of(folder, lcm={"spacing": "angle"}, pictures=shown)
    objective = built(config)
    taken: list[float] = []
    step = LCMScheduler.step

    def watched(self: Any, *told: Any, **more: Any) -> Any:
        taken.append(float(told[1]))
        return step(self, *told, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LCMScheduler, "step", watched)
        final = fit(objective, config)
    three, four = (consistency_grid(objective.schedule, n, spacing="angle")[:-1] for n in (3, 4))
    assert taken[-3:] == list(three)
    assert read_note(final) == LcmNote("bundled", spacing="angle")
    told = f"timesteps={[int(t) for t in four]}, guidance_scale=1.0"
    assert told in (final / "README.md").read_text("utf-8")


def test_pictures_show_the_teacher_and_the_student_in_few_steps(folder: Path) -> None:
    told = {"prompts": ["red"], "steps": 3, "few": 2}
    objective = built(config_of(folder, pictures=told))
    asked: list[tuple[int, float]] = []

    def note(_: Any, args: tuple[Any, ...]) -> None:
        asked.append((len(args[0]), float(torch.as_tensor(args[1]).reshape(-1)[0])))

    objective.unet.register_forward_pre_hook(note)
    assert objective.picture() is not None
    assert [rows for rows, _ in asked] == [2, 2, 2, 1, 1]
    assert [t for _, t in asked[3:]] == [999, 499]
    assert objective._pipe is not None
    assert type(objective._pipe.scheduler).__name__ == "DDIMScheduler"


def test_validation_is_fixed_and_in_bands(folder: Path) -> None:
    objective = stirred(built(config_of(folder)))
    scores = objective.validate()
    assert scores == objective.validate()
    assert set(scores) == {"loss", *(f"loss_band_{i}" for i in range(4))}
    levels = [
        (band, t)
        for bands, group in objective._validation(objective.data.measured)
        for band, t in zip(bands, group["t"].tolist(), strict=True)
    ]
    assert all(250 * band <= t < 250 * (band + 1) for band, t in levels)


# -- the picture world -----------------------------------------------------------------------


@pytest.fixture
def world(folder: Path, monkeypatch: pytest.MonkeyPatch) -> LcmConfig:
    """Five pictures of the world, and three to measure."""
    monkeypatch.setattr(world_pictures, "MEASURED", 3)
    run = {"steps": 1, "batch_size": 2, "validate_every": 9}
    told = {"pictures": 5, "cache": folder.parent / "cache"}
    return config_of(folder, data=None, world=told, run=run)


def test_the_world_s_pictures_are_encoded_once_and_worded_anew(world: LcmConfig) -> None:
    objective = built(world)
    encoder = open_model("", torch.float32)
    for split, samples in (("train", objective.data.samples), ("test", objective.data.measured)):
        pictures = to_tensor(np.stack([World(0, split)[i].picture for i in range(len(samples))]))
        with torch.no_grad(), autoencoder.quick(encoder.vae, "no"):
            mean, _ = autoencoder.encode(encoder.vae, pictures)
        for i, sample in enumerate(samples):
            found = objective.latents[sample.key]["mean"].float()
            # float16 has 11 bits.
            assert torch.allclose(found, mean[i], rtol=2**-11, atol=1e-6)
    for epoch in range(3):
        keys = [objective.data.sample(5 * epoch + i).key for i in range(5)]
        assert sorted(keys) == sorted(sample.key for sample in objective.data.samples)
    sample = objective.data.samples[0]
    words = {objective.data.words(sample, np.random.default_rng(i)) for i in range(9)}
    assert len(words) > 3
    assert not any(held_out_caption(each) for each in words)
    assert objective.data.caption(objective.data.measured[0]) == World(0, "test")[0].caption
    assert np.array_equal(load(sample.item).pixels, World(0)[0].picture)


def test_the_world_trains_a_student(world: LcmConfig) -> None:
    objective = built(world)
    laws.everything_trained_has_a_gradient(objective)
    assert not any(
        p.requires_grad for p in objective.conditioning.encoders["text_encoder"].parameters()
    )
    before = objective.validate()
    fit(objective, world)
    assert objective.validate() != before


# -- mistakes --------------------------------------------------------------------------------


def test_mistakes_are_named(folder: Path) -> None:
    told = config_of(folder).model_dump()
    for change, words in (
        ({"data": None}, "set data .captioned pictures. or world"),
        ({"world": {}}, "not both"),
        ({"lcm": {"w": (3.0, 1.0)}}, "must rise"),
        ({"lcm": {"target": "average"}}, "needs optimiser.ema_decay"),
        ({"world": {"picturs": 3}}, "did you mean 'pictures'"),
        ({"lcm": {"original_steps": 1001}}, "lcm.original_steps=1001: must be at most 1000"),
        ({"pictures": {"few": 51, "prompts": ["a"]}}, "few=51 must be at most lcm.original_s"),
        ({"lcm": {"full": True, "spacing": "angle"}, "lora": {}}, "goes with lcm.spacing=even"),
    ):
        with pytest.raises(UserError, match=words):
            validated(LcmConfig, {**told, **change}, "some.yaml")

    def few_levels(source: str, dtype: torch.dtype) -> LatentDiffusionPipeline:
        few = tiny_scheduler(num_train_timesteps=500)
        return LatentDiffusionPipeline(**build(scheduler=few)).to(dtype)

    with pytest.raises(UserError, match=r"lcm\.original_steps=501 must lie between 1 and"):
        LcmObjective(config_of(folder, lcm={"original_steps": 501}), few_levels)
    close = config_of(folder, lcm={"original_steps": 400, "spacing": "angle"})
    with pytest.raises(UserError, match=r"lcm\.original_steps=400 are too many"):
        LcmObjective(close, few_levels)
    assert close.data is not None
    assert not close.data.cache.exists(), "they were found before pictures were encoded"


def test_a_student_to_go_on_from_is_looked_for_before_a_model_is_opened(folder: Path) -> None:
    def unopened(source: str, dtype: torch.dtype) -> LatentDiffusionPipeline:
        raise AssertionError("opened")

    config = config_of(folder).model_copy(update={"begin_from": folder})
    with pytest.raises(UserError, match=r"begin_from: .* holds none of"):
        FullLcmObjective(config, unopened)
