"""Every stock scheduler of the Stable Diffusion family behind the core's Sampler protocol.

The stock side of each comparison is the loop that stock pipelines write out by hand.

Legend: x = latents in the scheduler's own scale; order = its timesteps per step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ldm_pipeline.diffusion import CLEAN, Noise, Plan, Schedule, make_denoiser, run
from ldm_pipeline.errors import UserError
from ldm_pipeline.models.schedulers import STOCK_SCHEDULERS, StockSampler, stock_sampler
from ldm_pipeline.request import STOCK_SAMPLERS

CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "clip_sample": False,
}
SCHEDULE = Schedule.from_config(CONFIG)
STEPS = 6
SEEDS = (11, 5, 7, 2, 3, 13, 17, 19)

# What StableDiffusionPipeline calls compatible, and three more that people use with it. Two of the
# list are not here: LMSDiscreteScheduler, whose class needs scipy, and DPMSolverSDEScheduler, which
# needs torchsde and is refused (below).
FAMILY = (
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "EDMEulerScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "SASolverScheduler",
)
OPTIONS = {"DPMSolverSinglestepScheduler": {"lower_order_final": True}}
# numpy's remark about how stock schedulers pass it tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
every = pytest.mark.parametrize("name", FAMILY)


def made(name: str, **settings: Any) -> Any:
    config = {**CONFIG, **OPTIONS.get(name, {}), **settings}
    return getattr(diffusers, name).from_config(config)


def network(x: Tensor, t: Tensor) -> Tensor:
    """A stand-in for a UNet: bounded, nonlinear, aware of the level and of its neighbours."""
    level = (t.float() / 1000).view(-1, 1, 1, 1)
    return torch.tanh(x + 0.5 * x.roll(1, dims=-1)) * (0.6 + 0.3 * level)


denoiser = make_denoiser(network, SCHEDULE, "epsilon")


def ours(sampler: StockSampler, seeds: Sequence[int] = SEEDS, n: int = STEPS) -> Tensor:
    noise = Noise.of(seeds)
    course = sampler.course(SCHEDULE, n)
    start = course.first(noise.draw((4, 8, 8)))
    return run(Plan(start, course.times), denoiser, course.step, noise)


def theirs(
    scheduler: Any,
    first: int = 0,
    z: Tensor | None = None,
    eta: float = 0.0,
    custom: dict[str, Any] | None = None,
    keep: Callable[[Tensor, Tensor], Tensor] = lambda x, after: x,
) -> Tensor:
    """The stock loop; with z, image-to-image from the timestep at index `first`.

    `keep` sees the latents after every step, and the timesteps still to come.
    """
    scheduler.set_timesteps(**(custom or {"num_inference_steps": STEPS}))
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    x = randn_tensor((len(SEEDS), 4, 8, 8), generator=generators)
    timesteps = scheduler.timesteps[first:]
    if z is None:
        x = x * scheduler.init_noise_sigma
    else:
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        x = scheduler.add_noise(z, x, timesteps[:1].repeat(len(SEEDS)))
    accepted = inspect.signature(scheduler.step).parameters
    extra = {
        key: value
        for key, value in {"generator": generators, "eta": eta}.items()
        if key in accepted
    }
    for i, t in enumerate(timesteps):
        answer = network(scheduler.scale_model_input(x, t), t.expand(len(SEEDS)))
        x = scheduler.step(answer, t, x, **extra, return_dict=False)[0]
        x = keep(x, timesteps[i + 1 :])
    return x


def test_the_family_is_complete() -> None:
    compatible = set(diffusers.DDIMScheduler._compatibles)
    absent = {"LMSDiscreteScheduler", "DPMSolverSDEScheduler"}
    assert compatible - absent <= set(FAMILY)


def test_the_names_are_those_that_the_command_offers() -> None:
    assert set(STOCK_SCHEDULERS) == set(STOCK_SAMPLERS)


@every
def test_latents_are_those_of_stock_bit_for_bit(name: str) -> None:
    assert torch.equal(ours(StockSampler(made(name), eta=0.0)), theirs(made(name)))


@every
def test_an_image_is_the_same_in_any_company(name: str) -> None:
    sampler = StockSampler(made(name))
    together = ours(sampler)
    for size in (1, 2, 4, 8):
        for at in range(0, 8, size):
            apart = ours(sampler, SEEDS[at : at + size])
            # Vectorised float32 may round differently in the last place, here of values up to 30.
            torch.testing.assert_close(apart, together[at : at + size], rtol=0, atol=1e-5)
    assert torch.equal(together, ours(sampler)), "a second run must repeat the first"


@every
def test_a_scheduler_is_not_touched_and_its_past_does_not_matter(name: str) -> None:
    fresh, used = made(name), made(name)
    theirs(used)
    before = deepcopy(vars(used))
    assert torch.equal(ours(StockSampler(used)), ours(StockSampler(fresh)))
    for key, value in before.items():
        same = value is vars(used)[key] or str(value) == str(vars(used)[key])
        assert same, f"{key} changed"


@every
def test_threads_do_not_meet(name: str) -> None:
    sampler = StockSampler(made(name))
    serial = [ours(sampler, [seed]) for seed in SEEDS]
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(lambda seed: ours(sampler, [seed]), SEEDS))
    assert all(torch.equal(a, b) for a, b in zip(serial, threaded, strict=True))


@every
def test_image_to_image_starts_where_stock_does(name: str) -> None:
    scheduler = made(name)
    z = torch.randn(len(SEEDS), 4, 8, 8, generator=torch.Generator().manual_seed(1))
    course = StockSampler(scheduler, eta=0.0).course(SCHEDULE, STEPS, strength=0.5)
    noise = Noise.of(SEEDS)
    start = course.noisy(z, noise.like(z), course.times[0])
    x = run(Plan(start, course.times), denoiser, course.step, noise)
    assert torch.equal(x, theirs(scheduler, first=3 * scheduler.order, z=z))
    assert torch.equal(course.noisy(z, x, CLEAN), z)


@every
def test_known_parts_are_put_back_as_stock_inpainting_does(name: str) -> None:
    """After every step the left half is z again, noised to where the next step begins."""
    scheduler = made(name)
    z = torch.randn(len(SEEDS), 4, 8, 8, generator=torch.Generator().manual_seed(1))
    known = (torch.arange(8) < 4).float()
    course = StockSampler(scheduler, eta=0.0).course(SCHEDULE, STEPS)
    noise = Noise.of(SEEDS)
    n = noise.like(z)

    def keep(x: Tensor, s: float) -> Tensor:
        return known * course.noisy(z, n, s) + (1 - known) * x

    x = run(Plan(course.first(n), course.times, keep), denoiser, course.step, noise)

    def stock_keep(x: Tensor, after: Tensor) -> Tensor:
        kept = scheduler.add_noise(z, n, after[:1]) if len(after) else z
        return known * kept + (1 - known) * x

    assert torch.equal(x, theirs(scheduler, keep=stock_keep))
    assert torch.equal(x[..., :4], z[..., :4])


def test_levels_that_share_a_timestep_are_steps_of_their_own() -> None:
    """Noise beyond the schedule's is asked about at its last timestep: here, twice."""
    sampler = StockSampler(made("EulerDiscreteScheduler"), sigmas=(60.0, 30.0, 5.0, 1.0, 0.0))
    course = sampler.course(SCHEDULE, 4)
    assert course.times[:2] == (999.0, 999.0)
    assert ours(sampler).isfinite().all()
    # One Euler step from sigma 60 to 30 over a denoiser that answers eps = 1.
    one = make_denoiser(lambda x, t: torch.ones_like(x), SCHEDULE, "epsilon")
    x = course.step(one, torch.zeros(1, 1, 1, 1), 999.0, 999.0, Noise.of([0]))
    assert x.item() == -30.0


@pytest.mark.parametrize(
    "name,kind,levels",
    [
        ("EulerDiscreteScheduler", "timesteps", (999, 700, 400, 100)),
        ("EulerDiscreteScheduler", "sigmas", (14.0, 5.0, 1.0, 0.2, 0.0)),
        ("DPMSolverMultistepScheduler", "timesteps", (999, 700, 400, 100)),
        ("LCMScheduler", "timesteps", (999, 499)),
    ],
)
def test_custom_levels(name: str, kind: str, levels: tuple[Any, ...]) -> None:
    settings: dict[str, Any] = {kind: levels}
    x = ours(StockSampler(made(name), **settings), n=50)  # n gives way to the levels
    assert torch.equal(x, theirs(made(name), custom={kind: list(levels)}))


@pytest.mark.parametrize("name", ["DDIMScheduler", "TCDScheduler"])
def test_eta_reaches_the_step(name: str) -> None:
    noisy = ours(StockSampler(made(name), eta=0.8))
    assert torch.equal(noisy, theirs(made(name), eta=0.8))
    assert not torch.equal(noisy, ours(StockSampler(made(name), eta=0.0)))


@pytest.mark.parametrize("name", STOCK_SCHEDULERS)
def test_names_draw(name: str) -> None:
    sampler = stock_sampler(name, made("PNDMScheduler", skip_prk_steps=True).config)
    assert type(sampler.scheduler).__name__ == STOCK_SCHEDULERS[name]
    assert sampler.scheduler.config.beta_schedule == "scaled_linear"
    x = ours(sampler, [1, 2])
    assert x.isfinite().all()
    assert not torch.equal(x, ours(sampler, [3, 4]))


def test_one_scheduler_serves_all_draws_over_its_schedule() -> None:
    betas = np.linspace(1e-4, 0.02, 1000, dtype=np.float32)
    own = {**CONFIG, "trained_betas": betas}
    sampler = stock_sampler("unipc", own)
    assert stock_sampler("unipc", own).scheduler is sampler.scheduler
    assert torch.equal(sampler.scheduler.betas, torch.from_numpy(betas))
    other = stock_sampler("unipc", CONFIG).scheduler
    assert not torch.equal(other.betas, sampler.scheduler.betas)


def test_the_sde_name_means_the_stochastic_solver() -> None:
    """From one start with other generators a stochastic sampler ends elsewhere."""
    ends = []
    for seed in (1, 2):
        course = stock_sampler("dpmpp_2m_sde", CONFIG).course(SCHEDULE, STEPS)
        plan = Plan(torch.ones(1, 4, 8, 8), course.times)
        ends.append(run(plan, denoiser, course.step, Noise.of([seed])))
    assert not torch.equal(*ends)


def test_schedulers_that_cannot_be_made_right_are_refused() -> None:
    class DPMSolverSDEScheduler:
        """As the stock class, whose own needs torchsde: a Brownian tree, seeded by no generator."""

        noise_sampler = None

    with pytest.raises(UserError, match=r"DPMSolverSDEScheduler.*dpmpp_2m_sde"):
        StockSampler(DPMSolverSDEScheduler())
    with pytest.raises(UserError, match="flow-matching"):
        StockSampler(diffusers.FlowMatchEulerDiscreteScheduler())
    for name in ("RePaintScheduler", "KarrasVeScheduler", "ScoreSdeVeScheduler"):
        with pytest.raises(UserError, match=rf"^{name} does not step from .*sampler='ddim'"):
            StockSampler(getattr(diffusers, name)())


def test_fewer_betas_than_levels_are_told_of() -> None:
    """Where a scheduler steps from a level that it has no number of."""
    short = diffusers.DDPMScheduler(trained_betas=[0.1, 0.2])
    course = StockSampler(short).course(SCHEDULE, STEPS)
    plan = Plan(torch.ones(1, 4, 8, 8), course.times)
    with pytest.raises(UserError, match=r"trained_betas are 2, and its num_train_timesteps 1000"):
        run(plan, denoiser, course.step, Noise.of([1]))


def test_a_scheduler_that_cannot_begin_with_a_picture_says_so() -> None:
    course = StockSampler(made("IPNDMScheduler")).course(SCHEDULE, STEPS, 0.5)
    with pytest.raises(UserError, match="IPNDMScheduler cannot put noise into a picture"):
        course.noisy(torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8), course.times[0])


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="did you mean 'unipc'"):
        stock_sampler("unipcc", CONFIG)
    with pytest.raises(UserError, match="DDIMScheduler takes no custom sigmas"):
        StockSampler(made("DDIMScheduler"), sigmas=(5.0, 1.0)).course(SCHEDULE, 5)
    for name in ("pndm", "unipc", "dpmpp_2m_sde"):
        with pytest.raises(
            UserError, match=r"num_inference_steps=1001 must lie between 1 and 1000"
        ):
            stock_sampler(name, CONFIG).course(SCHEDULE, 1001)
    with pytest.raises(UserError, match="either timesteps or sigmas"):
        StockSampler(made("EulerDiscreteScheduler"), timesteps=(9,), sigmas=(5.0, 1.0))
    with pytest.raises(UserError, match=r"LCMScheduler: .*50") as caught:
        StockSampler(made("LCMScheduler")).course(SCHEDULE, 60)
    assert "\n" not in str(caught.value)
