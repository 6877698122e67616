"""Single files in the original layout: names as stock's, round trips exact, no network."""

from __future__ import annotations

import base64
import gzip
import json
import shutil
import socket
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from diffusers.loaders import single_file_utils as stock
from safetensors.torch import load_file, save_file

import ldm_pipeline
from ldm_pipeline import LatentDiffusionPipeline
from ldm_pipeline.cli import main
from ldm_pipeline.errors import UserError
from ldm_pipeline.models import bundled
from ldm_pipeline.models.original import note, tokenizers
from ldm_pipeline.models.original.checkpoint import open_single_file
from ldm_pipeline.models.original.configs import unet_config
from ldm_pipeline.models.original.convert import SURPLUS, to_file, to_folder
from ldm_pipeline.models.original.families import SD1
from tests.models.original.models import KINDS, pipeline, plain
from tests.parity.pairs import mask, picture

Made = dict[str, tuple[Any, Path, Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """For each kind a stock pipeline, its folder, and the file that was made of that."""
    found: Made = {}
    for kind in KINDS:
        place = tmp_path_factory.mktemp(kind)
        pipe = pipeline(kind)
        pipe.set_progress_bar_config(disable=True)
        pipe.save_pretrained(place / "folder")
        to_file(place / "folder", place / "model.safetensors")
        found[kind] = pipe, place / "folder", place / "model.safetensors"
    return found


@pytest.fixture
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every socket is closed."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize(
    ("kind", "key", "said"),
    [
        ("sdxl", "edm_mean", "EDM's, as of Playground v2.5"),
        ("sdxl", "edm_vpred.sigma_max", "EDM's, as of CosXL"),
        (
            "sd2",
            "model.diffusion_model.label_emb.0.0.weight",
            "Stable Diffusion 2.x's text encoder",
        ),
        ("sdxl", "", "a UNet that does not hear sizes"),
    ],
)
def test_relatives_with_a_family_s_tensors_are_refused(
    kind: str, key: str, said: str, made: Made, tmp_path: Path
) -> None:
    """They would draw another picture, without a word."""
    tensors = load_file(made[kind][2])
    if key:
        tensors[key] = torch.zeros(4)
    else:
        tensors = {name: value for name, value in tensors.items() if "label_emb" not in name}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=said):
        ldm_pipeline.load(tmp_path / "a.safetensors")
    assert main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("_no_network")
def test_a_folder_of_configs_tells_the_scheduler_and_the_words(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with stock, whose way to do without the hub it is."""
    pipe, folder, file = made["sd1"]
    bare = plain(Path(shutil.copy(file, tmp_path / "bare.safetensors")))
    monkeypatch.setattr(tokenizers, "_places", lambda file: iter(()))
    monkeypatch.setattr(tokenizers, "_of_open_clip", lambda: None)
    config = tmp_path / "config"
    for part in ("tokenizer", "scheduler"):
        shutil.copytree(folder / part, config / part)
    told = config / "scheduler/scheduler_config.json"
    contents = {**json.loads(told.read_text()), "prediction_type": "v_prediction"}
    told.write_text(json.dumps(contents))
    opened = LatentDiffusionPipeline.from_single_file(bare, config=str(config))
    assert opened.scheduler.config.prediction_type == "v_prediction"
    assert type(opened.scheduler) is type(pipe.scheduler)
    same = type(pipe.scheduler).from_config(contents)
    stock_pipe = DiffusionPipeline.from_pretrained(folder, scheduler=same)
    assert torch.equal(drawn(opened), drawn(stock_pipe))
    shutil.rmtree(config / "tokenizer")
    alone = LatentDiffusionPipeline.from_single_file(
        bare, config=config, tokenizer=pipe.tokenizer, scheduler=pipe.scheduler
    )
    assert alone.scheduler.config.prediction_type == "epsilon", "what is passed comes first"
    told.write_text(json.dumps({**contents, "_class_name": "os.system"}))
    with pytest.raises(UserError, match=r"os\.system"):
        LatentDiffusionPipeline.from_single_file(bare, config=config)


def drawn(pipe: Any) -> torch.Tensor:
    """Two steps from words or, where the UNet needs one, out of a picture or into it."""
    pipe.set_progress_bar_config(disable=True)
    for weight in pipe.unet.parameters():  # a file's lie at odd addresses, and round otherwise
        weight.data = weight.data.clone()
    told: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    told["generator"] = torch.Generator().manual_seed(3)
    if pipe.unet.config.in_channels == 9:
        told |= {"image": picture(32, 32), "mask_image": mask(32, 32)}
    if isinstance(pipe, StableDiffusionXLImg2ImgPipeline) or pipe.config.get(
        "requires_aesthetics_score"
    ):
        told |= {"image": picture(32, 32), "strength": 1.0}
    else:
        told |= {"height": 32, "width": 32}
    images: torch.Tensor = pipe("a red star", **told).images
    return images


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


# -- the names -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_stock_reads_the_same_tensors_out_of_our_file(made: Made, kind: str) -> None:
    pipe, _, file = made[kind]
    there = load_file(file)
    unet = stock.convert_ldm_unet_checkpoint(dict(there), pipe.unet.config)
    if kind == "sd1-lcm":  # stock knows no place for it
        guided = "time_embedding.cond_proj.weight"
        unet[guided] = pipe.unet.state_dict()[guided]
    assert same(unet, pipe.unet.state_dict())
    vae = stock.convert_ldm_vae_checkpoint(dict(there), pipe.vae.config)
    assert same(vae, pipe.vae.state_dict())
    places = {"sd2": "cond_stage_model.model.", "refiner": "conditioner.embedders.0.model."}
    places |= dict.fromkeys(("sdxl", "sdxl-inpaint"), "conditioner.embedders.1.model.")
    if (prefix := places.get(kind)) is not None:
        name = "text_encoder" if kind == "sd2" else "text_encoder_2"
        encoder = getattr(pipe, name)
        found = stock.convert_open_clip_checkpoint(encoder, dict(there), prefix=prefix)
        assert same(_bodied(found), _bodied(encoder.state_dict()))
    if kind not in ("sd2", "refiner"):
        found = stock.convert_ldm_clip_checkpoint(dict(there))
        assert same(_bodied(found), _bodied(pipe.text_encoder.state_dict()))


def _bodied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix("text_model."): value for key, value in state.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_family_is_told_from_the_keys(made: Made, kind: str) -> None:
    """At any size; stock looks for tensors that only models of the real size have."""
    names = {"sd1": "1.x", "sd2": "2.x", "sdxl": "XL", "refiner": "refiner"}
    told = open_single_file(made[kind][2]).family.name
    assert told.endswith(names[kind.partition("-")[0]])


# -- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_folder_to_file_to_folder(made: Made, kind: str, tmp_path: Path) -> None:
    """The same files, byte for byte, and a file that is the same whenever it is written."""
    _, folder, file = made[kind]
    assert to_folder(open_single_file(file), tmp_path / "again") == 0
    before, after = contents(folder), contents(tmp_path / "again")
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == []
    to_file(tmp_path / "again", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_file_to_folder_to_file(made: Made, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """With what others write besides: a schedule, averaged weights, a logit scale."""
    _, folder, file = made[kind]
    tensors = {key: value.to(dtype) for key, value in load_file(file).items()}
    tensors |= {
        "betas": torch.rand(1000, dtype=torch.float64),
        "model_ema.decay": torch.tensor(0.99),
        "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
        "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6),
        "logit_scale": torch.tensor(4.6),
    }
    if kind == "sd2":  # the layer that nobody reads, and what comes after it
        for key in [key for key in tensors if ".resblocks.1." in key]:
            tensors[key.replace(".resblocks.1.", ".resblocks.2.")] = tensors[key] + 1
        tensors["cond_stage_model.model.text_projection"] = torch.rand(64, 64)
    other = tmp_path / "other.safetensors"
    save_file(tensors, other, metadata={"modelspec.title": "Another", "format": "pt"})
    checkpoint = open_single_file(other, tokenizer=folder)
    surplus = to_folder(checkpoint, tmp_path / "folder")
    assert surplus == len(load_file(tmp_path / "folder" / SURPLUS)) >= 4
    to_file(tmp_path / "folder", tmp_path / "back.safetensors")
    assert same(load_file(tmp_path / "back.safetensors"), tensors)
    assert open_single_file(tmp_path / "back.safetensors").files == checkpoint.files


# -- loading -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_no_network")
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_draws_what_its_folder_draws(made: Made, kind: str, tmp_path: Path) -> None:
    """With the note, and without it as others write files: from shapes alone."""
    pipe, folder, file = made[kind]
    expected = drawn(ldm_pipeline.load(folder))
    if "inpaint" not in kind:  # stock has another class for it
        assert torch.equal(expected, drawn(pipe))
    loaded = ldm_pipeline.load(file)
    assert type(loaded) is type(ldm_pipeline.load(folder))
    assert torch.equal(drawn(loaded), expected)
    bare = ldm_pipeline.load(plain(file), tokenizer=folder)
    bare.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    assert torch.equal(drawn(bare), expected)
    assert bare.scheduler.config.prediction_type == pipe.scheduler.config.prediction_type
    half = ldm_pipeline.load(file, dtype=torch.float16)
    assert {part.dtype for part in half.components.values() if hasattr(part, "dtype")} == {
        torch.float16
    }
    half.save_pretrained(tmp_path)
    opened = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(opened).__name__.replace("Inpaint", "") == type(pipe).__name__


def test_an_inpainting_file_says_so(made: Made, tmp_path: Path) -> None:
    _, folder, file = made["sd1-inpaint"]
    to_folder(open_single_file(plain(file), tokenizer=folder), tmp_path / "folder")
    index = json.loads((tmp_path / "folder" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionInpaintPipeline"
    stocks = DiffusionPipeline.from_pretrained(tmp_path / "folder")
    assert type(stocks) is StableDiffusionInpaintPipeline
    loaded = ldm_pipeline.load(file)
    assert loaded.unet.config.in_channels == 9
    assert json.loads(loaded.to_json_string())["_class_name"] == index["_class_name"]


def test_what_a_unet_predicts(made: Made, tmp_path: Path, caplog: Any) -> None:
    _, folder, file = made["sd2"]
    bare = plain(file)
    told: dict[str, Any] = {"tokenizer": folder}

    def predicts(file: Path, **asked: Any) -> str:
        checkpoint = open_single_file(file, **told, **asked)
        found: str = checkpoint.config("scheduler")["prediction_type"]
        return found

    assert predicts(bare) == "v_prediction"
    assert "does not say what its UNet predicts" in caplog.text
    assert predicts(bare, prediction_type="epsilon") == "epsilon"
    assert predicts(file, prediction_type="epsilon") == "epsilon"
    save_file(load_file(file), bare, metadata={"modelspec.prediction_type": "epsilon"})
    assert predicts(bare) == "epsilon"
    painting, first = load_file(file), "model.diffusion_model.input_blocks.0.0.weight"
    painting[first] = torch.ones(len(painting[first]), 9, 3, 3)
    save_file(painting, bare)
    caplog.clear()
    assert predicts(bare) == "epsilon", "as SD 2's own model for inpainting, which says nothing"
    assert predicts(bare, prediction_type="v_prediction") == "v_prediction"
    assert not caplog.records
    _, folder, file = made["sdxl"]
    told["tokenizer"] = folder
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(load_file(file) | marks, bare)
    assert predicts(bare) == "v_prediction"
    scheduler = open_single_file(bare, **told).config("scheduler")
    assert scheduler["rescale_betas_zero_snr"]
    with pytest.raises(UserError, match="choose one of epsilon, v_prediction"):
        ldm_pipeline.load(file, prediction_type="v")


def test_components_may_be_brought(made: Made) -> None:
    pipe, folder, file = made["sd1"]
    tensors = {k: v for k, v in load_file(file).items() if not k.startswith("first_stage")}
    bare = file.with_stem("no-vae")
    save_file(tensors, bare)
    with pytest.raises(UserError, match=r"holds no vae; take .* or give from_single_file vae="):
        ldm_pipeline.load(bare, tokenizer=folder)
    brought = ldm_pipeline.LatentDiffusionPipeline.from_single_file(
        bare, vae=pipe.vae, tokenizer=pipe.tokenizer
    )
    assert brought.vae is pipe.vae
    words = "cond_stage_model.transformer.text_model.embeddings."
    for gone, named in (
        ("first_stage_model.decoder.conv_out.weight", "vae"),
        (f"{words}token_embedding.weight", "text_encoder"),
    ):
        save_file({k: v for k, v in load_file(file).items() if k != gone}, bare)
        with pytest.raises(UserError, match=f"holds no whole {named} .* from_single_file {named}="):
            ldm_pipeline.load(bare, tokenizer=folder)
        part = {named: getattr(pipe, named)}
        again = ldm_pipeline.LatentDiffusionPipeline.from_single_file(
            bare, tokenizer=pipe.tokenizer, **part
        )
        assert getattr(again, named) is part[named]
    with pytest.raises(UserError, match="text_encoder that was passed; pass tokenizer="):
        ldm_pipeline.LatentDiffusionPipeline.from_single_file(bare, text_encoder=pipe.text_encoder)
    with pytest.raises(UserError, match="has no text_encoder_2"):
        ldm_pipeline.LatentDiffusionPipeline.from_single_file(bare, text_encoder_2=pipe.vae)
    with pytest.raises(UserError, match=r"holds Stable Diffusion 1\.x, which .*XLPipeline cannot"):
        ldm_pipeline.LatentDiffusionXLPipeline.from_single_file(file)


@pytest.mark.usefixtures("_no_network")
def test_the_vocabulary_is_looked_for_on_this_machine(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder, file = made["sd1"]
    bare = plain(file)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"needs CLIP's tokenizer .*--tokenizer FOLDER"):
        ldm_pipeline.load(bare)
    with pytest.raises(UserError, match="holds no tokenizer of"):
        ldm_pipeline.load(bare, tokenizer=tmp_path)
    snapshot = tmp_path / "models--openai--clip-vit-large-patch14" / "snapshots" / "a"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").write_bytes((folder / "tokenizer/tokenizer.json").read_bytes())
    assert len(ldm_pipeline.load(bare).tokenizer) == len(made["sd1"][0].tokenizer)


def test_the_letters_of_clip() -> None:
    """256 bytes, a letter for each, as transformers' own byte-level alphabet has them."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = tokenizers._letters()
    assert len(letters) == 256
    assert set(letters) == set(ByteLevel.alphabet())


def test_the_vocabulary_that_open_clip_brings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file is read, and none of its code: the package here would end the tests."""
    from transformers import CLIPTokenizer

    package = tmp_path / "open_clip"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit")
    with gzip.open(package / tokenizers._OPEN_CLIP, "wt", encoding="utf-8") as lines:
        lines.write("version\nr e\nre d</w>\nx y\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(tokenizers, "_MERGES", 2)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    files = tokenizers.vocabulary(tmp_path / "a.safetensors", 2 * 256 + 2 + 2, None)
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    read = CLIPTokenizer.from_pretrained(tmp_path, pad_token="!")
    assert read.convert_ids_to_tokens(read("red e").input_ids) == [
        "<|startoftext|>", "red</w>", "e</w>", "<|endoftext|>",
    ]  # fmt: skip


def test_real_sizes_give_the_known_config() -> None:
    """Stable Diffusion 1.5 and SDXL as their makers describe them; the shapes alone are built."""
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel

    from ldm_pipeline.models.original.families import SDXL
    from ldm_pipeline.models.original.tensors import Stored
    from ldm_pipeline.models.original.unet import unet_names

    sd15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
    sdxl: dict[str, Any] = {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    for family, told in ((SD1, sd15), (SDXL, sdxl)):
        with init_empty_weights():
            unet = UNet2DConditionModel(**told)
        here = {k: Stored("F16", tuple(v.shape), ()) for k, v in unet.state_dict().items()}
        there = unet_names(unet.config).to_original(here)
        found = unet_config({k: t.shape for k, t in there.items()}, family, "epsilon")
        for key, value in found.items():
            known = unet.config.get(key)
            known = list(known) if isinstance(known, tuple) else known
            assert value == known or key == "_class_name", key
    assert "middle_block.1.transformer_blocks.9.attn2.to_k.weight" in there
    assert "output_blocks.2.2.conv.weight" in there


# -- the command, and refusals -------------------------------------------------------------------


def test_the_bundled_model_converts_under_its_name(tmp_path: Path) -> None:
    """To one file and back: every file of its pipeline, byte for byte."""
    file, again = tmp_path / "bundled.safetensors", tmp_path / "again"
    assert main(["convert", "bundled", str(file)]) == 0
    assert main(["convert", str(file), str(again)]) == 0
    written = [path for path in again.rglob("*") if path.is_file()]
    assert len(written) > 8
    for path in written:
        own = bundled.folder() / path.relative_to(again)
        assert path.read_bytes() == own.read_bytes(), path


def test_the_command_converts_both_ways(made: Made, tmp_path: Path, capsys: Any) -> None:
    _, folder, _ = made["sd1"]
    file, again = tmp_path / "a.safetensors", tmp_path / "b"
    assert main(["convert", str(folder), str(file)]) == 0
    assert main(["convert", str(file), str(again)]) == 0
    assert contents(again) == contents(folder)
    assert capsys.readouterr().out.split() == [str(file), str(again)]
    for wrong, message in (
        ([str(folder), str(file)], "is there already"),
        ([str(folder), str(tmp_path / "c.ckpt")], "must end in .safetensors"),
        ([str(tmp_path / "none"), str(tmp_path / "d")], "there is no"),
        ([str(folder), str(tmp_path / "no" / "c.safetensors")], "there is no folder"),
    ):
        assert main(["convert", *wrong]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_the_command_draws_with_a_file(made: Made, kind: str, tmp_path: Path) -> None:
    _, _, file = made[kind]
    out = tmp_path / "a.png"
    told = ["a red star", "--model", str(file), "--steps", "1", "--quiet", "-o", str(out)]
    assert main(["generate", *told, "--height", "32", "--width", "32"]) == 0
    assert out.stat().st_size > 0


def test_networks_without_a_place_there_are_refused(tmp_path: Path) -> None:
    from tests.conftest import tiny_small_vae, tiny_unet

    other = pipeline("sd1")
    other.unet = tiny_unet(class_embed_type="timestep")
    small = pipeline("sd1")
    small.vae = tiny_small_vae()
    for pipe, message in (
        (other, r"no place for, class_embedding\."),
        (small, "vae is an AutoencoderTiny, which the original layout has no place for"),
    ):
        pipe.save_pretrained(tmp_path / "model")
        with pytest.raises(UserError, match=message):
            to_file(tmp_path / "model", tmp_path / "model.safetensors")
        assert not (tmp_path / "model.safetensors").exists()


def test_what_is_no_model_is_refused_in_one_line(made: Made, tmp_path: Path) -> None:
    _, folder, file = made["sd1"]
    whole = load_file(file)
    cases: list[tuple[dict[str, torch.Tensor], str]] = [
        ({"a": torch.ones(1)}, "holds no model in the original layout"),
        ({"lora_unet_x.lora_up.weight": torch.ones(1)}, "holds a LoRA"),
        ({"double_blocks.0.x": torch.ones(1)}, "a FLUX model"),
        ({k: v for k, v in whole.items() if k.startswith("model.")}, "without its text encoders"),
        ({k: v for k, v in whole.items() if "middle_block.2" not in k}, "tensors of its unet are"),
        ({k: v for k, v in whole.items() if not k.endswith("out.2.weight")}, "no whole unet"),
    ]
    bad = tmp_path / "bad.safetensors"
    for tensors, message in cases:
        save_file(tensors, bad)
        with pytest.raises(UserError, match=message) as refusal:
            ldm_pipeline.load(bad, tokenizer=folder)
        assert "\n" not in str(refusal.value)


def packed(files: dict[str, Any]) -> str:
    raw = json.dumps({"files": files, "bare": []}).encode()
    return base64.b64encode(zlib.compress(raw)).decode()


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (lambda files: "no note", "none that ldm writes"),
        (lambda files: packed({"../evil.json": "{}"}), "names a file"),
        (lambda files: packed({**files, "unet/evil.py": "x"}), "names a file"),
        (lambda files: packed({}), r"no usable model_index\.json"),
        (lambda files: packed({**files, "unet/config.json": "["}), r"no usable unet/config"),
        (lambda files: packed({**files, "unet/config.json": '{"auto_map": 1}'}), "auto_map"),
        (
            lambda files: packed(
                {**files, "scheduler/scheduler_config.json": '{"_class_name": 1}'}
            ),
            "names the scheduler 1",
        ),
        (
            lambda files: packed(
                {**files, "tokenizer/tokenizer_config.json": '{"vocab_file": "/etc/passwd"}'}
            ),
            "names vocab_file",
        ),
        (
            lambda files: base64.b64encode(zlib.compress(b" " * (note.LARGEST + 1))).decode(),
            "too long",
        ),
    ],
)
def test_a_forged_note_is_refused(
    made: Made, forge: Callable[[Any], str], message: str, tmp_path: Path
) -> None:
    _, _, file = made["sd1"]
    files = dict(open_single_file(file).files)
    bad = tmp_path / "bad.safetensors"
    save_file(load_file(file), bad, metadata={note.KEY: forge(files)})
    with pytest.raises(UserError, match=message) as refusal:
        ldm_pipeline.load(bad)
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.parent.glob("evil*"))
