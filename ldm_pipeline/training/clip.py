"""Contrastive training of the text encoder: a small CLIP, pictures against captions.

Legend
    B        pictures of a batch, each with one true caption
    K        hard negatives per picture: captions that differ in one claim (a colour, a kind, a
             count, a relation turned round), which a bag of words could not tell apart
    s        the learnt inverse temperature

Each picture picks its caption among all B (1 + K), each caption its picture among all B
(2103.00020, figure 3; hard negatives as in 2210.01936). Two tasks beside it may name what is where
(`training.layout`): a linear head on the vision tower's patches, so that the tower knows the things
by sight; and one for both towers' vectors, so that a vector holds where things are, and both in the
same way. Without it the towers learn no order: in 227,000 pictures the bundled CLIP had not learnt
which of two things is on the left.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from ldm_pipeline.data.world import (
    Description,
    World,
    hard_negatives,
    held_out_caption,
    phrase,
    turned,
)
from ldm_pipeline.errors import UserError
from ldm_pipeline.images import to_tensor
from ldm_pipeline.models.text import tokenise
from ldm_pipeline.training.config import (
    NonNegative,
    NonNegativeFloat,
    Positive,
    ShapeSettings,
    TrainingConfig,
    must_divide,
)
from ldm_pipeline.training.layout import FINE, LayoutHead, WhereHead, labels_of
from ldm_pipeline.training.objective import Batch
from ldm_pipeline.training.start import part_of, take_weights
from ldm_pipeline.training.tokenizer import train_tokenizer
from ldm_pipeline.training.world_data import WorldSettings

SIDE = 128
LENGTHS = 4
"""Groups of captions of a batch, by length; each is read as far as its longest goes."""


class ClipSettings(ShapeSettings):
    """The shape of both towers."""

    text_width: Positive = 128
    text_layers: Positive = 4
    vision_width: Positive = 160
    vision_layers: Positive = 4
    heads: Positive = 4
    patch: Positive = 16
    projection: Positive = 128
    length: Positive = 48
    merges: Positive = 600

    @model_validator(mode="after")
    def _fits(self) -> Self:
        must_divide("heads", self.heads, widths=(self.text_width, self.vision_width))
        must_divide("patch", self.patch, side=(SIDE,))
        return self


class ClipConfig(TrainingConfig):
    """Everything that `train/train_clip.py` reads."""

    model: ClipSettings = ClipSettings()
    data: WorldSettings = WorldSettings()
    text: Path | None = Field(
        default=None,
        description="folder with the text_encoder that the text tower begins from, also where "
        "`begin_from` has one",
    )
    hard_negatives: NonNegative = 3
    layout_weight: NonNegativeFloat = Field(
        default=0.0, description="of naming what is where, a task beside the contrastive one"
    )
    vectors_weight: NonNegativeFloat = Field(
        default=0.0, description="of telling where kinds and colours are from a vector alone"
    )

    def kept_on_resume(self) -> Collection[str]:
        """Where the tokenizer comes from: which number stands for which word."""
        return ("data.seed", "begin_from", "text")


class ClipObjective(nn.Module):
    """Pictures and their captions find each other."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        torch.manual_seed(config.run.seed)
        self.config = config
        self.world = World(config.data.seed)
        self.tokenizer = _tokenizer(config, self.world)
        self.clip = CLIPModel(_clip_config(config.model, self.tokenizer))
        self.grid = SIDE // config.model.patch
        self.layout: LayoutHead | None = None
        if config.layout_weight:
            self.layout = LayoutHead(config.model.vision_width)
        self.vectors: WhereHead | None = None
        if config.vectors_weight:
            self.vectors = WhereHead(config.model.projection)
        if config.begin_from is not None:
            take_weights(self.clip, part_of(config.begin_from, "clip"))
        if config.text is not None:
            self._take_text(config.text / "text_encoder")

    def batch(self, positions: range) -> Batch:
        """Pictures, and token ids of 1 + K captions each [B, 1 + K, L]; the first is true."""
        pictures, captions, labels = [], [], []
        for position in positions:
            sample = self.world[position]
            if self.layout is not None or self.vectors is not None:
                labels.append(labels_of(sample.scene, FINE * self.grid))
            rng = np.random.default_rng([self.config.run.seed, 1, position])
            pictures.append(sample.picture)
            wrong = wrong_captions(sample.description, rng, self.config.hard_negatives)
            captions += [sample.caption, *wrong]
        tokens = tokenise(self.tokenizer, captions, warn=False).input_ids
        batch = {
            "pictures": to_tensor(np.stack(pictures)),
            "tokens": tokens.view(len(pictures), -1, tokens.shape[-1]),
        }
        if labels:
            batch["labels"] = torch.from_numpy(np.stack(labels))
        return batch

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The symmetric contrastive loss, and how often pictures and captions find each other."""
        pictures, patches = self.see(batch["pictures"])
        texts = self.read(batch["tokens"].flatten(0, 1))
        texts = texts.view(*batch["tokens"].shape[:2], -1)
        true, wrong = texts[:, 0], texts[:, 1:].flatten(0, 1)
        s = self.clip.logit_scale.clamp(max=4.6).exp()
        by_picture = s * pictures @ torch.cat([true, wrong]).T
        by_caption = s * true @ pictures.T
        wanted = torch.arange(len(pictures), device=pictures.device)
        loss = (F.cross_entropy(by_picture, wanted) + F.cross_entropy(by_caption, wanted)) / 2
        own = torch.cat(
            [by_picture.diagonal()[:, None], s * (texts[:, 1:] @ pictures[:, :, None])[..., 0]], 1
        )
        measures = {
            "picks_caption": (by_picture.argmax(1) == wanted).float().mean(),
            "beats_hard": (own.argmax(1) == 0).float().mean(),
        }
        if "labels" not in batch:
            return {"loss": loss, **measures}
        if self.layout is not None:
            measures["layout"] = self.layout(patches, batch["labels"])
            loss = loss + self.config.layout_weight * measures["layout"]
        if self.vectors is not None:
            seen, read = (self._told(vectors, batch["labels"]) for vectors in (pictures, true))
            measures |= {"picture_where": seen, "caption_where": read}
            loss = loss + self.config.vectors_weight * (seen + read)
        return {"loss": loss, **measures}

    def see(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Of pictures [B, 3, 128, 128] the unit vectors [B, P], in float32, and the features of
        their patches [B, C, grid, grid]."""
        told = self.clip.vision_model(pixel_values=pictures)
        vectors = F.normalize(self.clip.visual_projection(told.pooler_output).float(), dim=-1)
        patches = told.last_hidden_state[:, 1:].transpose(1, 2)
        return vectors, patches.unflatten(2, (self.grid, self.grid))

    def _told(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """The loss of telling what is where from unit vectors [B, P]."""
        assert self.vectors is not None
        told: Tensor = self.vectors(vectors * vectors.shape[-1] ** 0.5, labels)  # of variance 1
        return told

    def read(self, tokens: Tensor) -> Tensor:
        """Unit vectors of captions [N, L], [N, P] in float32."""
        used = (tokens != tokens[0, -1]).sum(1) + 1  # what follows is padding
        order = used.argsort()  # the longest caption is twice the mean: few wait for it
        read = [
            self.clip.get_text_features(input_ids=tokens[some, : int(used[some].max())])
            for some in order.chunk(LENGTHS)
        ]
        vectors = torch.cat([some.pooler_output for some in read])[order.argsort()]
        return F.normalize(vectors.float(), dim=-1)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The same measures on 256 pictures of the test split, 256 captions and 4 x 256 wrong."""
        world = World(self.config.data.seed, "test")
        pictures, captions = [], []
        for i in range(256):
            sample = world[i]
            rng = np.random.default_rng([2, i])
            pictures.append(sample.picture)
            wrong = wrong_captions(sample.description, rng, 4, held_out=True)
            captions += [sample.caption, *wrong]
        tokens = tokenise(self.tokenizer, captions, warn=False).input_ids
        device = self.clip.device
        batch = {"pictures": to_tensor(np.stack(pictures)), "tokens": tokens.view(256, 5, -1)}
        measures = self({name: value.to(device) for name, value in batch.items()})
        measures["beats_turned"] = self._beats_turned(world, device)
        return {name: float(value) for name, value in measures.items()}

    def _beats_turned(self, world: World, device: torch.device) -> Tensor:
        """Of 256 pictures whose caption names a relation, how many are nearer to it than to the
        one with its relation turned round (2210.01936); a guess is right in half of them."""
        pictures: list[np.ndarray] = []
        captions: list[str] = []
        index = 0
        while len(pictures) < 256:
            description = world.told(index)[1]
            other = turned(description)
            if other is not None:
                for told in (description, other):
                    captions.append(phrase(told, np.random.default_rng([3, index])))
                pictures.append(world[index].picture)
            index += 1
        tokens = tokenise(self.tokenizer, captions, warn=False).input_ids
        seen = self.see(to_tensor(np.stack(pictures)).to(device))[0]
        true, wrong = self.read(tokens.to(device)).view(256, 2, -1).unbind(1)
        return ((seen * (true - wrong)).sum(1) > 0).float().mean()

    def export(self, folder: Path, updates: int) -> None:
        """Write `clip` (both towers), `text_encoder` and `tokenizer` in their libraries' layout."""
        self.clip.save_pretrained(folder / "clip")
        encoder = CLIPTextModel(self.clip.config.text_config)
        wanted = encoder.state_dict()
        body = self.clip.text_model.state_dict()
        encoder.load_state_dict({k: body[k.removeprefix("text_model.")] for k in wanted})
        encoder.save_pretrained(folder / "text_encoder")
        self.tokenizer.save_pretrained(folder / "tokenizer")

    def _take_text(self, folder: Path) -> None:
        """Begin the text tower from the text encoder in `folder`, which knows the same words."""
        encoder = CLIPTextModel(self.clip.config.text_config)
        take_weights(encoder, folder, "text")
        weights = encoder.state_dict()
        body = {name.removeprefix("text_model."): value for name, value in weights.items()}
        self.clip.text_model.load_state_dict(body)


def wrong_captions(
    description: Description, rng: np.random.Generator, n: int, held_out: bool = False
) -> list[str]:
    """`n` captions that are false where `description` is true; held-out ones only if allowed."""
    wrong: list[str] = []
    while len(wrong) < n:
        for other in hard_negatives(description, rng, n - len(wrong)):
            caption = phrase(other, rng)
            if held_out or not held_out_caption(caption):
                wrong.append(caption)
    return wrong


def _tokenizer(config: ClipConfig, world: World) -> CLIPTokenizer:
    """Of the folder that the text tower begins from, whose embeddings mean its words; else one of
    captions of `world`."""
    for setting, folder in (("text", config.text), ("begin_from", config.begin_from)):
        if folder is not None:
            return _tokenizer_of(folder, setting)
    captions = (world.told(i)[2] for i in range(20_000))
    return train_tokenizer(captions, config.model.merges, config.model.length)


def _tokenizer_of(folder: Path, setting: str) -> CLIPTokenizer:
    """The tokenizer beside the model in `folder`, or beside `folder` where it is the model itself;
    UserError, which names the `setting`, for none."""
    if not folder.is_dir():
        raise UserError(f"{setting}={folder} is no folder that is there; name one with a tokenizer")
    for place in (folder / "tokenizer", folder.parent / "tokenizer"):
        if (place / "tokenizer.json").is_file():
            return CLIPTokenizer.from_pretrained(place)
    raise UserError(f"{setting}: {folder} has no tokenizer, which says what its embeddings mean")


def _clip_config(settings: ClipSettings, tokenizer: CLIPTokenizer) -> CLIPConfig:
    end = tokenizer.eos_token_id
    return CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": settings.text_width,
            "intermediate_size": 4 * settings.text_width,
            "num_hidden_layers": settings.text_layers,
            "num_attention_heads": settings.heads,
            "max_position_embeddings": settings.length,
            "projection_dim": settings.projection,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": end,
            "pad_token_id": end,
        },
        vision_config={
            "hidden_size": settings.vision_width,
            "intermediate_size": 4 * settings.vision_width,
            "num_hidden_layers": settings.vision_layers,
            "num_attention_heads": settings.heads,
            "image_size": SIDE,
            "patch_size": settings.patch,
            "projection_dim": settings.projection,
        },
        projection_dim=settings.projection,
        attn_implementation="eager",
    )
