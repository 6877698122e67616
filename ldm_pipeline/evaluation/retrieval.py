"""How well a CLIP tells the caption of a picture from wrong ones.

For each fresh picture 100 captions stand to choose from: the true one, hard negatives that differ
from it in one claim, and captions of other scenes that are not true of this one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import CLIPModel, CLIPTokenizer

from ldm_pipeline.data.world import Description, World, hard_negatives, phrase
from ldm_pipeline.evaluation.judge import Reading, Seen, agrees
from ldm_pipeline.evaluation.metrics import Share
from ldm_pipeline.images import to_tensor
from ldm_pipeline.models.trust import check_part

CAPTIONS = 100
HARD = 50


@torch.no_grad()
def caption_accuracy(folder: Path, pictures: int, seed: int) -> Share:
    """How often the CLIP in `folder`/clip puts the true caption first among 100.

    Pictures and captions are of the world's "test" split, which no training saw. Raises `UserError`
    where the CLIP, or its tokenizer, is not safe to open.
    """
    for part in ("clip", "tokenizer"):
        check_part(folder, part)
    model = CLIPModel.from_pretrained(folder / "clip", dtype=torch.float32, use_safetensors=True)
    model.eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    world = World(seed, "test")
    outcomes = []
    for index in tqdm(range(pictures), desc="choosing captions", unit="picture", leave=False):
        sample = world[index]
        rng = np.random.default_rng([seed, index])
        wrong = _close(sample.description, rng) + _others(world, pictures + index * CAPTIONS, index)
        captions = [sample.caption, *wrong[: CAPTIONS - 1]]
        tokens = tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
        seen = model.get_image_features(pixel_values=to_tensor(sample.picture)).pooler_output
        read = model.get_text_features(input_ids=tokens.input_ids).pooler_output
        scores = torch.nn.functional.normalize(read, dim=-1) @ seen[0]
        outcomes.append(int(scores.argmax()) == 0)
    return Share.of(outcomes)


def _close(description: Description, rng: np.random.Generator) -> list[str]:
    """50 hard negatives; where a short caption has fewer, they are worded several times."""
    changed = hard_negatives(description, rng, HARD)
    captions: dict[str, None] = {}
    for tries in range(20 * HARD):
        if len(captions) == HARD:
            break
        captions[phrase(changed[tries % len(changed)], rng)] = None
    return list(captions)


def _others(world: World, first: int, index: int) -> list[str]:
    """Captions of other scenes that this picture does not happen to keep as well."""
    scene = world.told(index)[0]
    seen = tuple(
        Seen(t.kind, t.colour, t.size, t.style, t.x, t.y, t.radius, 1.0) for t in scene.things
    )
    truth = Reading(scene.background, seen)
    captions: list[str] = []
    while len(captions) < CAPTIONS:
        _, description, caption = world.told(first)
        first += 1
        if not agrees(truth, description).all:
            captions.append(caption)
    return captions
