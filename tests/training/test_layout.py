"""The task beside the denoising: its labels are the truth, and it teaches the UNet."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from ldm_pipeline.data.world import COLOURS, KINDS, ROLES, STYLES, World, roles_at
from ldm_pipeline.data.world.scene import tones
from ldm_pipeline.data.world.shapes import contour_colour, paint, paint_on
from ldm_pipeline.training.layout import (
    CLASSES,
    FINE,
    LayoutHead,
    Listener,
    WhereHead,
    WordsHead,
    labels_of,
    middles_of,
)


def test_labels_are_what_covers_each_point() -> None:
    """The label of a point is the thing over its middle, up to the pixels along the thing's edge;
    every thing has its area, as nearly as 64 x 64 points can tell it."""
    seen = 0
    for index in range(40):
        sample = World(3)[index]
        labels = labels_of(sample.scene, 64)
        assert labels.shape == (4, 64, 64)
        background = np.ones((64, 64), dtype=bool)
        for thing, mask in zip(sample.scene.things, sample.masks, strict=True):
            whole = mask.reshape(64, 2, 64, 2)
            inside, near = whole.all((1, 3)), whole.any((1, 3))
            numbers = KINDS.index(thing.kind), tuple(COLOURS).index(thing.colour)
            for name, number in zip(labels, (*numbers, STYLES.index(thing.style)), strict=False):
                assert (name[inside] == 1 + number).mean() > 0.98
                assert set(np.unique(name[near])) <= {0, 1 + number}
            shown = near & (labels[0] > 0)
            assert abs(shown.mean() - mask.mean()) < 0.01
            assert ((labels[3] > 0) == (labels[0] > 0)).all()
            background &= ~near
            seen += 1
        assert (labels[:, background] == 0).all()
    assert seen > 40


def test_paints_are_those_of_the_picture() -> None:
    """Where a label names a role, the picture has the colour that the role has on this thing; only
    an outlined thing has a contour."""
    contours = dict.fromkeys(STYLES, 0)
    right = points = 0
    for index in range(40):
        sample = World(3)[index]
        roles = labels_of(sample.scene, 64)[3]
        around = tones(sample.scene.background)
        for thing in sample.scene.things:
            here = roles_at(thing, 64)
            assert (roles[here > 0] == here[here > 0]).all()
            contours[thing.style] += int((here == 1 + ROLES.index("contour")).sum())
            for number in np.unique(here[here > 0]):
                role = ROLES[number - 1]
                if role == "contour":
                    paints = [contour_colour(thing.colour, around)]
                else:
                    paints = [paint(role, thing.colour), paint_on(role, thing.colour, around)]
                rows, columns = np.nonzero(here == number)
                # the middle of a square of 2 x 2 pixels is a corner of all four
                pixels = sample.picture[2 * rows + 1, 2 * columns + 1].astype(int)
                away = [np.abs(pixels - paint).sum(1) for paint in np.array(paints)]
                right += int((np.min(away, axis=0) < 60).sum())
                points += len(pixels)
    assert contours["flat"] == 0
    assert contours["outlined"] > 100
    assert right > 0.85 * points


def taught(
    head: nn.Module, told: torch.Tensor, labels: torch.Tensor, lr: float, steps: int
) -> tuple[float, float]:
    """The loss of a head before and after some steps on one batch."""
    optimiser = torch.optim.Adam(head.parameters(), lr=lr)
    losses = []
    for _ in range(steps + 1):
        optimiser.zero_grad()
        loss = head(told, labels)
        losses.append(float(loss.detach()))
        loss.backward()
        optimiser.step()
    return losses[0], losses[-1]


def test_the_head_learns_what_is_where() -> None:
    """Features that tell kind and colour are named rightly after some steps; others are not."""
    torch.manual_seed(0)
    scenes = [World(0).told(index)[0] for index in range(4)]
    labels = torch.from_numpy(np.stack([labels_of(scene, 16 * FINE) for scene in scenes]))
    head = LayoutHead(32)
    telling = torch.randn(4, 32, 16, 16)
    first, last = taught(head, telling, labels, lr=0.05, steps=60)
    assert 0 < first < 3 * sum(np.log(CLASSES))
    assert last < 0.5 * first


def test_it_hears_the_finest_features_and_changes_nothing() -> None:
    """One or several levels: the features are those of the grid of the latents, with a gradient."""
    for channels in ((8,), (8, 16), (8, 16, 24)):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=channels,
            down_block_types=("CrossAttnDownBlock2D",) * len(channels),
            up_block_types=("CrossAttnUpBlock2D",) * len(channels),
            layers_per_block=1,
            attention_head_dim=2,
            cross_attention_dim=8,
            norm_num_groups=4,
        )
        told = torch.randn(2, 4, 8, 8), torch.tensor(3), torch.randn(2, 5, 8)
        before = unet(*told).sample
        listener = Listener(unet)
        assert torch.equal(unet(*told).sample, before)
        assert listener.heard is not None
        assert listener.heard.shape == (2, listener.channels, 8, 8)
        assert listener.heard.requires_grad


def test_words_alone_tell_what_is_where() -> None:
    """Embeddings that tell a layout are heard, embeddings of another length too; and what is learnt
    reaches them: the loss has a gradient there."""
    torch.manual_seed(0)
    scenes = [World(0).told(index)[0] for index in range(4)]
    labels = torch.from_numpy(np.stack([labels_of(scene, 16 * FINE) for scene in scenes]))
    head = WordsHead(32, side=8)
    embeds = torch.randn(4, 7, 32, requires_grad=True)
    first, last = taught(head, embeds, labels, lr=0.01, steps=100)
    assert last < 0.5 * first
    assert float(head(embeds.roll(1, dims=0), labels).detach()) > 2 * last
    assert embeds.grad is not None
    assert (embeds.grad.abs().sum((1, 2)) > 0).all()
    assert head(torch.randn(4, 3, 32), labels).ndim == 0


def test_middles_are_those_of_the_scene() -> None:
    """Of kinds and colours that one thing has, the middle of what is seen of it; nothing else is
    there, and the middle of two things lies between them."""
    seen = shared = 0
    for index in range(60):
        sample = World(3)[index]
        labels = torch.from_numpy(labels_of(sample.scene, 64))[None]
        there, middles = (told[0] for told in middles_of(labels))
        names = (
            [thing.kind for thing in sample.scene.things],
            [thing.colour for thing in sample.scene.things],
        )
        for options, names_here, first in zip(
            (KINDS, COLOURS), names, (0, len(KINDS)), strict=True
        ):
            for number, name in enumerate(options):
                told, middle = bool(there[first + number]), middles[first + number]
                assert told == (name in names_here)
                if not told:
                    assert not middle.any()
                    continue
                own = [m for n, m in zip(names_here, sample.masks, strict=True) if n == name]
                rows, columns = np.nonzero(np.any(own, axis=0))
                wanted = torch.tensor([columns.mean(), rows.mean()]) / 63.5 - 1
                # points 2 pixels apart, which are 1/32, and edges that they see or miss
                assert torch.allclose(middle, wanted.float(), atol=0.04)
                seen += 1
                shared += len(own) > 1
    assert seen > 150
    assert shared > 10


def test_one_vector_tells_where_things_are() -> None:
    """A vector that tells it is read after some steps, another one is not, and the tower it is of
    gets a gradient; an empty picture has a loss too."""
    torch.manual_seed(0)
    scenes = [World(0).told(index)[0] for index in range(4)]
    labels = torch.from_numpy(np.stack([labels_of(scene, 64) for scene in scenes]))
    head = WhereHead(32)
    vectors = torch.randn(4, 32, requires_grad=True)
    first, last = taught(head, vectors, labels, lr=0.05, steps=100)
    assert last < 0.1 * first
    assert float(head(vectors.roll(1, dims=0), labels).detach()) > 0.5 * first
    assert vectors.grad is not None
    assert (vectors.grad.abs().sum(1) > 0).all()
    there, middles = middles_of(labels)
    logits, told = head.told(vectors)
    assert ((logits > 0) == there).all()
    assert torch.allclose(told[there], middles[there], atol=0.1)
    assert torch.isfinite(head(vectors, torch.zeros_like(labels)))
