"""Long and weighted prompts to embeddings: as many chunks as the words need, side by side.

    read(tokenizer, texts)  -> Chunks          the syntax understood, cut to the model's length
    encode(ask, chunks)     -> embeddings      every chunk encoded by itself, weighted, joined
    encode_both(...)        -> both halves     prompts and negative prompts, of one length
    encode_both_xl(...)     -> the same of SDXL's two encoders, with the pooled answer

Cross-attention takes any number of embeddings, a text encoder only the length that it was trained
with. So the tokens are cut into chunks, each between its own start and end tokens, and a text of
one chunk without weights has exactly the stock embeddings. Chunks, weights and BREAK are those of
AUTOMATIC1111's web interface, except that a text's embeddings never depend on its batch.

Legend
    n       texts
    k       chunks of the longest text; the others are filled up with chunks of the empty text
    L       tokens per chunk, 77 for CLIP, two of which are its start and its end
    C, D    channels of the embeddings, and of an encoder's pooled answer
    z, w    embeddings [n*k, L, C], weights [n*k, L]
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ldm_pipeline.errors import UserError
from ldm_pipeline.models import text
from ldm_pipeline.models.prompt_syntax import Part, parse

logger = logging.getLogger(__name__)

Ask = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""Token ids and attention mask, [n*k, L], to states [n*k, L, C] and pooled [n*k, D] or None."""

Token = tuple[int, float]
"""An id and its weight."""

BACKTRACK = 20
"""How many tokens a chunk gives up, at most, to end at a comma."""

SAME = 1e-3
"""A mean below this share of the embeddings' size is rounding, and cannot be kept."""


LEAST = 0.1
"""Below this the weights have all but silenced a text, which nothing brings back."""


@dataclass(frozen=True, eq=False)
class Chunks:
    """Texts as a text encoder reads them: `ids`, `mask` and `weights`, each [n, k, L].

    `mask` is 1 up to the end token; `empty` (ids and mask, [2, L]) is a chunk of the empty text.
    """

    ids: Tensor
    mask: Tensor
    weights: Tensor
    empty: Tensor

    @property
    def count(self) -> int:
        """How many chunks there are for each text."""
        return self.ids.shape[1]

    def padded(self, count: int) -> Chunks:
        """The same texts, filled up to `count` chunks with those of the empty text."""
        n, k, _ = self.ids.shape
        if count <= k:
            return self
        fill_ids, fill_mask = (row.expand(n, count - k, -1) for row in self.empty)
        return Chunks(
            torch.cat([self.ids, fill_ids], 1),
            torch.cat([self.mask, fill_mask], 1),
            torch.cat([self.weights, torch.ones(fill_ids.shape)], 1),
            self.empty,
        )


def read(
    tokenizer: CLIPTokenizer, texts: Sequence[str], convert: text.Convert | None = None
) -> Chunks:
    """`texts` in the syntax of `prompt_syntax`, on the CPU.

    `convert` rewrites words first, as in `text.tokenise`; the tokens of one learnt word stay in
    one chunk. What was not understood of a text is logged, once.
    """
    length = tokenizer.model_max_length
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    comma = tokenizer.convert_tokens_to_ids(",</w>")
    glued = _glued(tokenizer)
    nothing: list[Token] = []
    rows: list[list[list[Token]]] = []
    for each in texts:
        prompt = parse(each)
        if prompt.complaints:
            _say(f"in the prompt {_short(each)!r}: {'; '.join(prompt.complaints)}")
        sections = [_tokens(tokenizer, section, convert) for section in prompt.sections]
        rows.append([c for section in sections for c in split(section, length - 2, comma, glued)])
    k = max(len(row) for row in rows)
    filled = [[*row, *[nothing] * (k - len(row))] for row in [*rows, [nothing]]]

    def line(chunk: list[Token]) -> list[tuple[int, int, float]]:
        """Id, mask and weight of each token."""
        said = [(i, 1, weight) for i, weight in [(start, 1.0), *chunk, (end, 1.0)]]
        return said + [(pad, 0, 1.0)] * (length - len(said))

    table = torch.tensor([[line(chunk) for chunk in row] for row in filled], dtype=torch.float64)
    ids, mask, weights = table.unbind(-1)
    ids, mask, weights = ids.long(), mask.long(), weights.float()
    return Chunks(ids[:-1], mask[:-1], weights[:-1], torch.stack([ids[-1, 0], mask[-1, 0]]))


def split(
    tokens: Sequence[Token],
    room: int,
    comma: int | None = None,
    glued: frozenset[int] = frozenset(),
) -> Iterator[list[Token]]:
    """`tokens` in chunks of at most `room`; one empty chunk where there are none.

    A chunk that is full ends at its last `comma`, where one is near. It never ends before a token
    of `glued`, the later vectors of a learnt word, unless that word is longer than a chunk.
    """
    rest = list(tokens)
    while len(rest) > room:
        cut = room
        if rest[cut][0] in glued:
            while cut and rest[cut][0] in glued:
                cut -= 1
        elif rest[cut][0] != comma:
            near = range(room - 1, max(room - BACKTRACK, 0) - 1, -1)
            cut = next((i + 1 for i in near if rest[i][0] == comma), room)
        cut = cut or room
        yield rest[:cut]
        rest = rest[cut:]
    yield rest


def encode(ask: Ask, chunks: Chunks) -> tuple[Tensor, Tensor | None]:
    """Embeddings [n, k*L, C] of the texts, and the pooled answer [n, D] to each one's first chunk.

    The pooled answer knows no weights.
    """
    n, k, length = chunks.ids.shape
    z, pooled = ask(chunks.ids.flatten(0, 1), chunks.mask.flatten(0, 1))
    z = emphasise(z, chunks.weights.flatten(0, 1).to(z.device))
    if pooled is not None:
        pooled = pooled.unflatten(0, (n, k))[:, 0]
    return z.reshape(n, k * length, -1), pooled


def emphasise(z: Tensor, w: Tensor) -> Tensor:
    """`w z`, brought back to the mean of `z` [m, L, C], chunk by chunk.

    The mean is what AUTOMATIC1111 keeps, there over the whole batch. It grows by an average of the
    weights as long as the tokens' means are of one sign. Where it does not, or is no more than
    rounding, keeping it would scale the embeddings by any number: there the product stays.
    """
    wide = z.float()
    weighted = wide * w[..., None].float()
    before, after = wide.mean((1, 2)), weighted.mean((1, 2))
    size = wide.square().mean((1, 2)).sqrt()
    grown = after / before
    least, most = w.float().amin(1).clamp(min=LEAST), w.float().amax(1)
    steady = (before.abs() > SAME * size) & (grown >= least) & (grown <= most)
    return (weighted / torch.where(steady, grown, 1.0)[:, None, None]).to(z.dtype)


def encode_both(
    tokenizer: CLIPTokenizer | None,
    text_encoder: CLIPTextModel | None,
    prompts: list[str] | Tensor,
    negatives: list[str] | Tensor | None,
    *,
    device: torch.device | str | None = None,
    clip_skip: int | None = None,
    convert: text.Convert | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Embeddings [n, k*L, C] of prompts and negative prompts, with as many chunks for both.

    Embeddings may stand for texts; they are filled up, too. `clip_skip` concerns the prompts alone.
    Raises `UserError` where there is no text encoder, and for embeddings that are no whole chunks
    beside texts.
    """
    if isinstance(prompts, Tensor) and not isinstance(negatives, list):
        return prompts, negatives
    if tokenizer is None or text_encoder is None:
        raise UserError(text.NO_ENCODER)
    length = tokenizer.model_max_length
    sides = {"prompt": prompts, "negative_prompt": negatives}
    found = {
        name: read(tokenizer, side, convert) if isinstance(side, list) else side
        for name, side in sides.items()
        if side is not None
    }
    for name, side in found.items():
        if isinstance(side, Tensor) and side.shape[1] % length:
            raise UserError(
                f"{name}_embeds has {side.shape[1]} tokens, which are no whole chunks of {length};"
                " pass embeddings for both the prompt and the negative prompt"
            )
    count = max(s.count if isinstance(s, Chunks) else s.shape[1] // length for s in found.values())
    embeds: dict[str, Tensor] = {}
    for name, side in found.items():
        ask = text.asking(text_encoder, device, clip_skip if name == "prompt" else None)
        if isinstance(side, Chunks):
            embeds[name] = encode(ask, side.padded(count))[0]
        elif (missing := count - side.shape[1] // length) > 0:
            nothing, _ = encode(ask, read(tokenizer, [""]).padded(missing))
            nothing = nothing.to(side).expand(side.shape[0], -1, -1)
            embeds[name] = torch.cat([side, nothing], 1)
        else:
            embeds[name] = side
    return embeds["prompt"], embeds.get("negative_prompt")


def encode_both_xl(
    tokenizers: Sequence[CLIPTokenizer],
    text_encoders: Sequence[CLIPTextModel | CLIPTextModelWithProjection],
    prompts: Sequence[list[str]],
    negatives: Sequence[list[str]] | None,
    *,
    device: torch.device | str | None = None,
    clip_skip: int | None = None,
    converts: Sequence[text.Convert | None] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """The same for SDXL: what its encoders say, side by side [n, k*L, C + C'], and pooled [n, D].

    `prompts`, `negatives` and `converts` have one entry for each encoder. The order of the answer
    is that of a stock pipeline's `encode_prompt`: prompts, negative ones, and both pooled. The
    pooled answer is the last encoder's to the first chunk, as in AUTOMATIC1111's interface.
    """
    converts = converts or [None] * len(tokenizers)
    sides = [side for side in (prompts, negatives) if side is not None]
    found = [
        [read(*each) for each in zip(tokenizers, side, converts, strict=True)] for side in sides
    ]
    count = max(each.count for side in found for each in side)
    answers: list[tuple[Tensor, Tensor]] = []
    for side, skip in zip(found, (clip_skip, None), strict=False):
        said = [
            encode(text.asking_inner(encoder, device, skip), each.padded(count))
            for encoder, each in zip(text_encoders, side, strict=True)
        ]
        pooled = said[-1][1]
        assert pooled is not None, "SDXL's last text encoder has a projection"
        answers.append((torch.cat([z for z, _ in said], -1), pooled))
    (embeds, pooled), *against = answers
    negative, negative_pooled = against[0] if against else (None, None)
    return embeds, negative, pooled, negative_pooled


def _tokens(
    tokenizer: CLIPTokenizer, parts: Sequence[Part], convert: text.Convert | None
) -> list[Token]:
    """The tokens of a section, without start and end."""
    texts = [part.text for part in parts]
    found = text.words(tokenizer, texts, convert)
    return [(i, part.weight) for part, ids in zip(parts, found, strict=True) for i in ids]


def _glued(tokenizer: CLIPTokenizer) -> frozenset[int]:
    """The second and later vectors of words learnt by textual inversion: `<cat>_1` of `<cat>`."""
    added = tokenizer.added_tokens_encoder
    return frozenset(
        index
        for name, index in added.items()
        if (later := re.fullmatch(r"(.+)_\d+", name)) and later[1] in added
    )


@lru_cache(maxsize=256)
def _say(line: str) -> None:
    """Warn of it the first time."""
    logger.warning("%s", line)


def _short(words: str) -> str:
    return words if len(words) <= 60 else words[:59] + "…"
