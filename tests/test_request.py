"""What may be asked for: every mistake is one line, and none of it needs torch."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ldm_pipeline.errors import UserError
from ldm_pipeline.request import (
    CALLBACK_TENSORS,
    NATIVE_SAMPLERS,
    SAMPLER_NAMES,
    STOCK_SAMPLERS,
    Request,
)


def tensor(*shape: int) -> Any:
    """Stands for a tensor: a request reads nothing but the shape."""
    return SimpleNamespace(shape=shape)


class Random:
    """An object that is told in two lines."""

    def __repr__(self) -> str:
        return "Random {\n}"


def test_needs_no_torch() -> None:
    """A fresh interpreter refuses a request without importing torch, diffusers or numpy."""
    program = (
        "import sys\n"
        "import ldm_pipeline\n"
        "from ldm_pipeline.request import Request\n"
        "assert ldm_pipeline.Request is Request and ldm_pipeline.__version__\n"
        "assert 'load' in dir(ldm_pipeline) and not hasattr(ldm_pipeline, 'laod')\n"
        "try:\n    Request(prompt='a', sampler='dimm')\n"
        "except ValueError as error:\n    print(error)\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "did you mean 'ddim'" in done.stdout


def test_sampler_names_are_those_of_the_registries() -> None:
    from ldm_pipeline.diffusion.samplers import SAMPLERS
    from ldm_pipeline.models.schedulers import STOCK_SCHEDULERS

    assert set(NATIVE_SAMPLERS) == set(SAMPLERS)
    assert set(STOCK_SAMPLERS) == set(STOCK_SCHEDULERS)
    assert len(set(SAMPLER_NAMES)) == len(SAMPLERS) + len(STOCK_SCHEDULERS)


def without_addresses(value: object) -> str:
    """The text of a value, the same in every process."""
    return re.sub(r" at 0x\w+", "", str(value))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "pass prompt or prompt_embeds"),
    ({"prompt": 3}, "must be a text"),
    ({"prompt": []}, "empty list"),
    ({"prompt": ["a", 3]}, "list of texts"),
    ({"prompt_embeds": tensor(1, 77, 32)}, "only one of them"),
    ({"prompt": None, "prompt_embeds": tensor(77, 32)}, "[prompts, tokens, channels]"),
    ({"prompt": None, "prompt_embeds": [1.0]}, "must be a tensor, not list"),
    ({"negative_prompt": ["x", "y", "z"]}, "3 texts for 2 prompts"),
    ({"negative_prompt": "x", "negative_prompt_embeds": tensor(2, 7, 3)}, "only one of them"),
    ({"negative_prompt_embeds": tensor(1, 77, 32)}, "1 rows for 2 prompts"),
    ({"height": 130}, "height=130 is not a multiple of 8; the nearest is 128"),
    ({"width": 0}, "width=0"),
    ({"height": 10**8, "width": 8}, "height=100000000 is too large; a side has 16384 pixels"),
    ({"width": 16392}, "width=16392 is too large"),
    ({"height": 16384, "width": 4104}, "height=16384 is too much with width=4104"),
    ({"width": 64.0}, "width=64.0 must be a whole number"),
    ({"num_inference_steps": 0}, "num_inference_steps=0 must be a whole number of at least 1"),
    ({"num_inference_steps": -4}, "num_inference_steps=-4"),
    ({"num_inference_steps": None}, "num_inference_steps=None"),
    ({"num_inference_steps": True}, "num_inference_steps=True"),
    ({"timesteps": [1], "sigmas": [1.0]}, "only one of them"),
    ({"timesteps": []}, "timesteps is empty"),
    ({"timesteps": 5}, "timesteps=5 must be a list of numbers"),
    ({"timesteps": "999"}, "timesteps='999' must be"),
    ({"sigmas": [1.0, None]}, "sigmas=[1.0, None] must be"),
    ({"sigmas": [math.nan]}, "sigmas=[nan] must be"),
    ({"guidance_scale": math.nan}, "guidance_scale=nan must be a finite number, from 0 to 10000"),
    ({"guidance_scale": math.inf}, "guidance_scale=inf"),
    ({"guidance_scale": -1}, "guidance_scale=-1"),
    ({"guidance_scale": "7"}, "guidance_scale='7'"),
    ({"guidance_rescale": 1.5}, "guidance_rescale=1.5 must be a finite number, from 0 to 1"),
    ({"guidance_interval": (0.5, 0.5)}, "is empty"),
    ({"guidance_interval": (0.5, 1.5)}, "guidance_interval=1.5"),
    ({"guidance_interval": 0.5}, "two fractions"),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt=0"),
    ({"eta": 2.0}, "eta=2.0"),
    ({"eta": 0.5, "sampler": "euler"}, "eta=0.5 does nothing with sampler='euler'"),
    ({"eta": 0.5, "lcm": True}, "does nothing with sampler='lcm'"),
    ({"clip_skip": -1}, "clip_skip=-1"),
    ({"cross_attention_kwargs": 5}, "cross_attention_kwargs=5 must be a dictionary"),
    ({"image": []}, "image is an empty list; pass at least one picture"),
    ({"image": 1, "mask_image": ()}, "mask_image is an empty list"),
    ({"seed": -1}, "seed=-1"),
    ({"seed": 2**63}, "too large"),
    ({"seed": "7"}, "seed='7'"),
    ({"seed": [1, 2, 3]}, "3 entries for 2 images"),
    ({"seed": [1, 2.5]}, "seed=2.5"),
    ({"seed": 1, "generator": object()}, "only one of them"),
    ({"generator": [torch.Generator()]}, "1 entries for 2 images"),
    ({"generator": torch.Generator}, "must be a torch.Generator"),
    ({"generator": torch}, "must be a torch.Generator"),
    ({"seed": np.array([1, 2])}, "or a list of them, one per image"),
    ({"seed": range(3)}, "seed has 3 entries for 2 images"),
    ({"prompt": "a \ud800 star"}, "holds half a letter"),
    ({"exact_steps": "no"}, "exact_steps='no' must be True or False"),
    ({"keep_unmasked": 1}, "keep_unmasked=1 must be True or False"),
    ({"lcm": ""}, "lcm='' names no file"),
    ({"guidance_scale": 1e30}, "from 0 to 10000"),
    ({"cross_attention_kwargs": {"scale": "x"}}, "scale='x' must be a finite number"),
    ({"cross_attention_kwargs": {"scale": math.nan}}, "scale=nan must be a finite number"),
    ({"prompt": None, "prompt_embeds": tensor(0, 77, 32)}, "prompt_embeds has shape (0, 77, 32)"),
    ({"latents": tensor(2, 4, 0, 0)}, "latents has shape (2, 4, 0, 0)"),
    ({"generator": 42}, "generator=42 must be a torch.Generator"),
    ({"generator": [1, 2]}, "a number is passed as seed"),
    ({"latents": tensor(1, 4, 16, 16)}, "must be [2, channels"),
    ({"sampler": "euller"}, "did you mean 'euler'?"),
    ({"sampler": "DDIM"}, "choose one of ddim, ddpm"),
    ({"sampler": Random()}, "sampler must be a name, not a Random; choose one of ddim, ddpm"),
    ({"output_type": None}, "output_type must be a name, not None; choose one of pil"),
    ({"callback_on_step_end_tensor_inputs": None}, "None must be a list of names"),
    ({"callback_on_step_end_tensor_inputs": "latents"}, "'latents' must be a list of names"),
    ({"output_type": "jpeg"}, "choose one of pil, np, pt, latent"),
    ({"callback_on_step_end_tensor_inputs": ["latent"]}, "did you mean 'latents'?"),
]


@pytest.mark.parametrize(
    "wrong,message", WRONG, ids=[without_addresses(wrong) for wrong, _ in WRONG]
)
def test_mistakes_are_one_line(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Request(**{"prompt": ["a red star", "a blue moon"], **wrong})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_misspelt_name_is_refused() -> None:
    with pytest.raises(TypeError):
        Request(prompt="a", guidence_scale=3.0)  # type: ignore[call-arg]  # the point of the test


def test_counts() -> None:
    request = Request(prompt=["a", "b"], num_images_per_prompt=3, seed=5, negative_prompt="fog")
    assert (request.prompt_count, request.image_count) == (2, 6)
    assert request.seeds == (5, 6, 7, 8, 9, 10)
    assert request.negative_prompts == ["fog", "fog"]
    embedded = Request(prompt_embeds=tensor(3, 77, 32), seed=[4, 2, 9])
    assert (embedded.prompts, embedded.prompt_count, embedded.seeds) == ([], 3, (4, 2, 9))
    plain = Request(prompt="a")
    assert (plain.seeds, plain.negative_prompts, plain.prompts) == (None, None, ["a"])


def test_what_is_allowed() -> None:
    for name in SAMPLER_NAMES:
        assert Request(prompt="a", sampler=name).sampler == name
    Request(prompt="", guidance_scale=0, guidance_rescale=1, eta=1, clip_skip=0, seed=0)
    Request(prompt="a", height=16384, width=4096, cross_attention_kwargs={"scale": 0.5})
    Request(prompt="a", num_inference_steps=None, timesteps=[999, 1])
    Request(prompt="a", callback_on_step_end_tensor_inputs=CALLBACK_TENSORS)


def test_a_request_does_not_change() -> None:
    with pytest.raises(AttributeError):
        Request(prompt="a").prompt = "b"  # type: ignore[misc]  # the point of the test
