"""The byte-pair tokenizer: world words are one token, anything else still has tokens."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from ldm_pipeline.data.world import World
from ldm_pipeline.training.tokenizer import END, START, train_tokenizer

LENGTH = 48
CAPTIONS = [World(0).told(i)[2] for i in range(1500)]


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    """What is learnt from 1,500 captions."""
    return train_tokenizer(CAPTIONS, 600, LENGTH)


def test_captions_come_back(tokenizer: CLIPTokenizer) -> None:
    """Up to the spaces before commas: CLIP's tokens do not keep spaces. New captions too."""
    test = World(0, "test")
    for caption in [*CAPTIONS[:100], *(test.told(i)[2] for i in range(100))]:
        back = tokenizer.decode(tokenizer(caption).input_ids, skip_special_tokens=True)
        assert back.replace(" ", "") == caption.lower().replace(" ", "")


def test_every_frequent_word_is_one_token(tokenizer: CLIPTokenizer) -> None:
    """A word that 1,500 captions say 20 times: none of these is learnt letter by letter."""
    said = Counter(word.strip(",.") for caption in CAPTIONS for word in caption.lower().split())
    frequent = [word for word, n in said.items() if n >= 20 and word.isalpha()]
    assert len(frequent) > 50
    assert [word for word in frequent if len(tokenizer(word).input_ids) != 3] == []


@pytest.mark.parametrize(
    "text", ["", "Ünïcödé größer", "赤い星", "🐟🏠", "naïve 3½ — «x»", "\t\x00\n"]
)
def test_unseen_text_still_has_tokens(tokenizer: CLIPTokenizer, text: str) -> None:
    """Bytes: all ids are known ones, framed by start and end, and the letters come back."""
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.convert_tokens_to_ids(START)
    assert ids[-1] == tokenizer.convert_tokens_to_ids(END)
    assert END not in tokenizer.convert_ids_to_tokens(ids[1:-1])
    assert max(ids) < len(tokenizer)
    back = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(back.split()) == "".join(text.lower().replace("\x00", "\x00").split())


def test_every_caption_fits_and_is_padded_with_its_end(tokenizer: CLIPTokenizer) -> None:
    rows = tokenizer(CAPTIONS, padding="max_length").input_ids
    assert {len(row) for row in rows} == {LENGTH}
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == len(tokenizer) - 1


def test_a_saved_folder_is_a_stock_tokenizer(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    assert loaded.model_max_length == LENGTH
    for texts in (CAPTIONS[:200], ["Ünïcödé 赤い星", ""]):
        assert loaded(texts, padding="max_length").input_ids == (
            tokenizer(texts, padding="max_length").input_ids
        )


def test_the_same_texts_give_the_same_tokenizer(tokenizer: CLIPTokenizer) -> None:
    assert train_tokenizer(CAPTIONS, 600, LENGTH).get_vocab() == tokenizer.get_vocab()


def test_there_are_no_more_merges_than_asked_for() -> None:
    assert len(train_tokenizer(CAPTIONS[:200], 30, LENGTH)) == 2 * 256 + 30 + 2
