"""The picture world: procedural scenes with their pictures, captions, masks and truth."""

from ldm_pipeline.data.world.captions import (
    VOCABULARY,
    Description,
    Mention,
    describe,
    hard_negatives,
    held_out_caption,
    phrase,
    turned,
)
from ldm_pipeline.data.world.render import masks, render, roles_at
from ldm_pipeline.data.world.scene import (
    COLOURS,
    HELD_OUT_PAIRS,
    KINDS,
    PATTERNS,
    PLACES,
    SIZES,
    STYLES,
    Background,
    Scene,
    Thing,
    held_out_pair,
    sample_scene,
)
from ldm_pipeline.data.world.shapes import ROLES
from ldm_pipeline.data.world.strangers import among_strangers
from ldm_pipeline.data.world.world import SPLITS, Sample, World, caption_of, write_folder

__all__ = [
    "COLOURS", "HELD_OUT_PAIRS", "KINDS", "PATTERNS", "PLACES", "ROLES", "SIZES",
    "SPLITS", "STYLES", "VOCABULARY", "Background", "Description", "Mention", "Sample", "Scene",
    "Thing", "World", "among_strangers", "caption_of", "describe", "hard_negatives",
    "held_out_caption", "held_out_pair", "masks", "phrase", "render", "roles_at", "sample_scene",
    "turned", "write_folder",
]  # fmt: skip
