"""What kohya's layout writes into a header: the network, hashes of the weights, and modelspec.

Tools that list LoRAs read it: A1111 and Forge ss_* and sshs_*, ComfyUI's and Invoke's managers
modelspec (https://github.com/Stability-AI/ModelSpec, 1.0.1). All values are texts.

There is no date in it: equal weights give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ldm_pipeline.lora.layouts.diffusers import METADATA
from ldm_pipeline.lora.layouts.families import Family
from ldm_pipeline.lora.weights import LoraWeights

STALE = ("format", METADATA, "sshs_", "modelspec.hash_sha256", "ss_network_")
"""Beginnings of texts that speak of a file's own tensors: no other file takes them over."""

SGM, DIFFUSERS = "https://github.com/Stability-AI/generative-models", "diffusers"

LEGACY_FROM, LEGACY_BYTES = 0x100000, 0x10000
"""The bytes that A1111's first hash looks at; they are beyond the end of small files."""


def carried(texts: Mapping[str, Any]) -> dict[str, str]:
    """Those texts of a header that stay true when its tensors are written anew."""
    return {
        name: text
        for name, text in texts.items()
        if isinstance(text, str) and not name.startswith(STALE)
    }


def record(weights: LoraWeights, family: Family, notes: Mapping[str, str]) -> dict[str, str]:
    """The texts that tell the network and the model: all but the hashes."""
    slots = [slot for layout in weights.layouts.values() for slot in layout.slots.values()]
    rank = Counter(slot.rank for slot in slots).most_common(1)[0][0]
    alpha = Counter(
        float(slot.rank * layout.scale(name))
        for layout in weights.layouts.values()
        for name, slot in layout.slots.items()
    ).most_common(1)[0][0]
    convolutions = any(
        tensor.ndim == 4 and tensor.shape[-1] > 1 for tensor in weights.tensors.values()
    )
    arguments = {"conv_dim": str(rank), "conv_alpha": str(alpha)} if convolutions else {}
    title = notes.get("ss_output_name") or "LoRA"
    side = family.resolution
    own = {
        "ss_v2": str(family.version.startswith("sd_v2")),
        "ss_base_model_version": family.version,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
        "ss_network_args": json.dumps(arguments, sort_keys=True),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{family.architecture}/lora",
        "modelspec.implementation": SGM if family.sgm else DIFFUSERS,
        "modelspec.prediction_type": family.prediction,
    }
    spec = {"modelspec.title": title, "modelspec.resolution": f"{side}x{side}"}
    return {**spec, **notes, **own}


def hashes(tensors: bytes, contents: bytes) -> dict[str, str]:
    """The hashes of a file: of its tensors' bytes, and of A1111's part of its `contents`.

    `contents` is the file with the ss_* texts alone, as kohya's trainer has it.
    """
    whole = hashlib.sha256(tensors).hexdigest()
    part = contents[LEGACY_FROM : LEGACY_FROM + LEGACY_BYTES]
    return {
        "sshs_model_hash": whole,
        "sshs_legacy_hash": hashlib.sha256(part).hexdigest()[:8],
        "modelspec.hash_sha256": f"0x{whole}",
    }
