"""A byte-pair tokenizer of the project's own, in the format of CLIP's.

CLIP's vocabulary is the 256 bytes, the same bytes at the end of a word ("</w>"), the merges in
order of their frequency, and two special tokens. Text that training never saw still has tokens:
bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def train_tokenizer(texts: Iterable[str], merges: int, length: int) -> CLIPTokenizer:
    """The tokenizer of `texts` with at most `merges` merges; its model reads `length` tokens."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(symbols) + merges,
        min_frequency=2,
        show_progress=False,
        end_of_word_suffix="</w>",
        initial_alphabet=symbols,
    )
    learner.train_from_iterator(texts, trainer)
    learnt = json.loads(learner.to_str())["model"]["merges"]
    pairs = [tuple(merge) for merge in learnt][:merges]
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols)]
    words += dict.fromkeys("".join(pair) for pair in pairs)
    vocabulary = {word: i for i, word in enumerate([*words, START, END])}
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=length)
