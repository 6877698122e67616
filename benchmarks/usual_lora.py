"""LoRA training as most scripts do it, to compare with. The other benchmarks use it; by itself:

    python -m benchmarks.usual_lora PICTURES --out FOLDER [--steps 200] [--batch 8] [--bf16]

Decode, resize and tokenise in the main process, autoencoder and text encoder in every step, all
three networks in the run's precision, PEFT's own layers, the loss read back each time, diffusers'
own file at the end. PICTURES is an image folder with a `metadata.jsonl`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm.auto import tqdm

from ldm_pipeline import load
from ldm_pipeline.data import captioned
from ldm_pipeline.diffusion.losses import denoising_loss
from ldm_pipeline.diffusion.schedule import Schedule
from ldm_pipeline.models.unet import bind

Step = Iterator[str]


def steps_of(
    pipe: Any, pictures: Path, targets: list[str], rank: int, batch: int, side: int, bf16: bool
) -> Callable[[int], Step]:
    """A step by its number, told in stages as they end: data, forward, backward, update."""
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)
        torch.nn.Module.to(part, dtype=torch.bfloat16 if bf16 else torch.float32)
    pipe.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    parameters = [p for p in pipe.unet.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    optimiser = torch.optim.AdamW(parameters, lr=1e-4)
    items = captioned.read_dataset(pictures)
    schedule = Schedule.from_config(pipe.scheduler.config)
    generator = torch.Generator().manual_seed(0)

    def step(number: int) -> Step:
        chosen = [items[(number * batch + i) % len(items)] for i in range(batch)]
        pixels = []
        for item in chosen:
            picture = Image.fromarray(captioned.load(item).pixels)
            resized = picture.resize((side, side), Image.Resampling.LANCZOS)
            pixels.append(torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 127.5 - 1)
        x = torch.stack(pixels).to(pipe.vae.dtype)
        tokens = pipe.tokenizer(
            [item.captions[0] for item in chosen],
            padding="max_length", truncation=True, return_tensors="pt",
        ).input_ids  # fmt: skip
        yield "data"
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                z = pipe.vae.encode(x).latent_dist.sample(generator)
                embeds = pipe.text_encoder(tokens)[0]
            loss = _loss(pipe, schedule, z * pipe.vae.config.scaling_factor, embeds, generator)
        yield "forward"
        loss.backward()
        yield "backward"
        clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        loss.item()
        yield "update"

    return step


def _loss(
    pipe: Any, schedule: Schedule, z: Tensor, embeds: Tensor, generator: torch.Generator
) -> Tensor:
    eps = torch.randn(z.shape, generator=generator, dtype=z.dtype)
    t = torch.randint(0, schedule.num_train_timesteps, (len(z),), generator=generator)
    kind = pipe.scheduler.config.prediction_type
    return denoising_loss(bind(pipe.unet, embeds), schedule, kind, z, eps, t)


def main() -> None:
    """Train and write the adapter."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="bundled", help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--targets", nargs="+", default=["to_q", "to_k", "to_v", "to_out.0"])
    parser.add_argument("--bf16", action="store_true", help="under autocast")
    args = parser.parse_args()
    pipe = load(args.model)
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    step = steps_of(pipe, args.pictures, args.targets, args.rank, args.batch, side, args.bf16)
    for number in tqdm(range(args.steps), unit="step"):
        list(step(number))
    StableDiffusionPipeline.save_lora_weights(
        args.out, unet_lora_layers=get_peft_model_state_dict(pipe.unet)
    )


if __name__ == "__main__":
    main()
