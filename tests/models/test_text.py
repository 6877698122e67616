"""Words to embeddings: what is cut off is said, and threads do not disturb one another."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from ldm_pipeline.errors import UserError
from ldm_pipeline.models import text


@pytest.fixture
def words(components: dict[str, Any]) -> tuple[Any, Any]:
    return components["tokenizer"], components["text_encoder"]


def test_tokens_are_padded_to_the_model_s_length(words: tuple[Any, Any]) -> None:
    tokens = text.tokenise(words[0], ["a", "a red star"])
    assert tokens.input_ids.shape == tokens.attention_mask.shape == (2, 77)
    assert tokens.attention_mask.sum(1).tolist() == [3, 8]
    assert text.tokenise(words[0], ["a"], length=9).input_ids.shape == (1, 9)


def test_the_text_that_is_cut_off_is_named(
    words: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        text.tokenise(words[0], ["red " * 75])  # 75 words and the two ends fill 77 tokens
        assert not caplog.messages
        tokens = text.tokenise(words[0], ["red " * 75 + "blue blue", "a star"])
    assert tokens.input_ids.shape == (2, 77)
    (message,) = caplog.messages
    assert "at most 77 tokens" in message
    assert "['blue blue']" in message
    caplog.clear()
    text.tokenise(words[0], ["red " * 75 + "blue " * 9999])
    (message,) = caplog.messages
    assert "'blue blue blue" in message
    assert len(message) < 500, "not a whole book"


def test_texts_are_converted_first(words: tuple[Any, Any]) -> None:
    """Textual inversion rewrites the prompts before they are tokenised."""
    swapped = text.tokenise(words[0], ["red"], convert=lambda texts: [t + " star" for t in texts])
    assert torch.equal(swapped.input_ids, text.tokenise(words[0], ["red star"]).input_ids)


def test_embeddings(words: tuple[Any, Any]) -> None:
    embeds = text.encode(*words, ["a red star", "a blue star"])
    assert embeds.shape == (2, 77, 32)
    # The batch only changes the order of sums in matrix products.
    assert torch.allclose(embeds[:1], text.encode(*words, ["a red star"]), atol=1e-5)
    assert not torch.allclose(embeds[0], embeds[1], atol=1e-2)


def test_clip_skip(words: tuple[Any, Any]) -> None:
    """Skipping no layer is the plain encoding; each layer skipped is another embedding."""
    plain = text.encode(*words, ["a red star"])
    skipped = [text.encode(*words, ["a red star"], clip_skip=k) for k in range(4)]
    assert torch.equal(skipped[0], plain)
    for k in (1, 2, 3):
        assert not torch.allclose(skipped[k], skipped[k - 1], atol=1e-3)
    # All went through the final layer norm, whose weights start at 1 and 0.
    for embeds in skipped:
        assert embeds.mean(-1).abs().max() < 1e-5
    with pytest.raises(UserError, match="clip_skip=4 is more than"):
        text.encode(*words, ["a red star"], clip_skip=4)


def test_gradients_flow(words: tuple[Any, Any]) -> None:
    assert text.encode(*words, ["a red star"]).requires_grad


def test_a_word_that_the_encoder_never_learnt(words: tuple[Any, Any]) -> None:
    """Named by its number, before torch fails on it."""
    tokenizer, text_encoder = words
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["sks"])
    rows = text_encoder.get_input_embeddings().num_embeddings
    assert text.encode(tokenizer, text_encoder, ["a star"]).isfinite().all()
    for ask in (text.asking, text.asking_inner):
        tokens = text.tokenise(tokenizer, ["a sks star"])
        with pytest.raises(UserError, match=rf"number {len(tokenizer) - 1} .* knows {rows} tokens"):
            ask(text_encoder)(tokens.input_ids, tokens.attention_mask)


def test_no_encoder(words: tuple[Any, Any]) -> None:
    with pytest.raises(UserError, match="pass prompt_embeds"):
        text.encode(words[0], None, ["a"])


def test_threads_share_a_tokenizer(words: tuple[Any, Any]) -> None:
    """Calls with different lengths, which an unlocked fast tokenizer mixes up or refuses."""
    jobs = [(["red " * (1 + i % 7)], 5 + i % 11) for i in range(200)]

    def one(job: tuple[list[str], int]) -> Any:
        return text.tokenise(words[0], job[0], length=job[1], warn=False).input_ids.tolist()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, jobs)) == [one(job) for job in jobs]


def test_adapter_scale(tiny: Callable[..., dict[str, Any]]) -> None:
    """Scale 0 is the plain encoder; after the block the adapter counts in full again."""
    from peft import LoraConfig

    parts = tiny()
    encoder = parts["text_encoder"]

    def encode() -> torch.Tensor:
        return text.encode(parts["tokenizer"], encoder, ["a red star"])

    plain = encode()
    with text.adapter_scale(encoder, 0.5), text.adapter_scale(None, 0.5):
        assert torch.equal(encode(), plain), "there is nothing to scale yet"
    encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    full = encode()
    with text.adapter_scale(encoder, 0.0):
        assert torch.equal(encode(), plain)
    assert torch.equal(encode(), full)
    with text.adapter_scale(encoder, 0.5):
        half = encode()
    assert not torch.allclose(half, full, atol=1e-4)
    assert not torch.allclose(half, plain, atol=1e-4)
    with pytest.raises(ZeroDivisionError), text.adapter_scale(encoder, 0.5):
        raise ZeroDivisionError
    assert torch.equal(encode(), full), "the scale is given back after an error too"
    for module in encoder.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.7)
    softer = encode()
    for scale in (0.0, 0.3):
        with text.adapter_scale(encoder, scale):
            assert not torch.equal(encode(), softer)
        assert torch.equal(encode(), softer), "the weight that it was attached with stays"
