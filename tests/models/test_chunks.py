"""Laws of long and weighted prompts: chunks lose nothing, and weights of 1 change nothing.

words     a tiny tokenizer and text encoder; CLIP's length, 77
short     the same, of 12 tokens: 10 words fill a chunk
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ldm_pipeline import UserError
from ldm_pipeline.models import chunks, text
from ldm_pipeline.models.chunks import Chunks, emphasise, encode, encode_both, read, split

COMMA, LATER = 7, 9
"""Token ids in the tests of `split`: a comma, and a later vector of a learnt word."""


@pytest.fixture
def words(components: dict[str, Any]) -> tuple[Any, Any]:
    return components["tokenizer"], components["text_encoder"]


@pytest.fixture
def short(tiny: Callable[..., dict[str, Any]]) -> tuple[Any, Any]:
    parts = tiny()
    parts["tokenizer"].model_max_length = 12
    # The layer norm's bias moves the mean of the embeddings away from 0, as training does.
    body = getattr(parts["text_encoder"], "text_model", parts["text_encoder"])
    with torch.no_grad():
        body.final_layer_norm.bias.add_(0.2)
    return parts["tokenizer"], parts["text_encoder"]


@pytest.fixture(autouse=True)
def _nothing_was_said() -> None:
    chunks._say.cache_clear()


def embeds(words: tuple[Any, Any], *texts: str) -> Tensor:
    """The weighted embeddings of some texts."""
    with torch.no_grad():
        return encode(text.asking(words[1]), read(words[0], texts))[0]


def plain(words: tuple[Any, Any], *texts: str) -> Tensor:
    """Their stock embeddings."""
    with torch.no_grad():
        return text.encode(*words, list(texts))


# Chunks -----------------------------------------------------------------------------------------


@given(
    st.lists(st.sampled_from([1, 2, 3, COMMA, LATER]), max_size=80),
    st.integers(1, 30),
)
def test_splitting_loses_nothing(ids: list[int], room: int) -> None:
    tokens = [(i, 1.0 + k) for k, i in enumerate(ids)]
    found = list(split(tokens, room, COMMA, frozenset({LATER})))
    assert [token for chunk in found for token in chunk] == tokens
    assert all(len(chunk) <= room for chunk in found)
    assert all(found) or found == [[]]


def test_a_full_chunk_ends_at_a_near_comma() -> None:
    def sizes(ids: list[int], room: int = 30) -> list[int]:
        return [len(chunk) for chunk in split([(i, 1.0) for i in ids], room, COMMA)]

    assert sizes([1] * 30) == [30]
    assert sizes([1] * 31) == [30, 1]
    assert sizes([1] * 20 + [COMMA] + [1] * 20) == [21, 20]
    assert sizes([1] * 9 + [COMMA] + [1] * 30) == [30, 10], "21 tokens back is too far"
    assert sizes([1] * 10 + [COMMA] + [1] * 30) == [11, 30]
    assert sizes([1] * 20 + [COMMA] + [1] * 9 + [COMMA]) == [30, 1], "it ends before a comma"


def test_a_learnt_word_stays_in_one_chunk() -> None:
    glued = frozenset({LATER})
    tokens = [(1, 1.0)] * 8 + [(2, 1.0), (LATER, 1.0), (LATER, 1.0)] + [(1, 1.0)]
    assert [len(chunk) for chunk in split(tokens, 10, COMMA, glued)] == [8, 4]
    endless = [(2, 1.0)] + [(LATER, 1.0)] * 11
    assert [len(chunk) for chunk in split(endless, 10, COMMA, glued)] == [10, 2]


def test_one_plain_chunk_is_what_stock_reads(words: tuple[Any, Any]) -> None:
    texts = ["", "a red star", "red, " * 30]
    stock = text.tokenise(words[0], texts)
    found = read(words[0], texts)
    assert torch.equal(found.ids[:, 0], stock.input_ids)
    assert torch.equal(found.mask[:, 0], stock.attention_mask)
    assert torch.equal(found.weights, torch.ones(3, 1, 77))


def test_padding_after_the_end_is_the_tokenizer_s(tiny_xl: Callable[[], dict[str, Any]]) -> None:
    second = tiny_xl()["tokenizer_2"]  # pads with another token than the one that ends
    stock = text.tokenise(second, ["a red star", ""]).input_ids
    found = read(second, ["a red star", ""]).padded(2)
    assert torch.equal(found.ids[:, 0], stock)
    assert torch.equal(found.ids[:, 1], stock[[1, 1]])


@given(st.text(alphabet="abc, .", max_size=120))
def test_up_to_77_tokens_the_embeddings_are_stock_s_exactly(prompt: str) -> None:
    from tests.conftest import tiny_text_encoder, tiny_tokenizer

    words = _shared(tiny_tokenizer, tiny_text_encoder)
    if len(words[0](prompt, verbose=False).input_ids) <= 77:
        assert torch.equal(embeds(words, prompt), plain(words, prompt))


_made: list[tuple[Any, Any]] = []


def _shared(tokenizer: Callable[[], Any], encoder: Callable[[int], Any]) -> tuple[Any, Any]:
    """One tokenizer and encoder for all examples of a property."""
    if not _made:
        made = tokenizer()
        _made.append((made, encoder(len(made))))
    return _made[0]


def test_a_long_text_is_read_to_its_end(short: tuple[Any, Any]) -> None:
    """Three chunks, each of which is what a text of its own would be."""
    long = "red star a b c d, " * 3
    ids = read(short[0], [long]).ids
    whole = short[0](long, add_special_tokens=False, verbose=False).input_ids
    start, end = short[0].bos_token_id, short[0].eos_token_id
    assert [i for i in ids.flatten().tolist() if i not in (start, end)] == whole
    halves = embeds(short, "red blue BREAK (a:1.0) star")
    assert halves.shape == (1, 24, 32)
    apart = plain(short, "red blue", "a star").flatten(0, 1)[None]
    assert torch.equal(halves, apart)


def test_shorter_texts_are_filled_up_with_the_empty_one(short: tuple[Any, Any]) -> None:
    both = embeds(short, "a BREAK b BREAK c", "d")
    nothing = plain(short, "")
    assert both.shape == (2, 36, 32)
    # Another batch only changes the order of sums.
    assert torch.allclose(both[1, 12:24], nothing[0], atol=1e-5)
    assert torch.allclose(both[1, 24:], nothing[0], atol=1e-5)
    assert torch.allclose(both[1, :12], plain(short, "d")[0], atol=1e-5)


# Weights ----------------------------------------------------------------------------------------


def test_weights_of_1_are_no_weights(short: tuple[Any, Any]) -> None:
    assert torch.equal(embeds(short, "(red:1.0) [(star:1.1)]"), plain(short, "red star"))


def test_a_weight_scales_its_tokens_and_keeps_the_mean(short: tuple[Any, Any]) -> None:
    weighted, unweighted = embeds(short, "a (red:1.5) star"), plain(short, "a red star")
    length = [len(short[0](w, add_special_tokens=False).input_ids) for w in ("a", "red")]
    inside = torch.zeros(12, dtype=torch.bool)
    inside[1 + length[0] : 1 + sum(length)] = True
    factor = (weighted / unweighted)[0]
    # Division and multiplication by the restored mean round differently.
    assert torch.allclose(factor[inside] / factor[~inside].mean(), torch.tensor(1.5), atol=1e-4)
    assert torch.allclose(weighted.mean(), unweighted.mean(), rtol=1e-5)
    assert factor[~inside].std() < 1e-5
    assert factor[~inside].mean() < 0.999, "the others give way"


def test_a_text_s_weights_do_not_depend_on_its_batch(short: tuple[Any, Any]) -> None:
    alone = embeds(short, "a (red:1.5) star")
    beside = embeds(short, "a (red:1.5) star", "(blue:3) BREAK [house]")
    # Another batch only changes the order of sums.
    assert torch.allclose(beside[:1, :12], alone, atol=1e-5)


@pytest.mark.parametrize("weight", [0.0, -1.0, 100.0])
def test_every_weight_gives_finite_embeddings(weight: float, words: tuple[Any, Any]) -> None:
    """Also where the mean is 0 but for rounding: after a layer norm without a bias."""
    found = embeds(words, f"a (red:{weight}) star")
    assert found.isfinite().all()
    if weight == 0:
        assert (found.abs().sum(-1) == 0).sum() == 1, "a token of weight 0 is silent"


def test_a_mean_that_cannot_be_kept_is_left(words: tuple[Any, Any]) -> None:
    """A mean of 0, and weights that cancel it, turn it over, or make it grow beyond themselves."""
    z = torch.tensor([
        [[1.0, -1.0], [2.0, -2.0]], [[1.0, 1.0], [1.0, 1.0]], [[1.0, 1.0], [-0.9, -0.9]],
        [[1.0, 1.0], [-0.5, -0.5]],
    ])  # fmt: skip
    w = torch.tensor([[1.0, 2.0], [1.0, -0.99], [1.0, 1.5], [1.0, 0.5]])
    assert torch.equal(emphasise(z, w), z * w[..., None])
    kept = emphasise(torch.ones(1, 2, 3), torch.tensor([[1.0, 3.0]]))
    assert torch.equal(kept[0, :, 0], torch.tensor([0.5, 1.5]))


# Both halves ------------------------------------------------------------------------------------


def test_prompt_and_negative_are_of_one_length(short: tuple[Any, Any]) -> None:
    with torch.no_grad():
        long, nothing = encode_both(*short, ["a BREAK b BREAK c"], [""])
        assert nothing is not None
        assert long.shape == nothing.shape == (1, 36, 32)
        assert torch.allclose(nothing, plain(short, "").repeat(1, 3, 1), atol=1e-5)
        brief, against = encode_both(*short, ["a", "b"], ["x BREAK (y:2)", "z"])
        assert against is not None
        assert brief.shape == against.shape == (2, 24, 32)
        assert encode_both(*short, ["a"], None)[1] is None


def test_embeddings_are_filled_up_too(short: tuple[Any, Any]) -> None:
    given = plain(short, "a red star")
    with torch.no_grad():
        kept, against = encode_both(*short, given, ["x BREAK y BREAK z"])
        assert against is not None
        assert torch.equal(kept[:, :12], given)
        assert torch.allclose(kept[:, 12:], plain(short, "").repeat(1, 2, 1), atol=1e-5)
        assert torch.equal(encode_both(None, None, given, given)[0], given)
        with pytest.raises(UserError, match="no whole chunks of 12"):
            encode_both(*short, given[:, :7], ["x"])
        with pytest.raises(UserError, match="no text encoder"):
            encode_both(None, None, given, ["x"])


def test_clip_skip_concerns_the_prompt_alone(short: tuple[Any, Any]) -> None:
    with torch.no_grad():
        prompt, negative = encode_both(*short, ["a red star"], ["a red star"], clip_skip=1)
        assert torch.equal(prompt, text.encode(*short, ["a red star"], clip_skip=1))
    assert negative is not None
    assert torch.equal(negative, plain(short, "a red star"))


def test_what_was_not_understood_is_said_once(
    short: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            read(short[0], ["a (red", "a star"])
    (message,) = caplog.messages
    assert message.count("\n") == 0
    assert "'a (red'" in message
    assert "'(' is never closed" in message


def test_pooled_is_the_first_chunk_s() -> None:
    def ask(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return ids[..., None].float(), ids[:, :2].float()

    ids = torch.arange(12).view(2, 2, 3)
    found = Chunks(ids, torch.ones_like(ids), torch.ones(2, 2, 3), torch.zeros(2, 3))
    embeds, pooled = encode(ask, found)
    assert embeds.shape == (2, 6, 1)
    assert pooled is not None
    assert pooled.tolist() == [[0, 1], [6, 7]]
