"""A few steps of a LoRA at the full size of Stable Diffusion 1.5 or SDXL, on this machine, without
downloading either: the architectures' published numbers, filled with random weights. Run by hand:

    python benchmarks/full_architecture.py [sd15|sdxl] [--side 128] [--batch 1] [--steps 3]

What is run is the trainer itself: caching with the autoencoder and the text encoders, training,
clipping, a checkpoint, the adapter's file. Printed are the seconds of each of these, and the peak
memory of the process. The base is in bfloat16, as on a GPU; `--float32` changes that.
"""

from __future__ import annotations

import argparse
import resource
import string
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ldm_pipeline.data.world import write_folder
from ldm_pipeline.training.engine import fit
from ldm_pipeline.training.lora import LoraConfig, LoraObjective
from ldm_pipeline.training.objective import Batch

WORDS = 49408
"""Of CLIP's vocabulary."""

BOTH_UNETS: dict[str, Any] = {"in_channels": 4, "out_channels": 4, "layers_per_block": 2}

UNETS: dict[str, dict[str, Any]] = {
    "sd15": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
        "up_block_types": (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
PARAMETERS = {"sd15": 859_520_964, "sdxl": 2_567_463_684}
"""Of the published UNets."""

CLIP_L: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "hidden_act": "quick_gelu", "projection_dim": 768,
}  # fmt: skip
CLIP_BIGG: dict[str, Any] = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
    "num_attention_heads": 20, "hidden_act": "gelu", "projection_dim": 1280,
}  # fmt: skip
VAE: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
}  # fmt: skip
SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1
}  # fmt: skip


def filled(make: Callable[[], Any], dtype: torch.dtype) -> Any:
    """A network of random weights that keep the size of what flows through it.

    Numbers repeat after a prime: drawing billions of them would take longer than the training.
    """
    with torch.device("meta"):
        made = make().to(dtype)
    made.to_empty(device="cpu")
    numbers = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    for key, parameter in made.named_parameters():
        if parameter.ndim > 1:
            scaled = (numbers / parameter[0].numel() ** 0.5).to(dtype)
            for piece in parameter.data.flatten().split(len(scaled)):
                piece.copy_(scaled[: len(piece)])
        else:
            parameter.data.fill_(float("norm" in key and key.endswith("weight")))
    for key, buffer in made.named_buffers():
        assert key.endswith("position_ids"), f"{key} is filled with nothing"
        buffer.copy_(torch.arange(buffer.shape[-1]))
    return made.eval()


def unet(name: str) -> UNet2DConditionModel:
    """A UNet of one of the architectures."""
    made = UNet2DConditionModel(**BOTH_UNETS, **UNETS[name])
    total = sum(p.numel() for p in made.parameters())
    assert total == PARAMETERS[name], f"{total} parameters, not those of {name}"
    return made


def tokenizer() -> CLIPTokenizer:
    """Letters, and as many words that nobody says as make CLIP's vocabulary full."""
    letters = list(string.ascii_lowercase + string.digits + ",.")
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += [f"nobody{i}</w>" for i in range(WORDS - 2 - len(words))]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def text_config(**numbers: Any) -> CLIPTextConfig:
    """The configuration of a CLIP text encoder."""
    end = WORDS - 1
    return CLIPTextConfig(
        vocab_size=WORDS, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end, **numbers
    )


def opened(source: str, dtype: torch.dtype) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """A pipeline of one of the architectures, as the trainer opens models."""
    torch.manual_seed(0)
    parts: dict[str, Any] = {
        "unet": filled(lambda: unet(source), dtype),
        "tokenizer": tokenizer(),
        "text_encoder": filled(lambda: CLIPTextModel(text_config(**CLIP_L)), dtype),
    }
    if source == "sd15":
        parts["vae"] = AutoencoderKL(**VAE, scaling_factor=0.18215).to(dtype).eval()
        parts["scheduler"] = PNDMScheduler(**SCHEDULE, skip_prk_steps=True)
        absent = dict.fromkeys(("safety_checker", "feature_extractor"))
        return StableDiffusionPipeline(**parts, **absent, requires_safety_checker=False)
    return StableDiffusionXLPipeline(
        **parts,
        text_encoder_2=filled(lambda: CLIPTextModelWithProjection(text_config(**CLIP_BIGG)), dtype),
        tokenizer_2=tokenizer(),
        vae=AutoencoderKL(**VAE, scaling_factor=0.13025).eval(),
        scheduler=EulerDiscreteScheduler(**SCHEDULE),
        add_watermarker=False,
    )


class Timed(LoraObjective):
    """An objective that notes when each step begins, and has its base in a precision."""

    def __init__(self, config: LoraConfig, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.begun: list[float] = []
        super().__init__(config, opened)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The losses."""
        self.begun.append(time.perf_counter())
        return super().forward(batch)

    def _dtype(self) -> torch.dtype:
        return self.dtype


def main() -> None:
    """Train a little and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="sd15", choices=tuple(UNETS))
    parser.add_argument("--side", type=int, default=128, help="of the pictures (%(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="samples of a step (%(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--float32", action="store_true", help="the base in float32")
    args = parser.parse_args()
    tell = partial(print, flush=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_folder(folder / "pictures", 4, 0, "train")
        config = LoraConfig.model_validate(
            {
                "run": {
                    "out": folder / "run", "batch_size": args.batch, "steps": args.steps,
                    "workers": 0, "mixed_precision": "no" if args.float32 else "bf16",
                    "log_every": 1,
                },
                "optimiser": {"warmup_steps": 0, "ema_decay": 0.0},
                "model": args.model,
                "gradient_checkpointing": True,
                "data": {
                    "source": str(folder / "pictures"), "resolution": args.side, "fixed": True,
                    "upscale": True, "cache": folder / "cache",
                },
            }
        )  # fmt: skip
        began = time.perf_counter()
        objective = Timed(config, torch.float32 if args.float32 else torch.bfloat16)
        tell(f"making the model and caching 4 pictures: {time.perf_counter() - began:.1f} s")
        before = {n: p.detach().clone() for n, p in objective.adapter.parameters.items()}
        final = fit(objective, config)
        ended = time.perf_counter()
        starts = [*objective.begun, ended]
        steps = [after - one for one, after in pairwise(starts)]
        told = ", ".join(f"{seconds:.1f}" for seconds in steps)
        tell(f"steps of {args.batch} at {args.side} x {args.side}: {told} s (the last also saves)")
        now = objective.adapter.parameters
        moved = sum(not torch.equal(before[name], now[name]) for name in before)
        size = sum(file.stat().st_size for file in final.glob("*.safetensors")) / 2**20
        tell(f"{moved} of {len(before)} matrices of the adapter moved; its file has {size:.1f} MiB")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    tell(f"{PARAMETERS[args.model] / 1e6:.0f} M parameters in the UNet; peak memory {peak:.1f} GiB")


if __name__ == "__main__":
    main()
