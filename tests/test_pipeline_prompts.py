"""Laws of weighted prompts in the pipelines: opt-in, exact where stock can, and read to the end.

short    our pipeline with a text encoder of 12 tokens: 10 words fill a chunk
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipeline import LatentDiffusionPipeline, UserError
from ldm_pipeline.models import chunks

PLAIN = ["a red star", "", "blue house, red star"]
LONG = "red star, blue house, " * 12


@pytest.fixture
def short(tiny: Callable[..., dict[str, Any]]) -> LatentDiffusionPipeline:
    parts = tiny()
    parts["tokenizer"].model_max_length = 12
    pipe = LatentDiffusionPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(autouse=True)
def _nothing_was_said() -> None:
    chunks._say.cache_clear()


def draw(pipe: Any, prompt: Any, **told: Any) -> Tensor:
    """Latents of two steps."""
    told = {"num_inference_steps": 2, "output_type": "latent", **told}
    if "seed" not in told and "generator" not in told:
        told["generator"] = torch.Generator().manual_seed(3)
    return pipe(prompt, **told).images


@pytest.mark.parametrize("negative", [None, ["a", "", "b"]])
@torch.no_grad()
def test_plain_prompts_have_stock_s_embeddings_exactly(
    ours: Any, stock: Any, negative: Any
) -> None:
    theirs = stock.encode_prompt(PLAIN, "cpu", 2, True, negative)
    for weighted in (False, True):
        mine = ours.encode_prompt(PLAIN, "cpu", 2, True, negative, weighted=weighted)
        assert all(map(torch.equal, mine, theirs))
    skipped = [ours.encode_prompt(PLAIN, "cpu", 1, True, clip_skip=1, weighted=w) for w in (0, 1)]
    assert all(map(torch.equal, *skipped))
    drawn = draw(ours, PLAIN, negative_prompt=negative, weighted=True)
    assert torch.equal(drawn, draw(stock, PLAIN, negative_prompt=negative))


def test_syntax_is_read_only_when_asked(ours: Any, stock: Any) -> None:
    prompt = "a (red:1.3) BREAK [star]"
    plain = draw(ours, prompt)
    assert torch.equal(plain, draw(stock, prompt))
    assert not torch.equal(plain, draw(ours, prompt, weighted=True))
    with pytest.raises(UserError, match="weighted='yes'"):
        draw(ours, prompt, weighted="yes")


@pytest.mark.parametrize("told", [
    {}, {"negative_prompt": "x, " * 30}, {"guidance_scale": 1.0}, {"num_images_per_prompt": 2},
    {"sampler": "euler_a", "seed": 1}, {"guidance_rescale": 0.5, "clip_skip": 1},
])  # fmt: skip
def test_a_long_prompt_is_drawn_to_its_last_word(
    short: Any, told: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        drawn = draw(short, LONG + "red", weighted=True, **told)
    assert not caplog.messages, "nothing is cut off"
    assert drawn.isfinite().all()
    assert not torch.equal(drawn, draw(short, LONG + "blue", weighted=True, **told))


def test_a_picture_of_a_batch_is_that_of_its_prompt_alone(short: Any) -> None:
    """As long as the batch's longest prompt is no longer than its own."""
    prompts = ["a (red:1.5) star", "[blue] house"]
    both = draw(short, prompts, seed=[4, 5], weighted=True)
    for i, prompt in enumerate(prompts):
        alone = draw(short, prompt, seed=4 + i, weighted=True)
        # Another batch changes the order of sums in matrix products.
        assert torch.allclose(both[i : i + 1], alone, atol=1e-4)


def test_embeddings_of_one_side_beside_a_longer_text(short: Any) -> None:
    with torch.no_grad():
        embeds, against = short.encode_prompt("a star", "cpu", 1, True)
    drawn = draw(short, None, prompt_embeds=embeds, negative_prompt=LONG, weighted=True)
    # The empty text was encoded in another batch, which changes the order of sums.
    assert torch.allclose(
        drawn, draw(short, "a star", negative_prompt=LONG, weighted=True), atol=1e-4
    )
    drawn = draw(short, LONG, negative_prompt_embeds=against, weighted=True)
    assert torch.allclose(drawn, draw(short, LONG, weighted=True), atol=1e-4)


def test_a_learnt_word_of_several_vectors(short: Any) -> None:
    """It is read as all of its vectors, weighted with its words, and never cut in two."""
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    short.load_textual_inversion({"<mine>": vectors}, token="<mine>")

    def convert(texts: list[str]) -> list[str]:
        return short.maybe_convert_prompt(texts, short.tokenizer)

    first = short.tokenizer.convert_tokens_to_ids("<mine>")
    found = chunks.read(short.tokenizer, ["(<mine>:2) a", "x " * 8 + "<mine>"], convert)
    assert found.ids[0, 0, 1:4].tolist() == [first, first + 1, first + 2]
    assert found.weights[0, 0, :5].tolist() == [1, 2, 2, 2, 1]
    assert found.ids[1, 1, 1:4].tolist() == [first, first + 1, first + 2]
    drawn = draw(short, "a (<mine>:1.5) star", negative_prompt="<mine>", weighted=True)
    assert not torch.equal(drawn, draw(short, "a <mine> star", weighted=True))


@pytest.mark.parametrize("clip_skip", [None, 1])
@pytest.mark.parametrize("negative", ["blue", ""])
@torch.no_grad()
def test_both_encoders_of_sdxl(
    tiny_xl: Callable[[], dict[str, Any]], negative: str, clip_skip: int | None
) -> None:
    """Plain prompts as stock encodes them; others in both encoders, pooled from the first chunk."""
    from diffusers import StableDiffusionXLPipeline

    parts = tiny_xl()
    stock = StableDiffusionXLPipeline(**copy.copy(parts))
    both = (
        [parts["tokenizer"], parts["tokenizer_2"]],
        [parts["text_encoder"], parts["text_encoder_2"]],
    )

    def encode(prompt: str) -> Any:
        return chunks.encode_both_xl(
            *both, [[prompt], [prompt]], [[negative], [negative]], clip_skip=clip_skip
        )

    theirs = stock.encode_prompt("a red star", None, "cpu", 1, True, negative, clip_skip=clip_skip)
    assert all(map(torch.equal, encode("a red star"), theirs))
    embeds, against, pooled, pooled_against = encode("a (red:2) star BREAK blue")
    assert embeds.shape == against.shape == (1, 154, 64)
    # Two rows instead of one only change the order of sums.
    assert torch.allclose(pooled, theirs[2], atol=1e-5)
    assert torch.allclose(pooled_against, theirs[3], atol=1e-5)
    for half in (slice(0, 32), slice(32, 64)):
        assert not torch.allclose(embeds[:, :77, half], theirs[0][..., half], atol=1e-3)
    second = encode("blue")[0]
    assert torch.allclose(embeds[:, 77:], second, atol=1e-5)
