"""How fast a LoRA is trained, ours against the usual way, on this machine. Run by hand:

    python benchmarks/train_throughput.py [--model DIR] [--batch 4] [--steps 8] [--rounds 3]

One model, one folder of pictures of the world, one adapter's shape. *Usual* is the loop of most
training scripts: decode, resize and tokenise in the main process, autoencoder and text encoder in
every step, the loss read back each time. *Ours* takes latents and embeddings from the caches; *ours
uncached* pays for encoding too, as in a run's first pass. They take turns; the table has the
medians of the rounds.

Legend
    images/s   of whole training steps: data, forward, backward, clipping, AdamW
    floor      images/s if nothing but the floating-point operations of the UNet's forward and
               backward pass were done, at this machine's rate for large matrix products
    data, forward, backward, update   seconds of a step
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode

from ldm_pipeline import LatentDiffusionPipeline, load
from ldm_pipeline.data import captioned
from ldm_pipeline.data.world import write_folder
from ldm_pipeline.diffusion.losses import denoising_loss
from ldm_pipeline.diffusion.schedule import Schedule
from ldm_pipeline.lora.inject import inject
from ldm_pipeline.models.unet import bind
from ldm_pipeline.training.lora import LoraConfig, LoraObjective
from ldm_pipeline.training.updates import Gradients, Guard, build_optimiser, leave_out

STAGES = ("data", "forward", "backward", "update")
Step = Iterator[str]


def opened(source: str, dtype: torch.dtype) -> LatentDiffusionPipeline:
    """The model, as the trainer's script opens it."""
    return load(source, torch_dtype=dtype)


def config_of(model: str, folder: Path, batch: int) -> LoraConfig:
    """A LoRA run over the folder."""
    return LoraConfig.model_validate(
        {
            "run": {"out": folder / "run", "batch_size": batch, "mixed_precision": "no"},
            "model": model,
            "data": {
                "source": str(folder / "pictures"), "resolution": 128, "fixed": True,
                "cache": folder / "cache",
            },
        }
    )  # fmt: skip


def ours(objective: LoraObjective, batch: int) -> Callable[[int], Step]:
    """A step of our trainer, told in stages."""
    trained = dict(objective.adapter.parameters)
    settings = objective.config.optimiser
    gradients, guard = Gradients(trained), Guard(torch.device("cpu"))
    optimiser = build_optimiser(trained, settings)

    def step(number: int) -> Step:
        samples = objective.batch(range(number * batch, (number + 1) * batch))
        yield "data"
        gradients.clear()
        losses = objective(samples)
        yield "forward"
        losses["loss"].backward()
        yield "backward"
        norm = gradients.clip(settings.max_grad_norm)
        guard.watch(number, torch.isfinite(norm))
        leave_out(optimiser, guard.closed)
        optimiser.step()
        yield "update"

    return step


def usual(model: str, config: LoraConfig, folder: Path, batch: int) -> Callable[[int], Step]:
    """A step as most scripts do it."""
    pipe = opened(model, torch.float32)
    adapter = inject({"unet": pipe.unet}, config.lora.settings(), seed=0)
    parameters = list(adapter.parameters.values())
    optimiser = torch.optim.AdamW(parameters, lr=1e-4)
    items = captioned.read_dataset(folder / "pictures")
    schedule = Schedule.from_config(pipe.scheduler.config)
    generator = torch.Generator().manual_seed(0)

    def step(number: int) -> Step:
        chosen = [items[(number * batch + i) % len(items)] for i in range(batch)]
        pixels = []
        for item in chosen:
            picture = Image.fromarray(captioned.load(item).pixels)
            resized = picture.resize((128, 128), Image.Resampling.LANCZOS)
            pixels.append(torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 127.5 - 1)
        x = torch.stack(pixels)
        tokens = pipe.tokenizer(
            [item.captions[0] for item in chosen],
            padding="max_length", truncation=True, return_tensors="pt",
        ).input_ids  # fmt: skip
        yield "data"
        with torch.no_grad():
            z = pipe.vae.encode(x).latent_dist.sample(generator) * pipe.vae.config.scaling_factor
            embeds = pipe.text_encoder(tokens)[0]
        eps = torch.randn(z.shape, generator=generator)
        t = torch.randint(0, schedule.num_train_timesteps, (batch,), generator=generator)
        kind = pipe.scheduler.config.prediction_type
        loss = denoising_loss(bind(pipe.unet, embeds), schedule, kind, z, eps, t)
        yield "forward"
        loss.backward()
        yield "backward"
        clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        loss.item()
        yield "update"

    return step


def timed(step: Callable[[int], Step], numbers: range) -> dict[str, float]:
    """Seconds of each stage, and of the whole, for one step on average."""
    spent = dict.fromkeys(STAGES, 0.0)
    for number in numbers:
        before = time.perf_counter()
        for stage in step(number):
            now = time.perf_counter()
            spent[stage] += now - before
            before = now
    each = {stage: seconds / len(numbers) for stage, seconds in spent.items()}
    return {**each, "whole": sum(each.values())}


def flops_of(objective: LoraObjective, batch: int) -> float:
    """Floating-point operations of a step's forward and backward pass, for one image."""
    samples = objective.batch(range(batch))
    with FlopCounterMode(display=False) as counter:
        objective(samples)["loss"].backward()
    return counter.get_total_flops() / batch


def peak_rate() -> float:
    """Operations a second of a product of two 2048 x 2048 matrices, the best of five."""
    a, b = torch.randn(2, 2048, 2048)
    best = 0.0
    for _ in range(5):
        before = time.perf_counter()
        a @ b
        best = max(best, 2 * 2048**3 / (time.perf_counter() - before))
    return best


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="bundled", help="a folder (%(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="in a round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_folder(folder / "pictures", 32, 0, "train")
        config = config_of(args.model, folder, args.batch)
        began = time.perf_counter()
        objective = LoraObjective(config, opened)
        caching = (time.perf_counter() - began) / 32
        ways = {
            "usual": usual(args.model, config, folder, args.batch),
            "ours": ours(objective, args.batch),
        }
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for turn in range(args.rounds + 1):
            for name, step in ways.items():
                first = turn * args.steps
                taken = timed(step, range(first, first + args.steps))
                if turn:  # the first round warms up
                    rounds[name].append(taken)
        floor = peak_rate() / flops_of(objective, args.batch)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {args.batch}")
    print(f"{'':>14} images/s  of floor " + " ".join(f"{stage:>9}" for stage in STAGES))
    speeds = {}
    for name, each in rounds.items():
        middle = {key: statistics.median(one[key] for one in each) for key in each[0]}
        speeds[name] = args.batch / middle["whole"]
        stages = " ".join(f"{middle[stage]:9.4f}" for stage in STAGES)
        print(f"{name:>14} {speeds[name]:8.2f} {speeds[name] / floor:8.1%}  {stages}")
    first_pass = 1 / (1 / speeds["ours"] + caching)
    print(f"{'ours uncached':>14} {first_pass:8.2f} {first_pass / floor:8.1%}")
    print(f"{'floor':>14} {floor:8.2f}")
    print(f"ours / usual: {speeds['ours'] / speeds['usual']:.2f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory of the process: {peak:.0f} MiB")


if __name__ == "__main__":
    main()
