"""Laws of the layouts: what other tools read of them, and what only some of them can say."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_kohya
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.attach import attach, base_of
from ldm_pipeline.lora.deltas import completed, delta
from ldm_pipeline.lora.files import LAYOUTS, inspect, load, save
from ldm_pipeline.lora.fitting import fit, modules_of
from ldm_pipeline.lora.layouts.families import FAMILIES, family_of
from ldm_pipeline.lora.layouts.kohya import spelled
from ldm_pipeline.lora.layouts.names import dotted, flat
from ldm_pipeline.lora.layouts.sgm_names import from_sgm, to_sgm
from ldm_pipeline.lora.targets import Layout, Slot
from ldm_pipeline.lora.weights import COLUMNS, LORA_A, LORA_B, MAGNITUDE, LoraWeights
from tests.lora.tiny_families import PIPELINES, lora, networks, picture

FEW = ("mid_block", "downsamplers", "upsamplers", "down_blocks.1", "layers.1")
"""Some of everything: PEFT's layers cost milliseconds each."""

CLOSE = 1e-6
"""Between pictures: kohya's layout moves alphas into B, in float32."""


@pytest.fixture(params=PIPELINES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# Names ------------------------------------------------------------------------------------------


def test_every_module_s_name_comes_back_from_underscores(family: str) -> None:
    for component, modules in modules_of(networks(PIPELINES[family]())).items():
        for name in modules:
            assert dotted(flat(name)) == name
            assert dotted(flat(f"text_model.{name}")) == f"text_model.{name}"
            if family == "sdxl" and component == "unet":
                assert from_sgm(dotted(flat(to_sgm(name)))) == name
        assert len({flat(name) for name in modules}) == len(modules)


def test_sgm_names_are_those_that_stock_diffusers_maps_back() -> None:
    pipe = PIPELINES["sdxl"]()
    weights = lora(pipe)
    state = {k: t.clone() for k, t in spelled(weights, FAMILIES["sdxl"]).items()}
    assert any("input_blocks_4_1_transformer_blocks_0_attn1_to_q" in key for key in state)
    found, alphas = StableDiffusionXLPipeline.lora_state_dict(state, unet_config=pipe.unet.config)
    downs = [key for key in found if ".down.weight" in key]
    assert len(downs) == len(alphas) == len(list(weights.modules()))


@pytest.mark.parametrize("name", ["down_blocks.0.resnets.2.conv1", "up_blocks.0.nowhere", "x"])
def test_what_sdxl_has_not_has_no_sgm_name(name: str) -> None:
    with pytest.raises(UserError, match="no place in SDXL"):
        to_sgm(name)


# Other tools ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys")
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_stock_diffusers_draws_the_same_picture(family: str, layout: str, tmp_path: Path) -> None:
    """Kohya's through its own converter; text_projection it gives the rank of another module."""
    trained, stock = PIPELINES[family](), PIPELINES[family]()
    plain = picture(stock)
    weights = lora(trained, only=FEW, size=0.1)
    attach(trained, [(save(tmp_path / "own", weights), 1.0)])
    file = save(tmp_path / "a.safetensors", weights, layout=layout, family=FAMILIES[family])
    stock.load_lora_weights(file)
    drawn = picture(trained)
    assert (picture(stock) - drawn).abs().max() <= CLOSE
    assert (drawn - plain).abs().max() > 1e-4


def test_stock_peft_loads_our_folders(family: str, tmp_path: Path) -> None:
    pipe = PIPELINES[family]()
    models = networks(pipe)
    weights = lora(pipe, only=FEW, rslora=True)
    place = save(tmp_path, weights, layout="peft")
    for component, model in models.items():
        base = base_of({component: model})
        before = {}
        for name in weights.layouts[component].slots:
            w = base(component, name)
            assert w is not None
            before[name] = w.clone()
        loaded = PeftModel.from_pretrained(model, place / component).merge_and_unload()
        after = base_of({component: loaded})
        for name, w in before.items():
            changed = after(component, name)
            assert changed is not None
            wanted = w + delta(weights, component, name, w)
            assert torch.allclose(changed, wanted, atol=1e-6), name


def test_what_stock_diffusers_writes_for_other_tools_is_read(family: str, tmp_path: Path) -> None:
    """It has `lora_te1` whatever the family, and diffusers' names for SDXL's blocks."""
    weights = lora(PIPELINES[family](), every=3)
    layouts = {
        c: replace(own, slots={n: Slot(s.rank, s.rank) for n, s in own.slots.items()})
        for c, own in weights.layouts.items()
    }
    weights = LoraWeights(weights.tensors, layouts)
    file = tmp_path / "a.safetensors"
    save_file(convert_state_dict_to_kohya(dict(weights.tensors)), file)
    found = load(file)
    assert found.layouts == weights.layouts
    assert all(torch.equal(found.tensors[key], t) for key, t in weights.tensors.items())
    told = family_of(inspect(file).shapes, {})
    assert told is (FAMILIES["sdxl"] if family == "sdxl" else FAMILIES["sd1"]) or family == "sd2"


READ = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
TOLD: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, str]]] = {
    "sd1": ({f"unet.{READ}.lora_A.weight": (4, 768)}, {}),
    "sd2": ({f"lora_unet_{flat(READ)}.lora_down.weight": (4, 1024)}, {}),
    "sdxl": ({f"lora_unet_{flat(READ)}.hada_w1_b": (4, 2048)}, {}),
    "sd2-v": ({}, {"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}),
}


@pytest.mark.parametrize("name", TOLD)
def test_a_family_is_told_by_its_width_of_text_or_its_header(name: str) -> None:
    assert family_of(*TOLD[name]) is FAMILIES[name]
    version = {"ss_base_model_version": FAMILIES[name].version}
    assert family_of({}, version) is FAMILIES[name]
    assert family_of({}, {}) is None


def test_kohya_s_header_is_what_its_tools_ask_for(family: str, tmp_path: Path) -> None:
    weights = lora(PIPELINES[family](), every=5)
    own = FAMILIES[family]
    file = save(tmp_path / "a.safetensors", weights, {"ss_seed": "3"}, "kohya", own)
    contents = file.read_bytes()
    (length,) = struct.unpack("<Q", contents[:8])
    with safe_open(file, "pt") as opened:
        texts = opened.metadata()
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (it is no mapping)
    digest = hashlib.sha256(contents[8 + length :]).hexdigest()
    assert texts["sshs_model_hash"] == digest
    assert texts["modelspec.hash_sha256"] == f"0x{digest}"
    assert len(texts["sshs_legacy_hash"]) == 8
    assert texts["ss_base_model_version"] == own.version
    assert texts["ss_network_module"] == "networks.lora"
    assert json.loads(texts["ss_network_args"])["conv_dim"] == texts["ss_network_dim"]
    assert texts["modelspec.architecture"] == f"{own.architecture}/lora"
    assert {"modelspec.title", "modelspec.resolution", "modelspec.sai_model_spec"} <= texts.keys()
    assert texts["ss_seed"] == "3"
    modules = {key.partition(".")[0] for key in tensors}
    assert all(tensors[f"{module}.alpha"].shape == () for module in modules)
    prefixes = {"_".join(module.split("_")[:2]) for module in modules}
    assert prefixes == set(own.prefixes.values())
    assert (
        save(tmp_path / "b.safetensors", weights, {"ss_seed": "3"}, "kohya", own).read_bytes()
        == contents
    )
    assert family_of(inspect(file).shapes, inspect(file).texts) is own


def test_one_alpha_keeps_every_tensor_to_the_last_bit(tmp_path: Path) -> None:
    """Also in half precision: only alphas that stock diffusers would lose touch B."""
    weights = lora(PIPELINES["sd1"](), every=4)
    layouts = {
        c: replace(own, slots={n: Slot(s.rank, 4.0) for n, s in own.slots.items()})
        for c, own in weights.layouts.items()
    }
    halves = {key: tensor.half() for key, tensor in weights.tensors.items()}
    weights = LoraWeights(halves, layouts)
    file = save(tmp_path / "a.safetensors", weights, layout="kohya", family=FAMILIES["sd1"])
    again = load(file)
    assert again.layouts == weights.layouts
    assert all(
        torch.equal(again.tensors[key], t) and t.dtype == torch.half for key, t in halves.items()
    )


def test_without_an_alpha_it_is_the_rank(tmp_path: Path) -> None:
    file = save(
        tmp_path / "a.safetensors",
        lora(PIPELINES["sd1"](), every=9),
        None,
        "kohya",
        FAMILIES["sd1"],
    )
    save_file({k: t for k, t in load_file(file).items() if not k.endswith("alpha")}, file)
    assert all(
        s.alpha == s.rank for layout in load(file).layouts.values() for s in layout.slots.values()
    )


# What only some can say -------------------------------------------------------------------------


def one_module(name: str, parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Kohya's keys of one UNet module."""
    return {f"lora_unet_{flat(name)}.{part}": tensor for part, tensor in parts.items()}


@pytest.mark.parametrize("name", ["mid_block.attentions.0.proj_in", "mid_block.resnets.0.conv1"])
def test_dora_by_columns_is_settled_beside_its_base(name: str, tmp_path: Path) -> None:
    """LyCORIS' other DoRA: W + D with each column as long as its magnitude says."""
    pipe = PIPELINES["sd1"]()
    base = base_of(networks(pipe))
    w = base("unet", name)
    assert w is not None
    out, into, *kernel = w.shape
    down, up = 0.1 * torch.randn(2, into, *kernel), 0.1 * torch.randn(out, 2, 1, 1)
    m = 1 + torch.rand(1, into, 1, 1)
    parts = {
        "lora_down.weight": down,
        "lora_up.weight": up,
        "alpha": torch.tensor(1.0),
        "dora_scale": m,
    }
    file = tmp_path / "a.safetensors"
    save_file(one_module(name, parts), file)
    weights = load(file)
    d = w + 0.5 * torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down)
    wanted = m * d / d.pow(2).sum((0, 2, 3), keepdim=True).sqrt()
    whole = completed(weights, base)
    assert fit(whole, networks(pipe))
    assert torch.allclose(w + delta(whole, "unet", name, w), wanted, atol=1e-6)
    again = load(save(tmp_path / "b.safetensors", weights, layout="kohya", family=FAMILIES["sd1"]))
    assert torch.equal(again.tensors[f"unet.{name}.{COLUMNS}"], m)
    for layout in ("diffusers", "peft"):
        with pytest.raises(UserError, match=r"DoRA by columns .* --model"):
            save(tmp_path / layout, weights, layout=layout)


def test_dora_in_some_modules_is_settled_beside_its_base(tmp_path: Path) -> None:
    pipe = PIPELINES["sd1"]()
    base = base_of(networks(pipe))
    weights = lora(pipe, every=6, dora=True)
    bare = [key for key in weights.tensors if key.endswith(MAGNITUDE)][::2]
    mixed = replace(weights, tensors={k: t for k, t in weights.tensors.items() if k not in bare})
    file = save(tmp_path / "a.safetensors", mixed, layout="kohya", family=FAMILIES["sd1"])
    read = load(file)
    assert sum(len(layout.plain) for layout in read.layouts.values()) == len(bare)
    with pytest.raises(UserError, match="DoRA in parts"):
        save(tmp_path, read)
    whole = completed(read, base)
    assert fit(whole, networks(pipe))
    for component, name in read.modules():
        w = base(component, name)
        one, other = delta(read, component, name, w), delta(whole, component, name, w)
        assert torch.allclose(one, other, atol=1e-6)
    assert load(save(tmp_path, whole)).layouts == whole.layouts


def test_a_family_without_the_component_is_refused(tmp_path: Path) -> None:
    weights = lora(PIPELINES["sdxl"](), every=20)
    with pytest.raises(UserError, match="has no text_encoder_2"):
        save(tmp_path / "a.safetensors", weights, layout="kohya", family=FAMILIES["sd1"])


def test_a_family_that_nothing_tells_is_asked_for(tmp_path: Path) -> None:
    tensors = {
        f"unet.mid_block.resnets.0.conv1.{p}": torch.ones(1, 1, 1, 1) for p in (LORA_A, LORA_B)
    }
    weights = LoraWeights(tensors, {"unet": Layout({"mid_block.resnets.0.conv1": Slot(1, 1)})})
    with pytest.raises(UserError, match="--base, one of sd1"):
        save(tmp_path / "a.safetensors", weights, layout="kohya")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_key_that_fits_nothing_is_named_with_the_nearest(layout: str, tmp_path: Path) -> None:
    pipe = PIPELINES["sd1"]()
    weights = lora(pipe, every=4)
    wrong, right = "down_blocks.1.attentions.7.proj_in", "down_blocks.1.attentions.0.proj_in"
    tensors = {f"unet.{wrong}.{part}": torch.ones(1, 1, 1, 1) for part in (LORA_A, LORA_B)}
    unet = weights.layouts["unet"]
    layouts = {**weights.layouts, "unet": replace(unet, slots={**unet.slots, wrong: Slot(1, 1)})}
    weights = LoraWeights({**weights.tensors, **tensors}, layouts)
    place = save(tmp_path / "a", weights, layout=layout, family=FAMILIES["sd1"])
    lines = fit(load(place), networks(pipe)).unmatched()
    assert len(lines) == 2
    assert all(f"unexpected: unet.{wrong}." in line for line in lines)
    assert all(line.endswith(f", nearest unet.{right}") for line in lines)
    with pytest.raises(UserError, match=f"nearest unet.{right}"):
        attach(pipe, [(place, 1.0)])
    assert isinstance(pipe, StableDiffusionPipeline)


# PEFT's folders ---------------------------------------------------------------------------------


def told(**fields: Any) -> Any:
    """Changes a configuration."""

    def change(folder: Path) -> None:
        file = folder / "unet" / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return change


def beside(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def without_weights(folder: Path) -> None:
    (folder / "unet" / "adapter_model.safetensors").rename(folder / "unet" / "adapter_model.bin")


PEFT_FAULTS = {
    "another kind": (told(peft_type="IA3"), "peft_type='IA3'"),
    "whole modules": (told(modules_to_save=["conv_in"]), "modules_to_save"),
    "biases": (told(bias="all"), "learnt biases"),
    "another start": (told(init_lora_weights="olora"), "changes the unet's own weights"),
    "a slow pattern": (told(rank_pattern={"(a+)+b": 3}), "too involved"),
    "one beside several": (beside, "one adapter beside"),
    "a pickle": (without_weights, "only safetensors"),
}


@pytest.mark.parametrize("fault", PEFT_FAULTS)
def test_a_peft_folder_that_cannot_be_meant_is_one_clear_error(fault: str, tmp_path: Path) -> None:
    place = save(tmp_path, lora(PIPELINES["sd1"](), every=9), layout="peft")
    change, words = PEFT_FAULTS[fault]
    change(place)
    with pytest.raises(UserError, match=words):
        load(place)


def test_one_component_s_folder_stands_for_itself(tmp_path: Path) -> None:
    weights = lora(PIPELINES["sd1"](), every=9)
    place = save(tmp_path / "a", weights, layout="peft")
    assert set(load(place / "text_encoder").layouts) == {"text_encoder"}
    other = (place / "text_encoder").rename(tmp_path / "words")
    assert set(load(other).layouts) == {"text_encoder"}
    assert set(load(other / "adapter_model.safetensors").layouts) == {"text_encoder"}
    assert set(load(place).layouts) == {"unet"}
