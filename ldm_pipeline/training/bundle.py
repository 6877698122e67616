"""Puts a trained model into a folder that can be given away: weights, CLIP, figures, model card."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTokenizer

from ldm_pipeline.data.world import VOCABULARY
from ldm_pipeline.errors import UserError
from ldm_pipeline.lora import files
from ldm_pipeline.lora.notes import read_note
from ldm_pipeline.models.headers import read_header

MOST_BYTES = 32_000_000
"""Of the model itself; the few-step adapter and the small decoder are counted apart."""
LCM, DECODER = "lcm", "decoder"
"""Folders of what may come beside the model."""
MOST_LCM_BYTES = 8_000_000
MOST_DECODER_BYTES = 8_000_000
COUNTED = ("vae", "text_encoder", "unet", "clip")
"""Parts whose parameters the card counts."""


@dataclass(frozen=True)
class Parts:
    """What is bundled: final folders of the trainers, and what is told of them.

    `model` is a pipeline, `text` has the folder clip, `lcm` a few-step adapter and `decoder` an
    AutoencoderTiny; `ldm evaluate` wrote `report` and `lcm_report`, which are JSON. For the card,
    `history` is Markdown about the training and `licence` the licence's usual short name.
    """

    model: Path
    text: Path
    report: Path | None = None
    lcm: Path | None = None
    lcm_report: Path | None = None
    decoder: Path | None = None
    history: Path | None = None
    licence: str | None = None


def bundle(parts: Parts, out: Path) -> Path:
    """Copy everything to `out`, the CLIP and the adapter in 16 bits, with a model card. Words that
    training never saw are made heard (see `_hear_new_words`).

    A bundle that is there is replaced. Raises UserError where a part is missing, cannot be read or
    takes more than its share, and where `out` holds anything else; it is then left as it was.
    """
    wanted = [parts.model / "model_index.json", parts.text / "clip"]
    told = (parts.report, parts.lcm, parts.lcm_report, parts.decoder, parts.history)
    for part in [*wanted, *(part for part in told if part is not None)]:
        if not part.exists():
            raise UserError(f"{part} is missing")
    out = out.resolve()
    before = out.with_name(f".{out.name}.before")
    if out.exists():
        shutil.rmtree(before, ignore_errors=True)  # of a run that was killed at the very end
    elif before.exists():
        before.rename(out)  # of one that was killed between the two
    _must_be_free(out, parts)
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        _gather(parts, unfinished)
    except (OSError, ValueError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(f"the bundle cannot be made: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError("a report is not what ldm evaluate writes; evaluate again") from error
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    _exchange(unfinished, out, before)
    return out


def _exchange(new: Path, out: Path, before: Path) -> None:
    """Put the folder `new` in the place of `out`, set aside as `before` and back where that
    fails."""
    try:
        if out.exists():
            out.rename(before)
        new.rename(out)
    except OSError as error:
        if before.exists() and not out.exists():
            before.rename(out)
        raise UserError(f"{out} cannot be written: {error.strerror}; {new} has it") from error
    finally:
        if out.exists():
            shutil.rmtree(before, ignore_errors=True)


def _must_be_free(out: Path, parts: Parts) -> None:
    """Refuse an `out` whose removal would lose something else than an earlier bundle."""
    for part in (parts.model, parts.text, parts.lcm, parts.decoder):
        if part is not None and part.resolve().is_relative_to(out):
            raise UserError(f"{out} cannot be the bundle: {part} lies in it")
    if out.is_dir() and any(out.iterdir()) and not (out / "model_index.json").is_file():
        raise UserError(f"{out} holds something else than a model; name a new folder")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a new folder")


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
    _hear_new_words(place)
    history = None if parts.history is None else parts.history.read_text("utf-8")
    millions = {part: f"{_millions(place / part)} M" for part in COUNTED}
    if parts.decoder is not None:
        millions[DECODER] = f"{_millions(parts.decoder)} M"
    card = model_card(
        millions, _read(parts.report), _read(parts.lcm_report), history, parts.licence
    )
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


@torch.no_grad()
def _hear_new_words(place: Path) -> None:
    """Make the embeddings of tokens that no caption of the world has as long as the others'.

    Training leaves them where they began, near nothing (0.16 where the others are 1.9 long). A new
    word, which is made of such tokens, would hardly be heard, and what a LoRA learns of it hang on
    as little. All that the world's own words draw stays the same, bit for bit. Tokens without a
    letter or digit stay quiet, as marks should.
    """
    file = place / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("token_embedding.weight"))
    tokenizer = CLIPTokenizer.from_pretrained(place / "tokenizer")
    known = {token for word in (*VOCABULARY, ",") for token in tokenizer(word).input_ids}
    new = [
        number
        for token, number in tokenizer.get_vocab().items()
        if number not in known and any(map(str.isalnum, token.removesuffix("</w>")))
    ]
    lengths = tensors[name].float().norm(dim=1)
    usual = lengths[sorted(known)].median()
    quiet = torch.tensor([number for number in new if 0 < lengths[number] < usual / 2])
    if len(quiet):
        louder = tensors[name][quiet].float() * (usual / lengths[quiet])[:, None]
        tensors[name][quiet] = louder.to(tensors[name].dtype)
        save_file(tensors, file, {"format": "pt"})


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


def _millions(folder: Path) -> str:
    """How many million numbers the weights in `folder` are."""
    headers = [read_header(file) for file in folder.glob("*.safetensors")]
    return f"{sum(prod(shape) for h in headers for shape in h.shapes.values()) / 1e6:.1f}"


def model_card(
    millions: dict[str, str],
    figures: dict[str, Any] | None = None,
    few_steps: dict[str, Any] | None = None,
    history: str | None = None,
    licence: str | None = None,
) -> str:
    """The card's Markdown; what was not measured or told is left out.

    `millions` tells of each part in `COUNTED` how many parameters it has, and of the small decoder
    where there is one.
    """
    told = _table(figures) if figures is not None else "Not measured yet.\n"
    if few_steps is not None:
        told += "\n" + FEW_STEPS + _table(few_steps)
    passed = "" if history is None else f"\n{history.strip()}\n"
    front = "" if licence is None else f"license: {licence}\n"
    words = len(VOCABULARY)
    small = SMALL_DECODER.format(**millions) if DECODER in millions else ""
    told_of = {part: millions[part] for part in COUNTED}
    return CARD.format(
        licence=front, figures=told, history=passed, words=words, small=small, **told_of
    )


def _table(figures: dict[str, Any]) -> str:
    settings = figures["settings"]
    lcm = " --lcm" if settings.get("lcm") else f" --guidance {settings['guidance']:g}"
    named = "".join(
        f" --{name} {settings[name]}" for name in ("sampler", "eta", "dtype") if name in settings
    )
    lines = [
        f"`ldm evaluate --prompts {settings['prompts']} --seed {settings['seed']}"
        f" --steps {settings['steps']}{lcm}{named}`, read by the judge:",
        "",
        "| what | measured | 95 % interval | trials | aim |",
        "|---|---|---|---|---|",
    ]
    for name, share in figures["shares"].items():
        low, high = share["interval"]
        aim = figures["aims"].get(name, "")
        lines.append(
            f"| {name} | {share['value']:.3f} | {low:.3f} to {high:.3f} | {share['n']} | {aim} |"
        )
    lines.append(f"| autoencoder, PSNR on fresh scenes | {figures['psnr']:.2f} dB | | | 30 dB |")
    return "\n".join(lines) + "\n"


FEW_STEPS = """With the few-step adapter in `lcm`, distilled from this model by train/train_lcm.py:

"""

SMALL_DECODER = "| `decoder` | AutoencoderTiny, in place of `vae` if asked for | {decoder} |\n"

CARD = """---
{licence}library_name: diffusers
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
| `vae` | AutoencoderKL, 8 x down, 4 latent channels | {vae} |
| `text_encoder`, `tokenizer` | CLIP text model, own vocabulary, 48 tokens | {text_encoder} |
| `unet` | UNet2DConditionModel, cross-attention, v-prediction | {unet} |
| `scheduler` | DDIM on DDPM's linear schedule, trailing spacing | |
| `clip` | contrastive text and vision towers, which read the same tokens | {clip} |
{small}
Weights are stored in 16 bits.

## Data

Everything was drawn by `ldm_pipeline.data.world`: pictures, captions and truth come from a seed.
5 % of the (kind, colour) pairs and 5 % of the captions never appear in training. No photograph, no
artwork and no text by other people took part.

## Recipe

    accelerate launch train/train_autoencoder.py --config configs/autoencoder_tiny.yaml
    accelerate launch train/train_clip.py --config configs/clip_tiny.yaml
    accelerate launch train/train_unet.py --config configs/unet_tiny.yaml
{history}
## Figures

{figures}
## Limits

It knows {words} words and nothing outside its world; the command names words that it never learnt.
It cannot draw text, people or photographs. Where a share above lies far below its aim, training
was too short, and pictures do not yet show what the words say in that respect.
"""
