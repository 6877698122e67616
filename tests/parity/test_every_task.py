"""What all tasks share, as stock has it: IP-Adapters, FreeU, tiles and slices, parts handed on.

task    one of the three; each has its stock class and its own inputs
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from safetensors.torch import save_file

from ldm_pipeline import LatentDiffusionPipeline, UserError, teach_auto_pipelines
from tests.conftest import tiny_unet
from tests.parity.pairs import (
    PROMPTS,
    Pair,
    assert_same,
    both,
    drawn_by_both,
    mask,
    picture,
    seeded,
)

STOCK: dict[str, Any] = {
    "text-to-image": StableDiffusionPipeline,
    "image-to-image": StableDiffusionImg2ImgPipeline,
    "inpainting": StableDiffusionInpaintPipeline,
    "inpainting, 9 channels": StableDiffusionInpaintPipeline,
}
INPUTS: dict[str, dict[str, Any]] = {
    "text-to-image": {},
    "image-to-image": {"image": picture(48, 48)},
    "inpainting": {"image": picture(), "mask_image": mask(), "height": 48, "width": 48},
    "inpainting, 9 channels": {"image": picture(), "mask_image": mask()},
}
every_task = pytest.mark.parametrize("task", STOCK)


def pair_for(task: str, parts: dict[str, Any]) -> Pair:
    if "9" in task:
        parts = {**parts, "unet": tiny_unet(in_channels=9)}
    return both(parts, STOCK[task])


def arguments(task: str) -> dict[str, Any]:
    return {
        "prompt": PROMPTS,
        "num_inference_steps": 3,
        "generator": lambda: seeded(1, 2),
        **INPUTS[task],
    }


# Pictures as prompts ------------------------------------------------------------------------------


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


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, components: dict[str, Any]) -> Path:
    """A folder of two IP-Adapters and their image encoder, as the hub has them."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    folder = tmp_path_factory.mktemp("adapters")
    (folder / "models").mkdir()
    for k in range(2):
        save_file(adapter_weights(components["unet"], k), folder / f"models/{k}.safetensors")
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
    return folder


@every_task
def test_an_ip_adapter(tiny: Callable[..., Any], task: str, adapters: Path) -> None:
    """Loaded by our loader, drawn with by both, from pictures and from their embeddings."""
    ours, _ = pair_for(task, tiny())
    plain = ours(**{**arguments(task), "generator": seeded(1, 2)}, output_type="latent").images
    ours.load_ip_adapter(adapters, "models", "0.safetensors")
    ours.set_ip_adapter_scale(0.7)
    pair = both(ours.components, STOCK[task])
    shown = picture(40, 30, seed=5)
    drawn = assert_same(pair, **arguments(task), ip_adapter_image=shown)
    assert not torch.equal(drawn, plain)
    embeds = ours.prepare_ip_adapter_image_embeds(shown, None, "cpu", 1, True)
    again = assert_same(pair, **arguments(task), ip_adapter_image_embeds=embeds)
    assert torch.equal(again, drawn)
    alone = {**arguments(task), "guidance_scale": 1.0}
    assert_same(pair, **alone, ip_adapter_image=shown)
    ours.unload_ip_adapter()
    after = ours(**{**arguments(task), "generator": seeded(1, 2)}, output_type="latent").images
    assert torch.equal(after, plain)


def test_two_adapters_and_an_interval(tiny: Callable[..., Any], adapters: Path) -> None:
    pair = pair_for("text-to-image", tiny())
    for pipe in pair:
        pipe.load_ip_adapter(str(adapters), "models", ["0.safetensors", "1.safetensors"])
        pipe.set_ip_adapter_scale([0.7, 0.3])
    several = [picture(seed=5), [picture(seed=6), picture(seed=7)]]
    drawn = assert_same(pair, **arguments("text-to-image"), ip_adapter_image=several)
    alone = {"ip_adapter_image": several, "guidance_scale": 1.0}
    unguided = assert_same(pair, **arguments("text-to-image"), **alone)
    assert not torch.equal(drawn, unguided)
    chosen = {**arguments("text-to-image"), "generator": seeded(1, 2), "output_type": "latent"}
    never = pair[0](**chosen, ip_adapter_image=several, guidance_interval=(0.9, 1.0)).images
    assert torch.equal(never, unguided), "outside the interval the prompted half stands alone"


@pytest.mark.parametrize("hidden", [False, True])
def test_what_is_read_of_a_picture(tiny: Callable[..., Any], adapters: Path, hidden: bool) -> None:
    pair = pair_for("text-to-image", tiny())
    said = []
    for pipe in pair:
        pipe.load_ip_adapter(str(adapters), "models", "0.safetensors")
        said.append(pipe.encode_image(picture(seed=5), "cpu", 2, hidden))
    for ours, theirs in zip(*said, strict=True):
        assert torch.equal(ours, theirs)


def test_pictures_as_prompts_that_cannot_be_meant(tiny: Callable[..., Any], adapters: Path) -> None:
    pipe: Any = pair_for("text-to-image", tiny())[0]
    with pytest.raises(UserError, match="no IP-Adapter is loaded"):
        pipe("a", ip_adapter_image=picture())
    with pytest.raises(UserError, match="a pickle can run any program"):
        pipe.load_ip_adapter(adapters, "models", "0.bin")
    (adapters / "pickled/image_encoder").mkdir(parents=True, exist_ok=True)
    config = (adapters / "models/image_encoder/config.json").read_text()
    (adapters / "pickled/image_encoder/config.json").write_text(config)
    (adapters / "pickled/image_encoder/pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(UserError, match=r"image encoder in .* cannot be loaded"):
        pipe.load_ip_adapter(adapters, "pickled", "0.safetensors")
    pipe.load_ip_adapter(adapters, "models", "0.safetensors")
    with pytest.raises(UserError, match="unload_ip_adapter"):
        pipe("a")
    with pytest.raises(UserError, match="2 entries for 1 IP-Adapters"):
        pipe("a", ip_adapter_image=[picture(), picture()])
    with pytest.raises(UserError, match="must be a list"):
        pipe("a", ip_adapter_image_embeds=torch.zeros(1, 1, 16))
    with pytest.raises(UserError, match=r"\(1, 16\)"):
        pipe("a", ip_adapter_image_embeds=[torch.zeros(1, 16)])


# Switches of the parts ----------------------------------------------------------------------------


@every_task
def test_freeu(tiny: Callable[..., Any], task: str) -> None:
    pair = pair_for(task, tiny())
    plain = assert_same(pair, **arguments(task))
    pair[0].enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)  # the UNet is one for both
    assert not torch.equal(assert_same(pair, **arguments(task)), plain)
    pair[0].disable_freeu()
    assert torch.equal(assert_same(pair, **arguments(task)), plain)


@every_task
@pytest.mark.parametrize("switch", ["tiling", "slicing"])
def test_tiles_and_slices(tiny: Callable[..., Any], task: str, switch: str) -> None:
    pair = pair_for(task, tiny())
    size = {} if "image" in INPUTS[task] else {"height": 48, "width": 48}
    chosen = {**arguments(task), **size, "output_type": "pt"}
    plain = drawn_by_both(pair, **chosen)[0]
    getattr(pair[0].vae, f"enable_{switch}")()
    ours, theirs = drawn_by_both(pair, **chosen)
    assert torch.equal(ours, theirs)
    if switch == "tiling" and ours.shape[-1] > 32:
        assert not torch.equal(ours, plain), "48 pixels are more than one tile of 32"


# Parts handed on ----------------------------------------------------------------------------------


@every_task
def test_from_pipe_both_ways(tiny: Callable[..., Any], task: str) -> None:
    """No weight is copied or changed, and what comes out draws what it came from draws."""
    stock = pair_for(task, tiny())[1].to(torch.bfloat16)
    ours = LatentDiffusionPipeline.from_pipe(stock)
    back = STOCK[task].from_pipe(ours, dtype=torch.bfloat16)
    for name, part in stock.components.items():
        if isinstance(part, torch.nn.Module):
            assert getattr(ours, name) is part
            assert getattr(back, name) is part
            assert part.dtype == torch.bfloat16
    drawn = assert_same((ours, stock), **arguments(task))
    assert torch.equal(assert_same((ours, back), **arguments(task)), drawn)


def test_from_pipe_takes_other_parts(tiny: Callable[..., Any]) -> None:
    ours = LatentDiffusionPipeline(**tiny())
    other = tiny_unet(in_channels=9)
    painting = LatentDiffusionPipeline.from_pipe(ours, unet=other)
    assert painting.unet is other
    assert painting.vae is ours.vae
    with pytest.raises(UserError, match="did you mean 'unet'"):
        LatentDiffusionPipeline.from_pipe(ours, umet=other)


def test_auto_pipelines_can_be_taught(tiny: Callable[..., Any]) -> None:
    from diffusers.pipelines import auto_pipeline

    ours = LatentDiffusionPipeline(**tiny())
    kinds = (AutoPipelineForText2Image, AutoPipelineForImage2Image, AutoPipelineForInpainting)
    with pytest.raises(ValueError, match="can't find a pipeline"):
        kinds[0].from_pipe(ours)
    before = [dict(each) for each in auto_pipeline.SUPPORTED_TASKS_MAPPINGS]
    try:
        teach_auto_pipelines()
        for kind in kinds:
            made = kind.from_pipe(ours)
            assert type(made) is LatentDiffusionPipeline
            assert made.unet is ours.unet
        stock = kinds[1].from_pipe(StableDiffusionPipeline.from_pipe(ours))
        assert type(stock) is StableDiffusionImg2ImgPipeline, "stock ones are as they were"
    finally:
        for each, old in zip(auto_pipeline.SUPPORTED_TASKS_MAPPINGS, before, strict=True):
            each.clear()
            each.update(old)
