"""Puts a trained model into a folder that can be given away: weights, CLIP, figures, model card."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from transformers import CLIPModel

from ldm_pipeline.errors import UserError
from ldm_pipeline.lora import files
from ldm_pipeline.lora.notes import read_note

MOST_BYTES = 32_000_000
"""Of the model itself; the few-step adapter and the small decoder are counted apart."""
LCM, DECODER = "lcm", "decoder"
"""Folders of what may come beside the model."""
MOST_LCM_BYTES = 8_000_000
MOST_DECODER_BYTES = 8_000_000


@dataclass(frozen=True)
class Parts:
    """What is bundled: final folders of the trainers, and what `ldm evaluate` wrote of them.

    `model` is a pipeline, `text` has the folder clip, `lcm` a few-step adapter and `decoder` an
    AutoencoderTiny; `report` and `lcm_report` are JSON.
    """

    model: Path
    text: Path
    report: Path | None = None
    lcm: Path | None = None
    lcm_report: Path | None = None
    decoder: Path | None = None


def bundle(parts: Parts, out: Path) -> Path:
    """Copy everything to `out`, the CLIP and the adapter in 16 bits, with a model card.

    Raises UserError where a part is missing or takes more than its share; `out` is then left as it
    was.
    """
    for part in (parts.model / "model_index.json", parts.text / "clip"):
        if not part.exists():
            raise UserError(f"{part} is missing")
    unfinished = out.with_name(out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        _gather(parts, unfinished)
    except UserError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if out.exists():
        shutil.rmtree(out)
    unfinished.rename(out)
    return out


def _gather(parts: Parts, place: Path) -> None:
    """Put all of it into the new folder `place`."""
    extras = shutil.ignore_patterns(LCM, DECODER, ".*")
    shutil.copytree(parts.model, place, ignore=extras)
    clip = CLIPModel.from_pretrained(parts.text / "clip", dtype=torch.float16)
    clip.save_pretrained(place / "clip")
    for config in place.rglob("config.json"):
        _forget_origin(config)
    if not (place / "tokenizer").is_dir():
        raise UserError(f"{parts.model} has no tokenizer")
    card = model_card(_read(parts.report), _read(parts.lcm_report))
    (place / "README.md").write_text(card, "utf-8")
    _must_fit("the model", place, MOST_BYTES)
    if parts.lcm is not None:
        weights = files.load_whole(parts.lcm)
        halves = {name: tensor.half() for name, tensor in weights.tensors.items()}
        notes = read_note(parts.lcm).texts()
        files.save(place / LCM, replace(weights, tensors=halves), notes)
        _must_fit("the few-step adapter", place / LCM, MOST_LCM_BYTES)
    if parts.decoder is not None:
        small = AutoencoderTiny.from_pretrained(parts.decoder, torch_dtype=torch.float16)
        small.save_pretrained(place / DECODER)
        _forget_origin(place / DECODER / "config.json")
        _must_fit("the small decoder", place / DECODER, MOST_DECODER_BYTES)


def _read(report: Path | None) -> dict[str, Any] | None:
    """The figures in a report; None without one."""
    return None if report is None else json.loads(report.read_text("utf-8"))


def _must_fit(what: str, folder: Path, most: int) -> None:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if size > most:
        raise UserError(f"{what} takes {size / 1e6:.1f} MB; at most {most / 1e6:.0f} fit")


def _forget_origin(config: Path) -> None:
    """Leave out the folder that a model was loaded from: it tells of a machine alone."""
    told = json.loads(config.read_text("utf-8"))
    if told.pop("_name_or_path", None) is not None:
        config.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", "utf-8")


def model_card(
    figures: dict[str, Any] | None = None, few_steps: dict[str, Any] | None = None
) -> str:
    """The card's Markdown; tables are left out where nothing was measured."""
    told = _table(figures) if figures else "Not measured yet.\n"
    if few_steps:
        told += "\n" + FEW_STEPS + _table(few_steps)
    return CARD.format(figures=told)


def _table(figures: dict[str, Any]) -> str:
    settings = figures["settings"]
    lcm = " --lcm" if settings.get("lcm") else f" --guidance {settings['guidance']:g}"
    dtype = f" --dtype {settings['dtype']}" if "dtype" in settings else ""
    lines = [
        f"`ldm evaluate --prompts {settings['prompts']} --seed {settings['seed']}"
        f" --steps {settings['steps']}{lcm}{dtype}`, read by the judge:",
        "",
        "| what | measured | 95 % interval | trials | floor |",
        "|---|---|---|---|---|",
    ]
    for name, share in figures["shares"].items():
        low, high = share["interval"]
        floor = figures["floors"].get(name, "")
        lines.append(
            f"| {name} | {share['value']:.3f} | {low:.3f} to {high:.3f} | {share['n']} | {floor} |"
        )
    lines.append(
        f"| autoencoder, PSNR on fresh scenes | {figures['psnr']:.2f} dB | | 200 | 30 dB |"
    )
    return "\n".join(lines) + "\n"


FEW_STEPS = """With the few-step adapter in `lcm`, distilled from this model by train/train_lcm.py:

"""

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# A small latent diffusion model that draws a picture world

It draws 128 x 128 pictures of one to four simple things: 28 kinds (stars, houses, fish, …) in 12
colours and three sizes, flat or outlined, on plain and patterned backgrounds, with relations
("left of"), places ("in the top left corner") and counts. It exists so that a latent diffusion
pipeline can be tried, tested and taught on a laptop, with no network and no graphics card.

## Parts

| folder | what | parameters |
|---|---|---|
| `vae` | AutoencoderKL, 8 x down, 4 latent channels | 3.3 M |
| `text_encoder`, `tokenizer` | CLIP text model, own byte-pair vocabulary, 48 tokens | 0.9 M |
| `unet` | UNet2DConditionModel, cross-attention, v-prediction | 9 M |
| `scheduler` | DDIM on DDPM's linear schedule, trailing spacing | |
| `clip` | the contrastive text and vision towers the text encoder began from | 2.3 M |

Weights are stored in 16 bits.

## Data

Everything was drawn by `ldm_pipeline.data.world`: pictures, captions and truth come from a seed.
5 % of the (kind, colour) pairs and 5 % of the captions never appear in training. No photograph, no
artwork and no text by other people took part.

## Recipe

    accelerate launch train/train_autoencoder.py --config configs/autoencoder_tiny.yaml
    accelerate launch train/train_clip.py --config configs/clip_tiny.yaml
    accelerate launch train/train_unet.py --config configs/unet_tiny.yaml

On two CPU cores, in several sittings. The autoencoder saw 229,000 crops of 64 x 64 pixels, and its
decoder alone 48,000 more (`decoder_only`); CLIP saw 115,000 pictures with three false captions
each, at patches of 16 pixels; both went on from the weights of the sitting before (`--begin_from`).
The UNet began anew beside a text encoder that an earlier UNet had tuned, and saw 538,000 samples in
batches of 64: of 32,000 pictures in its first half, of 64,000 in its second, the rate falling to
zero at the end of each. A linear head on its features named what is where while it learnt
(`layout_weight`); it is left out here.

## Figures

{figures}
## Limits

It knows 172 words and nothing outside its world; the command names words that it never learnt. It
cannot draw text, people or photographs. Where a share above lies far below its floor, training was
too short, and pictures do not yet show what the words say in that respect.
"""
