"""Through a real UNet, too, an image is the same whatever stands beside it, for every sampler.

The UNet is tiny and random, of the real class. Its answer is read as v and scaled down: a random
answer changes more with its input than a trained one, and read as eps it makes latents of size 70,
of which 1e-5 is hardly more than float32 resolves.
"""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from ldm_pipeline.diffusion import SAMPLERS, Noise, Plan, Sampler, Schedule, make_denoiser, run
from ldm_pipeline.models.schedulers import STOCK_SCHEDULERS, StockSampler, stock_sampler
from ldm_pipeline.models.unet import bind

CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "clip_sample": False,
}
SCHEDULE = Schedule.from_config(CONFIG)
SEEDS = (11, 5, 7, 2, 3, 13, 17, 19)

# A stock scheduler that stands behind a model's own `scheduler/` folder more often than others.
OWN = ("PNDMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler")


def sampler_of(name: str) -> Sampler:
    if name in OWN:
        return StockSampler(getattr(diffusers, name).from_config(CONFIG))
    return SAMPLERS[name] if name in SAMPLERS else stock_sampler(name, CONFIG)


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
@pytest.mark.parametrize("name", [*SAMPLERS, *STOCK_SCHEDULERS, *OWN])
@torch.no_grad()
def test_an_image_is_the_same_in_any_company(name: str, components: dict[str, Any]) -> None:
    unet, sampler = components["unet"], sampler_of(name)
    embeds = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))

    def draw(seeds: tuple[int, ...]) -> Tensor:
        noise = Noise.of(seeds)
        course = sampler.course(SCHEDULE, 8)
        answer = bind(unet, embeds.expand(len(seeds), -1, -1))
        denoiser = make_denoiser(lambda x, t: 0.3 * answer(x, t), SCHEDULE, "v_prediction")
        start = course.first(noise.draw((4, 8, 8)))
        return run(Plan(start, course.times), denoiser, course.step, noise)

    together = draw(SEEDS)
    for first, last in (*((i, i + 1) for i in range(8)), (6, 8), (1, 5)):
        # Convolutions sum in another order for another batch: 1e-7 of values up to 15, a step.
        apart = draw(SEEDS[first:last])
        torch.testing.assert_close(apart, together[first:last], rtol=0, atol=1e-5)
    assert not torch.equal(together[0], together[1])
