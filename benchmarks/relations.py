"""How soon a text encoder knows which of two things is on the left. Run by hand:

    python -m benchmarks.relations [--steps 3000] [--from FOLDER]

A new text encoder of the bundled one's shape, or the one in FOLDER, is asked for what is where in
scenes of which it reads the captions alone, as `words_weight` asks beside the training of the UNet:
64 captions a step, never one twice. Printed is, on 256 captions of the test split that name a
relation, how often the middle of the first thing stands to that of the second as the words say; a
guess is right in half of them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm_pipeline.data.world import COLOURS, KINDS, Description, World
from ldm_pipeline.models import bundled
from ldm_pipeline.models.text import tokenise
from ldm_pipeline.training.layout import FINE, WordsHead, labels_of
from ldm_pipeline.training.world_data import fresh_caption

BATCH, SIDE, ASKED = 64, 8, 256


def main() -> None:
    """Train, and print the share after every hundred steps."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=3000, help="(%(default)s)")
    parser.add_argument("--from", dest="begin", type=Path, help="folder of a text encoder")
    parser.add_argument("--lr", type=float, default=1e-3, help="(%(default)s)")
    args = parser.parse_args()
    torch.manual_seed(0)
    folder = bundled.folder()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    encoder = (
        CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
        if args.begin is None
        else CLIPTextModel.from_pretrained(args.begin, dtype=torch.float32)
    )
    head = WordsHead(encoder.config.hidden_size, SIDE)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(parameters, args.lr, weight_decay=0.01)
    falling = torch.optim.lr_scheduler.OneCycleLR(optimiser, args.lr, args.steps, pct_start=0.05)
    world, asked = World(0), related(ASKED)
    began = time.perf_counter()
    for step in range(args.steps):
        captions, labels = [], []
        for index in range(BATCH * step, BATCH * (step + 1)):
            captions.append(fresh_caption(world, index, np.random.default_rng([1, index])))
            labels.append(labels_of(world.told(index)[0], FINE * SIDE))
        with torch.autocast("cpu", torch.bfloat16):
            loss = head(read(encoder, tokenizer, captions), torch.from_numpy(np.stack(labels)))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        falling.step()
        if (step + 1) % 100 == 0:
            share = told_rightly(encoder, head, tokenizer, asked)
            print(
                f"{step + 1} steps, {BATCH * (step + 1)} captions, "
                f"{time.perf_counter() - began:.0f} s: loss {loss.detach():.3f}, "
                f"{share:.3f} of {len(asked)} relations right",
                flush=True,
            )


def read(encoder: Any, tokenizer: Any, captions: list[str]) -> Tensor:
    """The embeddings of captions, up to the end of the longest."""
    tokens = tokenise(tokenizer, captions, warn=False).input_ids
    used = int((tokens != tokens[0, -1]).sum(1).max()) + 1  # what follows is padding
    embeds: Tensor = encoder(tokens[:, :used])[0]
    return embeds


def related(n: int) -> list[tuple[Description, str]]:
    """The first `n` descriptions of the test split that name a relation, with their captions."""
    world, index = World(0, "test"), 0
    found: list[tuple[Description, str]] = []
    while len(found) < n:
        _, description, caption = world.told(index)
        index += 1
        if description.relation is not None:
            found.append((description, caption))
    return found


@torch.no_grad()
def told_rightly(
    encoder: Any, head: WordsHead, tokenizer: Any, asked: list[tuple[Description, str]]
) -> float:
    """The share of descriptions whose two things are told to stand as their relation says."""
    embeds = read(encoder, tokenizer, [caption for _, caption in asked])
    kinds, colours, *_ = (logits.softmax(1) for logits in head.head.told(head.heard(embeds)))
    places = torch.arange(FINE * SIDE).float()
    right = 0
    for (description, _), kind, colour in zip(asked, kinds, colours, strict=True):
        middles = []
        for mention in description.mentions:
            here = kind[1 + KINDS.index(mention.kind)]
            if mention.colour is not None:
                here = here * colour[1 + tuple(COLOURS).index(mention.colour)]
            here = here / here.sum()
            middles.append((float(here.sum(0) @ places), float(here.sum(1) @ places)))
        (ax, ay), (bx, by) = middles
        stands = {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}
        right += stands[str(description.relation)]
    return right / len(asked)


if __name__ == "__main__":
    main()
