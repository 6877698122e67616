"""Pictures as prompts, and parts handed on: what the table of parity does not say."""

from __future__ import annotations

import shutil
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
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)

from ldm_pipeline import (
    LatentDiffusionPipeline,
    LatentDiffusionXLPipeline,
    UserError,
    teach_auto_pipelines,
)
from tests.conftest import tiny_unet
from tests.parity.features import SHOWN, save_adapters
from tests.parity.pairs import PROMPTS, assert_same, both, picture, seeded

ASKED: dict[str, Any] = {"prompt": PROMPTS, "num_inference_steps": 3}
OWN: dict[str, Any] = {"generator": lambda: seeded(1, 2)}

# Pictures as prompts ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, components: dict[str, Any]) -> Path:
    """A folder of two IP-Adapters and their image encoder, as the hub has them."""
    folder = tmp_path_factory.mktemp("adapters")
    save_adapters(folder, components["unet"], 2)
    return folder


def test_an_adapter_comes_and_goes(tiny: Callable[..., Any], adapters: Path) -> None:
    ours = both(tiny())[0]

    def drawn(**more: Any) -> torch.Tensor:
        told = {**ASKED, "generator": seeded(1, 2), "output_type": "latent", **more}
        images: torch.Tensor = ours(**told).images
        return images

    plain = drawn()
    ours.load_ip_adapter(adapters, "models", "0.safetensors")
    assert not torch.equal(drawn(ip_adapter_image=SHOWN), plain)
    ours.unload_ip_adapter()
    assert torch.equal(drawn(), plain)


def test_two_adapters_and_an_interval(tiny: Callable[..., Any], adapters: Path) -> None:
    pair = both(tiny())
    for pipe in pair:
        pipe.load_ip_adapter(str(adapters), "models", ["0.safetensors", "1.safetensors"])
        pipe.set_ip_adapter_scale([0.7, 0.3])
    several = [picture(seed=5), [picture(seed=6), picture(seed=7)]]
    drawn = assert_same(pair, **ASKED, **OWN, ip_adapter_image=several)
    alone = {"ip_adapter_image": several, "guidance_scale": 1.0}
    unguided = assert_same(pair, **ASKED, **OWN, **alone)
    assert not torch.equal(drawn, unguided)
    chosen = {**ASKED, "generator": seeded(1, 2), "output_type": "latent"}
    never = pair[0](**chosen, ip_adapter_image=several, guidance_interval=(0.9, 1.0)).images
    assert torch.equal(never, unguided), "outside the interval the prompted half stands alone"


@pytest.mark.parametrize("hidden", [False, True])
def test_what_is_read_of_a_picture(tiny: Callable[..., Any], adapters: Path, hidden: bool) -> None:
    pair = both(tiny())
    said = []
    for pipe in pair:
        pipe.load_ip_adapter(str(adapters), "models", "0.safetensors")
        said.append(pipe.encode_image(picture(seed=5), "cpu", 2, hidden))
    for ours, theirs in zip(*said, strict=True):
        assert torch.equal(ours, theirs)


def test_pictures_as_prompts_that_cannot_be_meant(tiny: Callable[..., Any], adapters: Path) -> None:
    pipe = both(tiny())[0]
    with pytest.raises(UserError, match="no IP-Adapter is loaded"):
        pipe("a", ip_adapter_image=picture())
    with pytest.raises(UserError, match="a pickle can run any program"):
        pipe.load_ip_adapter(adapters, "models", "0.bin")
    (adapters / "pickled/image_encoder").mkdir(parents=True, exist_ok=True)
    config = (adapters / "models/image_encoder/config.json").read_text()
    (adapters / "pickled/image_encoder/config.json").write_text(config)
    (adapters / "pickled/image_encoder/pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(UserError, match="holds only pickled weights"):
        pipe.load_ip_adapter(adapters, "pickled", "0.safetensors")
    linked = adapters / "linked"
    shutil.copytree(adapters / "models", linked)
    (linked / "image_encoder/config.json").unlink()
    (linked / "image_encoder/config.json").symlink_to("../../../secret.json")
    (adapters.parent / "secret.json").write_text(config)
    with pytest.raises(UserError, match="a link that leads out"):
        pipe.load_ip_adapter(adapters, "linked", "0.safetensors")
    (linked / "image_encoder/config.json").unlink()
    (linked / "image_encoder/config.json").symlink_to("../../models/image_encoder/config.json")
    pipe.load_ip_adapter(adapters, "linked", "0.safetensors")
    pipe.unload_ip_adapter()
    pipe.register_modules(image_encoder=None)
    pipe.load_ip_adapter(adapters, "models", "0.safetensors")
    with pytest.raises(UserError, match="unload_ip_adapter"):
        pipe("a")
    with pytest.raises(UserError, match="2 entries for 1 IP-Adapters"):
        pipe("a", ip_adapter_image=[picture(), picture()])
    with pytest.raises(UserError, match="must be a list"):
        pipe("a", ip_adapter_image_embeds=torch.zeros(1, 1, 16))
    with pytest.raises(UserError, match=r"\(1, 16\)"):
        pipe("a", ip_adapter_image_embeds=[torch.zeros(1, 16)])


# Parts handed on ----------------------------------------------------------------------------------


def test_from_pipe_takes_other_parts(tiny: Callable[..., Any]) -> None:
    ours = LatentDiffusionPipeline(**tiny())
    other = tiny_unet(in_channels=9)
    painting = LatentDiffusionPipeline.from_pipe(ours, unet=other)
    assert painting.unet is other
    assert painting.vae is ours.vae
    with pytest.raises(UserError, match="did you mean 'unet'"):
        LatentDiffusionPipeline.from_pipe(ours, umet=other)


def test_auto_pipelines_can_be_taught(
    tiny: Callable[..., Any], tiny_xl: Callable[..., Any]
) -> None:
    from diffusers.pipelines import auto_pipeline

    ours = LatentDiffusionPipeline(**tiny())
    large = LatentDiffusionXLPipeline(**tiny_xl(), force_zeros_for_empty_prompt=False)
    kinds = (AutoPipelineForText2Image, AutoPipelineForImage2Image, AutoPipelineForInpainting)
    for pipe in (ours, large):
        with pytest.raises(ValueError, match="can't find a pipeline"):
            kinds[0].from_pipe(pipe)
    before = [dict(each) for each in auto_pipeline.SUPPORTED_TASKS_MAPPINGS]
    try:
        teach_auto_pipelines()
        for kind in kinds:
            for pipe in (ours, large):
                made = kind.from_pipe(pipe)
                assert type(made) is type(pipe)
                assert made.unet is pipe.unet
            assert made.config.force_zeros_for_empty_prompt is False
        for stock, redraws in (
            (StableDiffusionPipeline.from_pipe(ours), StableDiffusionImg2ImgPipeline),
            (StableDiffusionXLPipeline.from_pipe(large), StableDiffusionXLImg2ImgPipeline),
        ):
            assert type(kinds[1].from_pipe(stock)) is redraws, "stock ones are as they were"
    finally:
        for each, old in zip(auto_pipeline.SUPPORTED_TASKS_MAPPINGS, before, strict=True):
            each.clear()
            each.update(old)
