"""Puts a trained model into a folder that can be given away: weights, CLIP, figures, model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPModel

from ldm_pipeline.errors import UserError

MOST_BYTES = 32_000_000


def bundle(model: Path, text: Path, report: Path | None, out: Path) -> Path:
    """Copy the pipeline in `model` and the CLIP in `text` (in 16 bits) to `out`, with a model card.

    `report` is the JSON of `ldm evaluate`; its figures go into the card. Raises UserError where a
    part is missing or the whole would be larger than 32 MB; `out` is then left as it was.
    """
    for part in (model / "model_index.json", text / "clip"):
        if not part.exists():
            raise UserError(f"{part} is missing")
    unfinished = out.with_name(out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(model, unfinished)
    CLIPModel.from_pretrained(text / "clip", dtype=torch.float16).save_pretrained(
        unfinished / "clip"
    )
    for config in unfinished.rglob("config.json"):
        _forget_origin(config)
    if not (unfinished / "tokenizer").is_dir():
        raise UserError(f"{model} has no tokenizer")
    figures = json.loads(report.read_text("utf-8")) if report is not None else None
    (unfinished / "README.md").write_text(model_card(figures), "utf-8")
    size = sum(file.stat().st_size for file in unfinished.rglob("*") if file.is_file())
    if size > MOST_BYTES:
        shutil.rmtree(unfinished)
        raise UserError(f"the model takes {size / 1e6:.1f} MB; at most {MOST_BYTES / 1e6:.0f} fit")
    if out.exists():
        shutil.rmtree(out)
    unfinished.rename(out)
    return out


def _forget_origin(config: Path) -> None:
    """Leave out the folder that a model was loaded from: it tells of a machine alone."""
    told = json.loads(config.read_text("utf-8"))
    if told.pop("_name_or_path", None) is not None:
        config.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", "utf-8")


def model_card(figures: dict[str, Any] | None) -> str:
    """The card's Markdown; the table is left out where nothing was measured."""
    return CARD.format(figures=_table(figures) if figures else "Not measured yet.\n")


def _table(figures: dict[str, Any]) -> str:
    settings = figures["settings"]
    lines = [
        f"`ldm evaluate --prompts {settings['prompts']} --seed {settings['seed']}"
        f" --steps {settings['steps']} --guidance {settings['guidance']:g}`, read by the judge:",
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

On two CPU cores, in several sittings. The autoencoder saw 229,000 crops of 64 x 64 pixels, CLIP
115,000 pictures with three false captions each; both went on from the weights of the sitting before
(`--begin_from`). The UNet began anew beside a text encoder that an earlier UNet had tuned, and saw
288,000 samples of 32,000 pictures in batches of 64. A linear head on its features named what is
where while it learnt (`layout_weight`); it is left out here.

## Figures

{figures}
## Limits

It knows 172 words and nothing outside its world; the command names words that it never learnt. It
cannot draw text, people or photographs. Where a share above lies far below its floor, training was
too short, and pictures do not yet show what the words say in that respect.
"""
