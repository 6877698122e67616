"""The laws of the pipeline: what must hold whatever the model draws."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from ldm_pipeline import LatentDiffusionPipeline
from ldm_pipeline.errors import UserError
from ldm_pipeline.memory import PLAIN
from ldm_pipeline.request import SAMPLER_NAMES
from ldm_pipeline.running import Run, under_way

PROMPTS = [
    "a red star",
    "a blue boat on the sea",
    "two hearts",
    "a house left of a tree",
    "a moon",
    "red, red, red",
    "a fish above a boat",
    "a small ring in the corner",
]

# Convolutions and matrix products sum in another order for another batch size, which is worth
# about 1e-7 of a value at every layer; measured over the samplers, 2e-6 of the latents' size.
SAME_PICTURE = 1e-5


def draw(pipe: Any, prompt: Any, **arguments: Any) -> torch.Tensor:
    chosen = {"num_inference_steps": 4, "output_type": "latent", **arguments}
    latents: torch.Tensor = pipe(prompt, **chosen).images
    return latents


def largest(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, relative to the size of the latents where that is above 1."""
    return float((one - other).abs().max() / max(1.0, float(other.abs().max())))


@pytest.fixture(scope="module")
def bounded(components: dict[str, Any]) -> Any:
    """A pipeline whose latents stay about 1 in size, as a trained model's do.

    The random UNet's answer is read as v, which bounds the clean latents; read as noise it would
    blow them up to 60 and rounding errors with them.
    """
    scheduler = DDIMScheduler.from_config(
        components["scheduler"].config, prediction_type="v_prediction"
    )
    pipe = LatentDiffusionPipeline(**{**components, "scheduler": scheduler})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("sampler", [None, *SAMPLER_NAMES])
def test_an_image_does_not_depend_on_its_batch(bounded: Any, sampler: str | None) -> None:
    """Every image of batches of 2, 4 and 8 is the image drawn alone with its seed."""
    eta = 1.0 if sampler is None else 0.0
    chosen = {"sampler": sampler, "guidance_scale": 2.0, "eta": eta}
    alone = [draw(bounded, text, seed=10 + i, **chosen) for i, text in enumerate(PROMPTS)]
    for size in (2, 4, 8):
        batch = draw(bounded, PROMPTS[:size], seed=10, **chosen)
        for i in range(size):
            assert largest(batch[i : i + 1], alone[i]) < SAME_PICTURE
    assert largest(alone[0], draw(bounded, PROMPTS[0], seed=99, **chosen)) > 0.01


@pytest.mark.parametrize("sampler", [None, *SAMPLER_NAMES])
def test_the_same_seed_is_the_same_picture(ours: Any, sampler: str | None) -> None:
    """A second run on the same pipeline starts from nothing that the first one left."""
    first = draw(ours, PROMPTS[:2], seed=3, sampler=sampler)
    draw(ours, "a fish", seed=8, sampler="unipc", guidance_scale=2.0)
    assert torch.equal(first, draw(ours, PROMPTS[:2], seed=3, sampler=sampler))
    assert first.isfinite().all()


def test_a_seed_is_a_generator(ours: Any) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    one = draw(ours, PROMPTS[:2], seed=5, sampler="ddpm")
    assert torch.equal(one, draw(ours, PROMPTS[:2], generator=generators, sampler="ddpm"))
    assert torch.equal(one, draw(ours, PROMPTS[:2], seed=[5, 6], sampler="ddpm"))
    both = draw(ours, "a red star", num_images_per_prompt=2, seed=[6, 6], sampler="ddpm")
    assert torch.equal(both[0], both[1])


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m", "unipc", None])
def test_four_threads_draw_the_serial_pictures(ours: Any, sampler: str | None) -> None:
    """Runs with values of their own, at once on one pipeline, do not see one another."""
    jobs: list[dict[str, Any]] = [
        {
            "prompt": PROMPTS[i],
            "seed": i,
            "guidance_scale": 1.0 + 2 * i,
            "num_inference_steps": 3 + i % 3,
            "clip_skip": i % 3 or None,
            "sampler": sampler,
        }
        for i in range(8)
    ]
    serial = [draw(ours, **job) for job in jobs]
    together = threading.Barrier(4)

    def one(job: dict[str, Any]) -> torch.Tensor:
        together.wait(timeout=20)
        return draw(ours, **job)

    with ThreadPoolExecutor(4) as pool:
        parallel = list(pool.map(one, jobs))
    for a, b in zip(serial, parallel, strict=True):
        assert torch.equal(a, b)


def test_callbacks_of_four_threads_see_their_own_runs(ours: Any) -> None:
    """What a callback reads from and writes to the pipeline is its own run's."""
    together = threading.Barrier(4)

    def one(k: int, wait: bool) -> torch.Tensor:
        def callback(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if wait:
                together.wait(timeout=20)
            assert pipe.num_timesteps == 4
            assert pipe.guidance_scale == 2.0 + k + i
            pipe._guidance_scale = pipe.guidance_scale + 1
            pipe._interrupt = k == 3 and i == 3
            return tensors

        return draw(ours, PROMPTS[k], seed=k, guidance_scale=2.0 + k, callback_on_step_end=callback)

    serial = [one(k, wait=False) for k in range(4)]
    with ThreadPoolExecutor(4) as pool:
        parallel = list(pool.map(one, range(4), [True] * 4))
    for a, b in zip(serial, parallel, strict=True):
        assert torch.equal(a, b)


def test_a_callback_sees_the_run_s_scheduler_and_nobody_else_does(ours: Any) -> None:
    """Nor after a callback that fails; a pipeline that is not built yet has none."""
    own, seen = ours.scheduler, []

    def callback(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(pipe.scheduler)
        draw(pipe, PROMPTS[0], seed=1)  # a run within this one has its own
        assert pipe.scheduler is seen[-1]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        draw(ours, PROMPTS[0], callback_on_step_end=callback)
    assert seen[0] is not own
    assert ours.scheduler is own
    assert not hasattr(object.__new__(LatentDiffusionPipeline), "scheduler")


def test_no_names_of_tensors_are_none_for_the_callback(ours: Any) -> None:
    """As stock pipelines take None; a callback is then handed an empty dictionary."""
    handed: list[dict[str, Any]] = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        handed.append(dict(tensors))
        return {}

    plain = draw(ours, "a fish", seed=1)
    for watching in (None, callback):
        told = {"callback_on_step_end": watching, "callback_on_step_end_tensor_inputs": None}
        assert torch.equal(draw(ours, "a fish", seed=1, **told), plain)
    assert handed
    assert not any(handed)


def test_guidance_interval(ours: Any) -> None:
    """Guidance acts within its part of the run and nowhere else."""
    plain = draw(ours, "a red star", seed=1, guidance_scale=1.0)
    full = draw(ours, "a red star", seed=1)
    assert torch.equal(full, draw(ours, "a red star", seed=1, guidance_interval=(0.0, 1.0)))

    seen: list[int] = []
    original = ours.unet.forward

    def counting(x: torch.Tensor, *rest: Any, **named: Any) -> Any:
        seen.append(x.shape[0])
        return original(x, *rest, **named)

    ours.unet.forward = counting
    try:
        part = draw(ours, "a red star", seed=1, guidance_interval=(0.25, 0.75))
    finally:
        del ours.unet.forward
    assert seen == [1, 2, 2, 1]
    assert not torch.equal(part, plain)
    assert not torch.equal(part, full)


def test_outside_the_interval_the_prompt_stands_alone(ours: Any) -> None:
    """Before guidance sets in, the run is the unguided one, bit for bit."""

    def after_each_step(**arguments: Any) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []

        def callback(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            seen.append(tensors["latents"])
            return tensors

        draw(ours, PROMPTS[:2], seed=1, callback_on_step_end=callback, **arguments)
        return seen

    plain = after_each_step(guidance_scale=1.0)
    late = after_each_step(guidance_interval=(0.5, 1.0), negative_prompt="a blue moon")
    assert [torch.equal(a, b) for a, b in zip(plain, late, strict=True)] == [True] * 2 + [False] * 2


def test_custom_levels_of_a_native_sampler(ours: Any) -> None:
    """The levels a sampler would choose, passed by hand, draw the same picture."""
    own = draw(ours, "a red star", seed=1, sampler="ddim", num_inference_steps=4)
    by_hand = draw(ours, "a red star", seed=1, sampler="ddim", timesteps=[999, 749, 499, 249])
    assert torch.equal(own, by_hand)
    sigmas = [_sigma(ours, t) for t in (999, 749, 499, 249)]
    by_sigma = draw(ours, "a red star", seed=1, sampler="ddim", sigmas=[*sigmas, 0.0])
    # sigma -> level goes through a logarithm and an interpolation in float64.
    assert largest(by_sigma, own) < 1e-5


def _sigma(pipe: Any, t: int) -> float:
    a2 = float(pipe.scheduler.alphas_cumprod[t].double())
    return float(((1 - a2) / a2) ** 0.5)


def test_eta_moves_ddim_to_ddpm(ours: Any) -> None:
    steps = {"seed": 1, "num_inference_steps": 4}
    assert torch.equal(
        draw(ours, "a red star", sampler="ddim", eta=1.0, **steps),
        draw(ours, "a red star", sampler="ddpm", **steps),
    )


def test_the_noise_of_torch_is_used_without_a_seed(ours: Any) -> None:
    torch.manual_seed(4)
    one, two = (draw(ours, "a red star", sampler="euler_a") for _ in range(2))
    torch.manual_seed(4)
    assert torch.equal(one, draw(ours, "a red star", sampler="euler_a"))
    assert not torch.equal(one, two)


def test_output_types(ours: Any) -> None:
    arguments = {"num_inference_steps": 2, "seed": 1, "height": 24, "width": 40}
    pictures = ours(PROMPTS[:2], **arguments).images
    array = ours(PROMPTS[:2], output_type="np", **arguments)[0]
    tensor = ours(PROMPTS[:2], output_type="pt", return_dict=False, **arguments)[0]
    assert all(isinstance(picture, Image.Image) for picture in pictures)
    assert [picture.size for picture in pictures] == [(40, 24)] * 2
    assert array.shape == (2, 24, 40, 3)
    assert tensor.shape == (2, 3, 24, 40)
    assert 0 <= array.min() <= array.max() <= 1
    assert (array == tensor.permute(0, 2, 3, 1).numpy()).all()


def test_no_gradients_are_kept(ours: Any) -> None:
    """`no_grad` sits on the call alone: the parts below it leave gradients to the caller."""
    assert not draw(ours, "a red star", seed=1).requires_grad
    embeds, _ = ours.encode_prompt("a red star", "cpu", 1, False)
    assert embeds.requires_grad


def test_the_progress_bar_counts_the_steps(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []

    class Bar:
        def __init__(self, total: int) -> None:
            counted.append(total)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self) -> None:
            counted.append(1)

    monkeypatch.setattr(ours, "progress_bar", lambda total: Bar(total))
    draw(ours, "a red star", num_inference_steps=3)
    assert counted == [3, 1, 1, 1]


def test_stopping_from_another_thread(ours: Any) -> None:
    """`_interrupt`, set by a thread that draws nothing, stops the run that is under way."""
    steps: list[int] = []

    def callback(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(i)
        if i == 1:
            stopper = threading.Thread(target=setattr, args=(pipe, "_interrupt", True))
            stopper.start()
            stopper.join()
        return tensors

    draw(ours, "a red star", num_inference_steps=6, callback_on_step_end=callback)
    assert steps == [0, 1]
    assert ours.interrupt
    draw(ours, "a red star", num_inference_steps=2)
    assert not ours.interrupt, "a new run starts uninterrupted"


def test_a_run_inside_a_run(ours: Any) -> None:
    """A callback may draw with the same pipeline; the outer run goes on as if it had not."""

    def nested(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        draw(pipe, "a moon", num_inference_steps=1, guidance_scale=1.0, seed=9)
        assert (pipe.guidance_scale, pipe.num_timesteps) == (7.5, 4)
        return tensors

    plain = draw(ours, "a red star", seed=2)
    assert torch.equal(plain, draw(ours, "a red star", seed=2, callback_on_step_end=nested))


def test_guidance_cannot_appear_from_nowhere(ours: Any) -> None:
    def turn_on(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 5.0
        return tensors

    with pytest.raises(UserError, match="turned on during a run"):
        draw(ours, "a red star", guidance_scale=1.0, callback_on_step_end=turn_on)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"sampler": "eular"}, "did you mean 'euler'"),
    ({"num_inference_steps": 0}, "num_inference_steps=0"),
    ({"num_inference_steps": 5000, "sampler": "ddim"}, "num_inference_steps=5000"),
    ({"num_inference_steps": 60, "sampler": "lcm"}, "num_inference_steps=60"),
    ({"height": 20}, "height=20"),
    ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
    ({"clip_skip": 4}, "3 layers"),
    ({"latents": torch.zeros(1, 3, 16, 16)}, "latents has shape (1, 3, 16, 16)"),
    ({"latents": torch.zeros(1, 4, 16, 16), "height": 64}, "(1, 4, 32, 16)"),
    ({"timesteps": [1, 500], "sampler": "ddim"}, "must fall"),
    ({"timesteps": [5000, 500], "sampler": "euler"}, "must fall"),
    ({"sigmas": [5.0, 1.0], "sampler": "pndm"}, "takes no custom sigmas"),
    ({"callback_on_step_end_tensor_inputs": ["noise"]}, "latents"),
    ({"callback_on_step_end": 5}, "callback_on_step_end=5 must be a function"),
    ({"timesteps": [-5], "sampler": "tcd"}, "timesteps=[-5] must be whole numbers from 0 to 999"),
    ({"timesteps": [999.5, 2.5], "sampler": "tcd"}, "must be whole numbers from 0 to 999"),
    (
        {"latents": np.zeros((1, 4, 16, 16))},
        "latents must be a torch.Tensor of floats, not ndarray",
    ),
    ({"latents": torch.zeros(1, 4, 16, 16, dtype=torch.int64)}, "of floats, not torch.int64"),
    ({"latents": torch.full((1, 4, 16, 16), torch.nan)}, "latents holds values that are not"),
    ({"latents": torch.full((1, 4, 16, 16), torch.inf)}, "latents holds values that are not"),
    ({"prompt": None, "prompt_embeds": torch.full((1, 77, 32), torch.nan)}, "prompt_embeds holds"),
    (
        {"prompt": None, "prompt_embeds": torch.ones(1, 77, 24)},
        "24 channels, and this",
    ),
    ({"negative_prompt_embeds": torch.ones(1, 77, 24)}, "_prompt_embeds has 24 channels"),
    ({"negative_prompt_embeds": torch.ones(1, 9, 32)}, "9 tokens, and a prompt of words has 77"),
    (
        {"prompt": None, "prompt_embeds": torch.ones(1, 154, 32)},
        "154 tokens, and a negative prompt of words at most 77",
    ),
]


@pytest.mark.parametrize("wrong,message", WRONG, ids=[str(list(wrong)) for wrong, _ in WRONG])
def test_mistakes_are_refused_before_any_network_runs(
    ours: Any, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any], message: str
) -> None:
    def called(*_: object, **__: object) -> None:
        raise AssertionError("a network was called")

    for part in ("unet", "vae", "text_encoder"):
        monkeypatch.setattr(getattr(ours, part), "forward", called)
    with pytest.raises(UserError) as caught:
        ours(**{"prompt": "a red star", **wrong})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("memory", "device", "message"),
    [
        (5, None, "memory=5 must be a Memory"),
        (PLAIN, "gpu", "device='gpu' is not known"),
        (PLAIN, "xpu", "device='xpu' is not here: torch finds"),
    ],
)
def test_what_cannot_be_arranged(ours: Any, memory: Any, device: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ours.arrange(memory, device)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.zeros(1), "returned a Tensor; it must return a dictionary of tensors"),
        (True, "returned a bool; it must return a dictionary"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"shape \(1, 4, 8, 8\); they must stay \(1, 4, 16"),
        ({"latents": None}, r"latents of shape \(\); they must stay"),
    ],
)
def test_what_a_callback_may_not_return(ours: Any, returned: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        draw(ours, "a red star", callback_on_step_end=lambda *_: returned)


def test_latents_may_have_another_precision(ours: Any) -> None:
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    drawn = draw(ours, "a red star", latents=noise.double())
    assert torch.equal(drawn, draw(ours, "a red star", latents=noise))


def test_unknown_arguments_are_refused(ours: Any) -> None:
    with pytest.raises(TypeError, match="guidence_scale"):
        ours("a red star", guidence_scale=3.0)


def test_parts_alone(components: dict[str, Any]) -> None:
    """Text parts alone encode; all but the text parts draw from what they encoded."""
    nothing = dict.fromkeys(components)
    texts = LatentDiffusionPipeline(
        **{**nothing, "tokenizer": components["tokenizer"]}
        | {"text_encoder": components["text_encoder"]}
    )
    embeds, negative = texts.encode_prompt("a red star", "cpu", 1, True)
    drawing = LatentDiffusionPipeline(**{**components, "tokenizer": None, "text_encoder": None})
    whole = LatentDiffusionPipeline(**components)
    for pipe in (drawing, whole):
        pipe.set_progress_bar_config(disable=True)
    from_parts = draw(drawing, None, prompt_embeds=embeds, negative_prompt_embeds=negative, seed=1)
    assert torch.equal(from_parts, draw(whole, "a red star", seed=1))
    with pytest.raises(UserError, match="no text_encoder"):
        drawing("a red star")
    with pytest.raises(UserError, match="no unet"):
        texts("a red star")
    silent = LatentDiffusionPipeline(**{**components, "tokenizer": None})
    with pytest.raises(UserError, match="no tokenizer"):
        silent("a red star", negative_prompt_embeds=negative)
    long = torch.cat([embeds, embeds], dim=1)
    assert draw(whole, None, prompt_embeds=long, negative_prompt_embeds=long).isfinite().all()
    assert draw(whole, None, prompt_embeds=long, guidance_scale=1.0).isfinite().all()


def test_runs_with_the_same_values_are_two(ours: Any) -> None:
    """A second thread's run may hold tensors, of which nobody can ask whether they are equal."""
    first, second = (Run(prompt_embeds=torch.ones(2, 2)) for _ in range(2))
    with under_way(ours, first), ThreadPoolExecutor(1) as pool:

        def elsewhere() -> bool:
            with under_way(ours, second):
                pass
            with under_way(ours, second):
                return bool(ours._interrupt)

        assert pool.submit(elsewhere).result() is False
    assert first != second
