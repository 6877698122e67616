"""Tasks beside the denoising: to name what is where, from the UNet's own features or the words.

The loss of a diffusion model hardly sees which word went where: a small thing is a few places of a
latent, and a wrong one costs little more than a blurred one. Here the truth is known, so a linear
head on the features of the finest grid names kind and colour at each place (with known truth what
2410.06940 does with the features of another network). It is left out of what is exported, and says
nothing about how much each place weighs in the denoising loss.

What the words alone say of it, "above" or "left of", is decided at the noisiest levels, where the
denoising loss is nearly the same for either answer: 538,000 samples did not teach the bundled model
which is which. A second head reads the layout from the text embeddings, with no picture at all;
`benchmarks/relations.py` shows how soon a text encoder that is asked so directly tells them apart.

A contrastive loss has the same gap: a picture's vector need not hold an order that no caption's
holds, nor a caption's one that no picture's holds, and neither has a reason to begin. A third head
asks both for it.

Legend
    feats    features of the finest grid, [B, C, h, w], before the last block of the UNet
    embeds   text embeddings, [B, L, C]
    labels   kinds, colours, styles and paints, [B, 4, FINE h, FINE w]: 0 is the background, then
             their numbers
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ldm_pipeline.data.world import COLOURS, KINDS, ROLES, STYLES, Scene, roles_at

FINE = 4
"""Labels along each side of a place of the latents, which is 8 x 8 pixels."""

CLASSES = (1 + len(KINDS), 1 + len(COLOURS), 1 + len(STYLES), 1 + len(ROLES))
BACKGROUND_WEIGHT = 0.2


class LayoutHead(nn.Module):
    """Names what is at FINE x FINE points of each place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.names = nn.Conv2d(channels, FINE * FINE * sum(CLASSES), kernel_size=1)

    def told(self, feats: Tensor) -> tuple[Tensor, ...]:
        """The logits of kinds, colours, styles and paints, [B, classes, FINE h, FINE w] in
        float32."""
        told = F.pixel_shuffle(self.names(self.norm(feats)), FINE).float()
        return told.split(CLASSES, dim=1)

    def forward(self, feats: Tensor, labels: Tensor) -> Tensor:
        """The sum of the mean cross-entropies, a scalar; things weigh more than background."""
        losses = [
            F.cross_entropy(logits, labels[:, i].long(), weight=_weights(logits))
            for i, logits in enumerate(self.told(feats))
        ]
        return sum(losses[1:], losses[0])


class WordsHead(nn.Module):
    """Names what is at FINE x FINE points of each place of a coarse grid, from words.

    A vector for each place asks the embeddings, as the UNet's cross-attention does.
    """

    def __init__(self, channels: int, side: int, heads: int = 4) -> None:
        super().__init__()
        self.side = side
        self.places = nn.Parameter(torch.randn(side * side, channels) * 0.02)
        self.asks, self.thinks = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.hears = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )
        self.head = LayoutHead(channels)

    def heard(self, embeds: Tensor) -> Tensor:
        """The features of each place, [B, C, side, side]."""
        x = self.places.expand(len(embeds), -1, -1)
        x = x + self.hears(self.asks(x), embeds, embeds, need_weights=False)[0]
        x = x + self.mlp(self.thinks(x))
        return x.transpose(1, 2).unflatten(2, (self.side, self.side))

    def forward(self, embeds: Tensor, labels: Tensor) -> Tensor:
        """The loss of `LayoutHead`; of finer labels every nth is read."""
        step = labels.shape[-1] // (FINE * self.side)
        return self.head(self.heard(embeds), labels[..., ::step, ::step])


class WhereHead(nn.Module):
    """Reads off one vector which kinds and colours there are, and where.

    It is linear, as is the dot product that compares two such vectors.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.names = nn.Linear(channels, 3 * (len(KINDS) + len(COLOURS)))

    def told(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Of vectors [B, C] the logits of each kind, then each colour, being there, [B, N], and
        their middles [B, N, 2], of which x and y go from -1 to 1; in float32."""
        told = self.names(vectors).float().unflatten(1, (-1, 3))
        return told[..., 0], told[..., 1:]

    def forward(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of what is there, and the squared distance of its middle from the true
        one, each a mean; their sum is a scalar."""
        there, middles = middles_of(labels)
        logits, told = self.told(vectors)
        off = (told - middles).square().sum(2) * there
        named = F.binary_cross_entropy_with_logits(logits, there.float())
        return named + off.sum() / there.sum().clamp(min=1)


def middles_of(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which kinds and colours labels [B, 4, n, n] hold, bool [B, N], and the middles of their
    places [B, N, 2]: x to the right and y down, each from -1 to 1, and 0 for what is not there."""
    kinds, colours = (
        F.one_hot(labels[:, i].long(), classes)[..., 1:] for i, classes in enumerate(CLASSES[:2])
    )
    here = torch.cat([kinds, colours], dim=-1).float()  # [B, y, x, N]
    side = labels.shape[-1]
    along = (torch.arange(side, device=labels.device) * 2 + 1) / side - 1
    area = here.sum((1, 2))
    sums = [torch.einsum(f"byxn,{axis}->bn", here, along) for axis in "xy"]
    return area > 0, torch.stack(sums, dim=-1) / area.clamp(min=1)[..., None]


def labels_of(scene: Scene, side: int) -> np.ndarray:
    """What is at the middles of side x side squares of a scene, uint8 [4, side, side]."""
    labels = np.zeros((len(CLASSES), side, side), dtype=np.uint8)
    for thing in scene.things:
        roles = roles_at(thing, side)
        kind, colour = KINDS.index(thing.kind), tuple(COLOURS).index(thing.colour)
        numbers = (kind, colour, STYLES.index(thing.style))
        here = roles > 0
        for name, number in zip(labels, numbers, strict=False):
            name[here] = 1 + number
        labels[-1][here] = roles[here]
    return labels


class Listener:
    """Keeps the features of the finest grid that went into the last block of a UNet."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        several = len(unet.up_blocks) > 1
        block = unet.up_blocks[-2] if several else unet.mid_block
        self.channels: int = unet.config.block_out_channels[1 if several else 0]
        self.heard: Tensor | None = None
        block.register_forward_hook(self._hear)

    def _hear(self, block: nn.Module, inputs: object, output: Tensor) -> None:
        self.heard = output


def _weights(logits: Tensor) -> Tensor:
    weights = logits.new_ones(logits.shape[1])
    weights[0] = BACKGROUND_WEIGHT
    return weights
