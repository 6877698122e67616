"""The rows of the table of parity: what can be asked of a stock pipeline, and how far ours differs.

Each is a function of a task (`tasks.py`) that draws with both pipelines and gives the largest
difference, or None where the stock pipeline has nothing of the kind. That the pictures are others
than without it is asserted on the way: what nobody hears is no feature.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.callbacks import SDCFGCutoffCallback, SDXLCFGCutoffCallback
from safetensors.torch import save_file

from tests.conftest import tiny_small_vae
from tests.parity.pairs import (
    PROMPTS,
    SCHEDULERS,
    Pair,
    change_embeds,
    change_guidance,
    change_latents,
    drawn_by_both,
    mask,
    picture,
    scheduler_of,
    seeded,
    stop_early,
)
from tests.parity.tasks import BASE, Task

Compare = Callable[[Task], float | None]


# Comparing ------------------------------------------------------------------------------------


@cache
def shared(task: Task, scheduler: str, settings: tuple[tuple[str, Any], ...] = ()) -> Pair:
    """A pair over components that nobody changes."""
    return task.pair(task.parts(scheduler_of(scheduler, **dict(settings))))


def array(images: Any) -> Any:
    """Images of any output type as one array."""
    if isinstance(images, list):
        return np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return images.float().numpy() if isinstance(images, torch.Tensor) else images


def compared(pair: Pair, **told: Any) -> tuple[float, Any]:
    """The largest difference between what both draw, and what ours is; latents unless said."""
    mine, theirs = (array(each) for each in drawn_by_both(pair, **{"output_type": "latent"} | told))
    assert np.isfinite(mine).all()
    return float(np.abs(mine - theirs).max()), mine


@cache
def plain(task: Task, scheduler: str) -> Any:
    """Our latents where nothing is asked for but the task itself."""
    return compared(shared(task, scheduler), **task.asked())[1]


def heard(task: Task, mine: Any, scheduler: str = BASE) -> None:
    """Assert that a picture is another than the plain one."""
    assert not np.array_equal(mine, plain(task, scheduler)), "it changes nothing"


def asking(scheduler: str = BASE, **arguments: Any) -> Compare:
    """The difference with these arguments, where the stock pipeline knows them all."""

    def compare(task: Task) -> float | None:
        if not arguments.keys() <= task.takes:
            return None
        found, mine = compared(shared(task, scheduler), **task.asked() | arguments)
        heard(task, mine, scheduler)
        return found

    return compare


# What takes more than arguments -----------------------------------------------------------------


def with_scheduler(name: str) -> Compare:
    """Two prompts, two images of each and a generator for each; then one, without guidance."""

    def compare(task: Task) -> float:
        told = {**task.asked(), "prompt": PROMPTS, "num_images_per_prompt": 2}
        own = {"generator": lambda: seeded(1, 2, 3, 4)}
        pair = shared(task, name)
        several, _ = compared(pair, **told | own)
        return max(several, compared(pair, **task.asked(), guidance_scale=1.0)[0])

    return compare


def with_settings(scheduler: str = "DDPMScheduler", **settings: Any) -> Compare:
    """What the scheduler says that the network predicts, or where its steps lie."""

    def compare(task: Task) -> float:
        found, mine = compared(shared(task, scheduler, (*settings.items(),)), **task.asked())
        heard(task, mine, scheduler)
        return found

    return compare


def guided_lcm(task: Task) -> float:
    """A UNet that takes the strength of guidance as an input."""
    parts = task.parts(scheduler_of("LCMScheduler"), time_cond_proj_dim=32)
    pair = task.pair(parts)
    found, mine = compared(pair, **task.asked(), guidance_scale=8.5)
    other, weak = compared(pair, **task.asked(), guidance_scale=3.0)
    assert not np.array_equal(mine, weak)
    return max(found, other)


def with_bfloat16(**autoencoder: Any) -> Compare:
    """All weights in bfloat16, with these settings of the autoencoder."""

    def compare(task: Task) -> float:
        parts = task.parts()
        parts["vae"].register_to_config(**autoencoder)
        pair = task.pair(parts)
        for pipe in pair:
            pipe.to(torch.bfloat16)
        found, mine = compared(pair, **task.asked())
        heard(task, mine)
        return found

    return compare


def embeddings(task: Task) -> float:
    """Embeddings instead of words, for two images of each of two prompts."""
    pair = shared(task, BASE)
    words = {"prompt": PROMPTS, "negative_prompt": ["fog", "rain"]}
    made = pair[0].encode_prompt(
        **words, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    names = ["prompt_embeds", "negative_prompt_embeds"]
    names += ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    told = {**task.asked(), "num_images_per_prompt": 2}
    given = {**dict(zip(names, made, strict=False)), "prompt": None}
    found, mine = compared(pair, **told | given)
    assert np.array_equal(mine, compared(pair, **told | words)[1])
    return found


def clip_skip(task: Task) -> float:
    parts = task.parts()
    if not task.xl:
        # The stock pipeline looks for `text_model`, which transformers 5 folded into the model.
        parts["text_encoder"].__dict__["text_model"] = parts["text_encoder"]
    found, mine = compared(task.pair(parts), **task.asked(), clip_skip=1)
    heard(task, mine)
    return found


def with_callback(callback: Callable[[], Any], *names: str) -> Compare:
    """A callback that is handed all there is for it, or `names`; Heun asks twice in a step."""

    def compare(task: Task) -> float | None:
        if not set(names) <= set(task.stock._callback_tensor_inputs):
            return None
        told = {"callback_on_step_end": callback}
        told |= {"callback_on_step_end_tensor_inputs": task.stock._callback_tensor_inputs}
        scheduler = "HeunDiscreteScheduler"
        found, mine = compared(shared(task, scheduler), **task.asked() | told)
        heard(task, mine, scheduler)
        return found

    return compare


def read_scheduler() -> Callable[..., dict[str, Any]]:
    """What the pipeline's scheduler says of the run under way decides how the latents change."""

    def callback(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        own = pipe.scheduler
        assert float(own.timesteps[own.step_index - 1]) == float(t)
        share = float(own.sigmas[own.step_index] / own.sigmas[0]) + len(own.timesteps) / 100
        return {"latents": tensors["latents"] * (1 - share / 10)}

    return callback


def change_mask() -> Callable[..., dict[str, Any]]:
    def callback(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        tensors["mask"] = tensors["mask"].roll(1, dims=-1)
        tensors["masked_image_latents"] = tensors["masked_image_latents"] * 0.9
        return tensors

    return callback


def cut_guidance(task: Task) -> float | None:
    """Stock's own callback: no guidance, and half the batch, after two fifths of the run."""
    if task.paints:
        return None  # it leaves the mask twice as large as the rest
    kind = SDXLCFGCutoffCallback if task.xl else SDCFGCutoffCallback
    told = {"callback_on_step_end": lambda: kind(cutoff_step_ratio=0.4)}
    found, mine = compared(shared(task, BASE), **task.asked() | told)
    heard(task, mine)
    return found


def lora_scale(task: Task) -> float:
    """Adapters on the UNet and on the text encoders, at half and at no strength."""
    from peft import LoraConfig

    parts = task.parts()
    for name in ("unet", "text_encoder", "text_encoder_2"):
        if name in parts:
            torch.manual_seed(1)
            targets = ["to_q", "to_v"] if name == "unet" else ["q_proj", "v_proj"]
            config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
            parts[name].add_adapter(config)
    pair = task.pair(parts)
    half, mine = compared(pair, **task.asked(), cross_attention_kwargs={"scale": 0.5})
    none, off = compared(pair, **task.asked(), cross_attention_kwargs={"scale": 0.0})
    heard(task, mine)
    assert np.array_equal(off, plain(task, BASE))
    return max(half, none)


def adapter_weights(unet: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    """An IP-Adapter for `unet` and image embeddings of 16 numbers, under its file's names."""
    generator = torch.Generator().manual_seed(seed)
    tokens, width = 4, unet.config.cross_attention_dim
    weights = {
        "image_proj.proj.weight": torch.randn(tokens * width, 16, generator=generator),
        "image_proj.proj.bias": torch.zeros(tokens * width),
        "image_proj.norm.weight": torch.ones(width),
        "image_proj.norm.bias": torch.zeros(width),
    }
    crossing = [name for name in unet.attn_processors if "attn2" in name]
    for k, name in enumerate(crossing):
        rows = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
        for part in ("to_k_ip", "to_v_ip"):
            made = torch.randn(rows, width, generator=generator)
            weights[f"ip_adapter.{2 * k + 1}.{part}.weight"] = made
    return weights


def save_adapters(folder: Path, unet: Any, count: int = 1) -> None:
    """IP-Adapters for `unet` and their image encoder, as the hub has them: in `models`."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    (folder / "models").mkdir()
    for k in range(count):
        save_file(adapter_weights(unet, k), folder / f"models/{k}.safetensors")
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        projection_dim=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        intermediate_size=37,
        patch_size=8,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder / "models/image_encoder")


@cache
def adapted(task: Task) -> Pair:
    """A pair with an IP-Adapter, which our loader put in."""
    ours = task.pair(task.parts())[0]
    with tempfile.TemporaryDirectory() as folder:
        save_adapters(Path(folder), ours.unet)
        ours.load_ip_adapter(folder, "models", "0.safetensors")
    ours.set_ip_adapter_scale(0.7)
    return task.pair(ours.components)


SHOWN = picture(40, 30, seed=5)


def image_prompts(task: Task) -> float:
    """A picture as a prompt, with guidance and without, for two images of two prompts."""
    told = {**task.asked(), "prompt": PROMPTS, "num_images_per_prompt": 2}
    told |= {"ip_adapter_image": SHOWN}
    found, _ = compared(adapted(task), **told)
    alone, _ = compared(adapted(task), **told, guidance_scale=1.0)
    return max(found, alone)


def image_embeddings(task: Task) -> float:
    """The same, encoded before."""
    pair = adapted(task)
    embeds = pair[0].prepare_ip_adapter_image_embeds(SHOWN, None, "cpu", 1, True)
    found, mine = compared(pair, **task.asked(), ip_adapter_image_embeds=embeds)
    assert np.array_equal(mine, compared(pair, **task.asked(), ip_adapter_image=SHOWN)[1])
    heard(task, mine)
    return found


def freeu(task: Task) -> float:
    pair = task.pair(task.parts())
    pair[0].enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)  # the UNet is one for both
    found, mine = compared(pair, **task.asked())
    heard(task, mine)
    pair[0].disable_freeu()
    off, again = compared(pair, **task.asked())
    assert np.array_equal(again, plain(task, BASE))
    return max(found, off)


def with_switch(name: str) -> Compare:
    """A switch of the autoencoder; 48 pixels are more than one tile of 32."""

    def compare(task: Task) -> float:
        pair = task.pair(task.parts())
        told = {**task.asked(48), "prompt": PROMPTS, "output_type": "pt"}
        told |= {"generator": lambda: seeded(1, 2)}
        _, whole = compared(pair, **told)
        getattr(pair[0].vae, f"enable_{name}")()
        found, mine = compared(pair, **told)
        assert np.allclose(whole, mine, rtol=0, atol=1e-5) == (name == "slicing")
        return found

    return compare


def small_autoencoder(task: Task) -> float:
    """An autoencoder whose encoder draws no noise; DDPM's own shows whether both agree on that."""
    parts = {**task.parts(scheduler_of("DDPMScheduler")), "vae": tiny_small_vae()}
    found, mine = compared(task.pair(parts), **task.asked(), output_type="pt")
    large = compared(shared(task, "DDPMScheduler"), **task.asked(), output_type="pt")[1]
    assert not np.array_equal(mine, large)
    return found


def decoded(task: Task) -> float:
    """The decoded picture in every format."""
    return max(
        compared(shared(task, BASE), **task.asked(), output_type=kind)[0]
        for kind in ("pil", "np", "pt")
    )


def enlarged_part(task: Task) -> float | None:
    """`padding_mask_crop`: what the mask covers is cut out, drawn enlarged, and laid back."""
    if "padding_mask_crop" not in task.takes:
        return None
    told = {**task.asked(), "image": picture(90, 50), "mask_image": mask(90, 50)}
    told |= {"padding_mask_crop": 4, "output_type": "pil"}
    found, mine = compared(shared(task, BASE), **told)
    assert mine.shape == (1, 50, 90, 3)
    return found


def from_pipe(task: Task) -> float:
    """To ours and back: no weight is copied or changed, and settings stay."""
    parts = task.parts()
    parts["vae"].register_to_config(force_upcast=False)  # see the row "bfloat16"
    stock = task.pair(parts)[1].to(torch.bfloat16)
    if task.xl:
        stock.register_to_config(force_zeros_for_empty_prompt=False)
    kind = type(shared(task, BASE)[0])
    ours = kind.from_pipe(stock)
    back = task.stock.from_pipe(ours, dtype=torch.bfloat16)
    for pipe in (ours, back):
        pipe.set_progress_bar_config(disable=True)
        for name, part in stock.components.items():
            if isinstance(part, torch.nn.Module):
                assert getattr(pipe, name) is part
                assert part.dtype == torch.bfloat16
        if task.xl:
            assert pipe.config.force_zeros_for_empty_prompt is False
    there, mine = compared((ours, stock), **task.asked())
    again, same = compared((ours, back), **task.asked())
    assert np.array_equal(mine, same)
    return max(there, again)


def refiner(task: Task) -> float | None:
    """Without the first encoder, and told a score in place of the target size."""
    if "aesthetic_score" not in task.takes:
        return None
    told = {"cross_attention_dim": 32, "projection_class_embeddings_input_dim": 24 + 5 * 8}
    parts = {**task.parts(**told), "text_encoder": None, "tokenizer": None}
    pair = task.pair(parts)
    pair[1].register_to_config(requires_aesthetics_score=True)
    found, mine = compared(pair, **task.asked(), aesthetic_score=7.0)
    other, usual = compared(pair, **task.asked())
    assert not np.array_equal(mine, usual)
    return max(found, other)


# The table --------------------------------------------------------------------------------------

LATENTS = torch.randn(1, 4, 16, 16, generator=seeded(3)[0])
SIZES: dict[str, Any] = {"negative_original_size": (90, 10), "negative_target_size": (30, 10)}

FEATURES: dict[str, dict[str, Compare]] = {  # a row of the README, and what it consists of
    f"{len(SCHEDULERS)} schedulers": {f"`{name}`": with_scheduler(name) for name in SCHEDULERS},
    "v- and sample prediction, zero SNR, LCM and refiner UNets": {
        "v-prediction": with_settings(prediction_type="v_prediction"),
        "v-prediction, zero terminal SNR": with_settings(
            prediction_type="v_prediction", rescale_betas_zero_snr=True
        ),
        "sample prediction": with_settings(prediction_type="sample"),
        "a guided LCM's UNet": guided_lcm,
        "a refiner, `aesthetic_score`": refiner,
    },
    "bfloat16": {
        "bfloat16": with_bfloat16(),
        "bfloat16, `force_upcast=False`": with_bfloat16(force_upcast=False),
    },
    "many prompts and images, negative ones, guidance, rescale, embeddings, `clip_skip`": {
        "several prompts, each with a negative one": asking(
            prompt=PROMPTS, negative_prompt=["fog", "rain"], generator=lambda: seeded(1, 2)
        ),
        "`num_images_per_prompt`": asking(num_images_per_prompt=3),
        "`prompt_2`, `negative_prompt_2`": asking(
            prompt_2="in oil", negative_prompt="fog", negative_prompt_2="ink"
        ),
        "no guidance": asking(guidance_scale=1.0),
        "`guidance_rescale`": asking(guidance_rescale=0.6),
        "`prompt_embeds` and its like": embeddings,
        "`clip_skip`": clip_skip,
    },
    "`strength`, `latents`, size, `eta`, `timesteps`, `sigmas`": {
        "`strength`, a quarter": asking(strength=0.25),
        "`strength=1`": asking(strength=1.0),
        "`latents`": asking(latents=LATENTS),
        "`height`, `width`": asking(height=48, width=16),
        "`eta`": asking("DDIMScheduler", eta=0.7),
        "trailing timesteps": with_settings("DDIMScheduler", timestep_spacing="trailing"),
        "`timesteps`": asking("EulerDiscreteScheduler", timesteps=[901, 601, 301, 1]),
        "`sigmas`": asking("EulerDiscreteScheduler", sigmas=[14.6, 5.0, 1.0, 0.3, 0.0]),
    },
    "callbacks that change what is drawn, interruption": {
        "that change latents": with_callback(change_latents),
        "that change embeddings": with_callback(change_embeds),
        "that change guidance": with_callback(change_guidance),
        "that read the scheduler": with_callback(read_scheduler, "latents"),
        "that change the mask": with_callback(change_mask, "mask"),
        "that interrupt": with_callback(stop_early),
        "stock's own": cut_guidance,
    },
    "LoRA scale, IP-Adapters, FreeU, tiling, slicing, small autoencoders": {
        "LoRA scale": lora_scale,
        "IP-Adapter, a picture": image_prompts,
        "IP-Adapter, image embeddings": image_embeddings,
        "FreeU": freeu,
        "VAE tiling": with_switch("tiling"),
        "VAE slicing": with_switch("slicing"),
        "`AutoencoderTiny`": small_autoencoder,
    },
    "PIL, NumPy and torch, `padding_mask_crop`": {
        "as PIL, NumPy and torch": decoded,
        "`padding_mask_crop`": enlarged_part,
    },
    "SDXL's sizes, crops, `denoising_start`, `denoising_end`": {
        "`original_size`, `target_size`": asking(original_size=(512, 256), target_size=(40, 20)),
        "`crops_coords_top_left`": asking(crops_coords_top_left=(3, 5)),
        "`negative_original_size`, `negative_target_size`": asking(**SIZES),
        "`negative_crops_coords_top_left`": asking(**SIZES, negative_crops_coords_top_left=(9, 1)),
        "`denoising_end`": asking(denoising_end=0.5),
        "`denoising_start`": asking(denoising_start=0.4),
    },
    "`from_pipe`": {"both ways, no weight copied": from_pipe},
}
